"""Progress: one line that shows how far the run is and what it has found so far."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from dynlight.report import bits_per_byte
from dynlight.waves import Segment


class DocumentProgress(ProgressBar):
    """Shows documents done, tokens per second, running bits per byte (static → adapted), and the time left.

    Args:
        seconds: the least time between two refreshes; on something other than a terminal a line every ten.
    """

    def __init__(self, seconds: float = 0.2) -> None:
        super().__init__()
        self._seconds = seconds
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Shows nothing from now on; Lightning calls this on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the line again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        documents = trainer.datamodule.loaded  # type: ignore[attr-defined]
        self._all = len(documents)
        self._done = sum(len(document) == 0 for document in documents)
        self._bar = tqdm(
            total=sum(len(document) for document in documents),
            unit="tok",
            disable=not self._enabled,
            mininterval=self._seconds if sys.stderr.isatty() else 10,
            bar_format="{percentage:3.0f}%|{bar:12}| {desc} · {rate_fmt} · {remaining} left",
            file=sys.stderr,
        )
        self._describe(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        assert self._bar is not None, "on_train_start comes first"
        self._done += len(batch.finished)
        if self._bar.update(batch.targets.numel()):
            self._describe(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._bar is not None, "on_train_start comes first"
        self._describe(pl_module)
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()

    def _describe(self, pl_module: LightningModule) -> None:
        assert self._bar is not None, "on_train_start comes first"
        text = f"{self._done}/{self._all} documents"
        adapted = bits_per_byte(float(pl_module.adapted.nats), int(pl_module.adapted.bytes))
        static = bits_per_byte(float(pl_module.static.nats), int(pl_module.static.bytes))
        if adapted is not None:
            text += f" · bits per byte {f'static {static:.3f} → adapted ' if static is not None else ''}{adapted:.3f}"
        self._bar.set_description_str(text, refresh=True)
