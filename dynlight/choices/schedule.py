"""Schedule: when the model learns. A new schedule is a pure rule behind one callback."""

from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Callback, Trainer

from dynlight.choices.learner import Learner
from dynlight.documents.segments import Segment
from dynlight.errors import SettingError

Every = int | dict[int, int] | Literal["never"]


def due(segment: int, every: Every) -> bool:
    """Whether the model learns from the segment with this index.

    Formula: (i + 1) mod k = 0, where k is `every`, or the entry of `every` with the largest key ≤ i.

    >>> [i for i in range(8) if due(i, every=3)]
    [2, 5]
    >>> [i for i in range(8) if due(i, every={0: 1, 4: 2})]
    [0, 1, 2, 3, 5, 7]
    """
    if every == "never":
        return False
    period = every[max(start for start in every if start <= segment)] if isinstance(every, Mapping) else every
    return (segment + 1) % period == 0


class UpdateFrequency(Callback):
    """Learns from every k-th segment of a document, in one or several updates; the others are scored without a graph.

    Args:
        every: the period k in segments; `{0: 1, 64: 4}` changes it at a segment index; `never` learns nothing.
        passes: updates made from one segment, which is scored once, before the first of them.

    Raises:
        SettingError: if a period or `passes` is under 1, or no period is given for segment 0.
    """

    def __init__(self, every: Every = 1, passes: int = 1) -> None:
        if every is None:  # which the parser lets pass
            raise SettingError("schedule.every", "be at least 1", got="null", advice="choose never to learn nothing")
        periods = every if isinstance(every, Mapping) else {0: 1 if every == "never" else every}
        if 0 not in periods:
            raise SettingError("schedule.every", "give the period at segment 0", got=every, advice="add an entry 0: 1")
        if min(periods) < 0:
            raise SettingError("schedule.every", "have segment indices of at least 0", got=min(periods))
        for period in periods.values():
            if period < 1:
                raise SettingError(
                    "schedule.every", "be at least 1", got=period, advice="choose never to learn nothing"
                )
        if passes < 1:
            raise SettingError("schedule.passes", "be at least 1", got=passes)
        self.every = every
        self.passes = passes

    def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, batch: Segment, batch_idx: int) -> None:
        pl_module.updates_due = self.passes if due(batch.cut.index, self.every) else 0

    def __str__(self) -> str:
        if self.every == "never":
            return "never"
        return f"every {self.every}" + (f" in {self.passes} passes" if self.passes > 1 else "")
