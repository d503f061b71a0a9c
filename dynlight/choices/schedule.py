"""Schedule: when the model learns. A new schedule is a pure rule behind one callback."""

import math
from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Callback, Trainer

from dynlight.choices.learner import Learner
from dynlight.documents.segments import Segment
from dynlight.errors import SettingError, require

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
        above: learns from those segments alone whose mean nats per token, as the learning weights scored them, are above
            this; None: from any.
        above_mean: likewise, above so many times the mean of the document before the segment; the first is learned from.

    Raises:
        SettingError: if a period or `passes` is under 1, no period is given for segment 0, or a bound is no number.
    """

    def __init__(
        self, every: Every = 1, passes: int = 1, above: float | None = None, above_mean: float | None = None
    ) -> None:
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
        for name, bound in (("above", above), ("above_mean", above_mean)):
            is_number = bound is None or not math.isnan(bound)
            require(is_number, f"schedule.{name}", "be a number", got=bound, advice="choose null for no bound")
            is_of_use = bound is None or every != "never"
            require(is_of_use, f"schedule.{name}", "be null with schedule.every never", got=bound)
        self.every = every
        self.passes = passes
        self.above = above
        self.above_mean = above_mean

    @property
    def is_choosy(self) -> bool:
        """Whether what is learned from depends on what was scored."""
        return self.above is not None or self.above_mean is not None

    def is_surprised(self, nats_per_token: float, before: float | None) -> bool:
        """Whether a segment is learned from that scored so many nats per token, behind a document that scored `before`.

        >>> [UpdateFrequency(above_mean=1.1).is_surprised(nats, before) for nats, before in ((3, None), (3, 2), (2, 2))]
        [True, True, False]
        """
        bounds = self.above, None if before is None or self.above_mean is None else self.above_mean * before
        return all(nats_per_token > bound for bound in bounds if bound is not None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, batch: Segment, batch_idx: int) -> None:
        pl_module.updates_due = self.passes if due(batch.cut.index, self.every) else 0

    def __str__(self) -> str:
        if self.every == "never":
            return "never"
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        above = "" if self.above is None else f" above {self.above:g} nats a token"
        above += "" if self.above_mean is None else f" above {self.above_mean:g} × the document's mean"
        return f"every {self.every}{passes}{above}"
