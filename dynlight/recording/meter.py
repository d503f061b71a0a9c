"""Meter: a callback that only looks, after a segment was scored."""

from collections.abc import Container, Sequence

from lightning.pytorch import Callback, Trainer

from dynlight.documents.segments import Segment
from dynlight.learning.finished import Finished
from dynlight.learning.module import DynamicEvaluation


class Meter(Callback):
    """Looks at each score once it is committed, and changes nothing: its place among the callbacks doesn't matter.

    Where all processes read the same documents, the first one's meters alone look.
    """

    is_on = False  # from the start of a run, on a process that keeps records

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        """A run begins, or goes on."""

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        """A segment was read; `module.score` says what was committed, None where no document of it was left."""

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        """All segments were read."""

    def close(self) -> None:
        """Everything that is made at the end of a run is made."""

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        """The run ends by an exception."""

    def recount(self, finished: Sequence[Finished]) -> None:
        """Takes the documents into account that an earlier part of the run has read to their end."""

    def keep_only(self, documents: Container[int]) -> None:
        """Leaves out what an earlier part of the run said of any other document."""

    def on_train_start(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        self.is_on = pl_module.processes.keeps_records
        if self.is_on:
            self.begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DynamicEvaluation, outputs: object, batch: Segment, batch_idx: int
    ) -> None:
        if self.is_on:
            self.see(pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        if self.is_on:
            self.end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        if self.is_on:
            self.close()

    def on_exception(self, trainer: Trainer, pl_module: DynamicEvaluation, exception: BaseException) -> None:
        if self.is_on:
            self.fail(pl_module, exception)
