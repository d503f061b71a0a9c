"""Meter: a callback that looks at each committed score and changes nothing."""

from collections.abc import Container, Sequence

from lightning.pytorch import Callback, Trainer

from dynlight.documents.segments import Segment
from dynlight.learning.finished import Finished
from dynlight.learning.module import DynamicEvaluation


class Meter(Callback):
    """Looks at each score once it is committed, and changes nothing: its place among the callbacks doesn't matter.

    Where all processes read the same documents, only the meters of the first one look.
    """

    is_on = False  # whether this process keeps records, set when a run starts

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        """Is called when a run begins, or goes on."""

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        """Is called when a segment was read; `module.score` is what was committed, None where all its documents had stopped."""

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        """Is called when all segments were read."""

    def close(self) -> None:
        """Is called when every meter has ended."""

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        """Is called when an exception ends the run."""

    def recount(self, finished: Sequence[Finished]) -> None:
        """Counts the documents that an earlier part of the run has read to their end."""

    def keep_only(self, documents: Container[int]) -> None:
        """Drops what an earlier part of the run has recorded of any other document."""

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
