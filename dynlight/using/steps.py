"""Steps: Lightning makes those of a few segments, behind those that it has made of the same module before."""

from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer

from dynlight.documents.segments import Segment
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.score import Score
from dynlight.learning.stream import DocumentStream
from dynlight.running.trainer import quiet_for_now, silent_trainer


def take_steps(module: DynamicEvaluation, settings: Namespace, segments: Sequence[Segment]) -> list[Score]:
    """Scores segments, and learns from each, as they follow what the module has read; returns their scores.

    Args:
        module: that reads.
        settings: of the Trainer.
        segments: in their order; without any the module is made ready.
    """
    collect = _Collect()
    try:
        with quiet_for_now():
            trainer = silent_trainer(settings, [collect])
            trainer.fit(module, _Segments(segments))
    except SystemExit as stop:  # which Lightning makes of Ctrl-C
        raise (KeyboardInterrupt if trainer.interrupted else stop) from None
    module.to(trainer.strategy.root_device)  # Lightning has left it on the CPU, behind its memory
    module.goes_on = True
    return collect.scores


class _Segments(DocumentStream):
    """Segments that are made already."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__("a text that goes on")
        self._segments = segments

    def setup(self, stage: str) -> None:
        """There is nothing to load."""

    def train_dataloader(self) -> Any:
        return self

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)


class _Collect(Callback):
    """Keeps the score of every segment."""

    def __init__(self) -> None:
        self.scores: list[Score] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DynamicEvaluation, outputs: object, batch: Segment, batch_idx: int
    ) -> None:
        if pl_module.score is not None:
            self.scores.append(pl_module.score)
