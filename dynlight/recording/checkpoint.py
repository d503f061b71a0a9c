"""Checkpoint: all that a run needs to go on from where it is, written every few minutes and when a signal stops it.

Beside its rows an unfinished run has a folder `unfinished/`, which is removed when the run is finished:

    origin.sealed            what the run is made of, so that a change is noticed (`origin.py`)
    rank0-000000000123.sealed    after 123 segments, of the first process; the last two are kept
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from dynlight.documents.segments import Segment
from dynlight.durable import sync_to_disk
from dynlight.errors import require
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.board import ProcessFailedError
from dynlight.learning.processes.processes import may_checkpoint
from dynlight.learning.stream import stream_of
from dynlight.recording.meter import Meter
from dynlight.recording.origin import UNFINISHED, Origin
from dynlight.recording.receipt import Receipt
from dynlight.recording.resume import Start, checkpoints
from dynlight.recording.sealed import seal
from dynlight.recording.signals import Signals

KEPT = 2  # checkpoints of a process: the newest, and one more in case it is damaged


@dataclass
class CheckpointPeriod:
    """How often a run writes down where it is.

    Args:
        minutes: between two checkpoints.

    Raises:
        SettingError: if `minutes` is not above 0.
    """

    minutes: float = 5.0

    def __post_init__(self) -> None:
        got = "null" if self.minutes is None else self.minutes  # the parser lets null pass
        require(
            self.minutes is not None and self.minutes > 0,
            "checkpoint.minutes",
            "be above 0",
            got=got,
            advice="choose checkpoint: null for none",
        )


class Checkpoint(Meter, LightningCheckpoint):  # the Trainer calls a LightningCheckpoint last
    """Writes checkpoints, and restores the state of a run that goes on.

    A checkpoint holds `progress_state` of the module, and `state_dict` of each callback that has one.

    Args:
        folder: the run's.
        receipt: the run's, which knows the hashes of the model.
        period: how often; None: never, not even when a signal stops the run.
        signals: that stop the run.
    """

    def __init__(self, folder: Path, receipt: Receipt, period: CheckpointPeriod | None, signals: Signals) -> None:
        self.folder = folder / UNFINISHED
        self._receipt = receipt
        self._seconds = None if period is None else 60 * period.minutes
        self._signals = signals
        self._start: Start | None = None

    def prepare(self, origin: Origin, start: Start | None = None) -> None:
        """Takes, before the run, its origin, and where it goes on (None: at its beginning)."""
        self._origin, self._start = origin, start

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        stream = stream_of(trainer)
        self._others = {callback.state_key: callback for callback in _callbacks(trainer) if callback is not self}
        self._rank = module.processes.rank
        self._segments = stream.position.skip
        self._finished = set(self._start.finished) if self._start is not None else set()
        self._is_kept = self._seconds is not None and may_checkpoint(module.processes.way)
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        hashes = self._receipt.contents["hashes"]
        self._origin.check_hashes(self.folder.parent, hashes)
        self._origin = self._origin.begun(int(stream.together), hashes)
        if self._rank == 0:
            self._origin.write(self.folder)
        self._signals.listen()  # once more: Lightning takes them over when a run starts

    def on_train_epoch_start(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        # By now every callback has begun, and nothing was read yet.
        if self.is_on and self._start is not None:
            self._go_on(self._start, trainer, pl_module)
        self._signals.waits = self.is_on and self._is_kept

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        self._segments += 1
        self._finished.update(document.index for document in segment.finished)
        stops = self._signals.received
        is_due = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        if self._is_kept and (stops is not None or is_due):
            self.save(module)
        if stops is not None:
            raise stops

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        self._signals.waits = False  # all is read: what follows can be made again

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        # Another process was stopped, or has failed: this one is between two segments, so its state is whole.
        if isinstance(exception, ProcessFailedError) and self._signals.waits:
            self.save(module)

    def save(self, module: DynamicEvaluation) -> None:
        """Writes a checkpoint, and removes those that are too many."""
        callbacks = {key: state for key, callback in self._others.items() if (state := callback.state_dict())}
        state = {
            "stream": self._origin.stream,
            "segments": self._segments,
            "finished": sorted(self._finished),
            "module": module.progress_state(),
            "callbacks": callbacks,
            "random": _random_state(),
        }
        seal(self.folder / f"rank{self._rank}-{self._segments:012d}.sealed", state)
        for old in checkpoints(self.folder, self._rank)[KEPT:]:
            old.unlink()
        sync_to_disk(self.folder)
        self._saved = time.monotonic()

    def _go_on(self, start: Start, trainer: Trainer, module: DynamicEvaluation) -> None:
        """Restores the state that a run goes on from: that of a checkpoint, or the counts of finished documents."""
        start.drop_rows()
        for path in checkpoints(self.folder, self._rank):
            if path not in start.usable:
                path.unlink()
        if start.state is None:
            meters = [callback for callback in self._others.values() if isinstance(callback, Meter)]
            start.recount(stream_of(trainer).loaded, module, meters)
            return
        module.load_progress_state(start.state["module"])
        for key, state in start.state["callbacks"].items():
            if key in self._others:  # a callback of the user's may have been left out since
                self._others[key].load_state_dict(state)
        _set_random_state(start.state["random"])


def _callbacks(trainer: Trainer) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_rng_state_all(state["cuda"])
