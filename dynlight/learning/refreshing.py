"""Refreshing: when the memory is made anew by the present weights, and from which segments."""

from dynlight.documents.segments import Context, Segment
from dynlight.documents.waves import earlier_segment
from dynlight.learning.weights import Weights


class Refreshing:
    """Counts updates, and makes the memory anew after as many as the context says.

    Args:
        context: what a forward has in view.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._updates = 0  # since the memory was made

    def after(self, segment: Segment, updates: int, weights: Weights) -> range:
        """Takes note of updates from a segment that is in memory now; returns which segments were read again for a new one."""
        if segment.is_first:
            self._updates = 0
        self._updates += updates
        due = self._context.refresh is not None and self._updates >= self._context.refresh
        if not due or len(segment.finished) == len(segment.documents):
            return range(0)
        again = range(segment.cut.index + 1 - len(weights.earlier), segment.cut.index + 1)
        weights.refresh([earlier_segment(segment, i, self._context).to(segment.inputs.device) for i in again])
        self._updates = 0
        return again

    def progress_state(self) -> int:
        """How many updates were made since the memory was."""
        return self._updates

    def load_progress_state(self, state: int) -> None:
        """Puts back what `progress_state` gave."""
        self._updates = state
