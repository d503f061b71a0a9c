"""Callbacks that go wrong in one process of several."""

import os
import signal
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback


class FailIn(Callback):
    """Fails in process `rank` at the segment with this number, and leaves a file that says when."""

    def __init__(self, rank: int, how: Literal["bug", "kill"] = "bug", segment: int = 2) -> None:
        self.rank = rank
        self.how = how
        self.segment = segment

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == self.segment:
            Path("failed").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a bug in one process")
