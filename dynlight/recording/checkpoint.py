"""Checkpoint: all that a run needs to go on from where it is, on disk every few minutes and when it is told to stop.

What an unfinished run has beside its rows lies in `unfinished/`, which a finished one no longer has:

    origin.sealed            what the run is made of, so that a change is noticed (`resume.py`)
    rank0-000000000123.sealed    after 123 segments, of the first process; the last two are kept
"""

import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from dynlight.documents.waves import Segment
from dynlight.durable import sync_to_disk
from dynlight.errors import SettingError
from dynlight.learning.processes.board import ProcessFailedError
from dynlight.learning.processes.strategies import is_sharded, learns_in_step
from dynlight.recording.receipt import Receipt
from dynlight.recording.resume import UNFINISHED, Origin, Start, checkpoints
from dynlight.recording.sealed import seal

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation

_STOP = (signal.SIGTERM, signal.SIGINT)
KEPT = 2  # the newest, and one in case it is damaged


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
        if self.minutes is None or not self.minutes > 0:  # the parser lets null pass
            got = "null" if self.minutes is None else self.minutes
            raise SettingError("checkpoint.minutes", "be above 0", got=got, advice="choose checkpoint: null for none")


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """A signal told the run to stop."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class Signals:
    """SIGTERM and SIGINT as `Interrupted`: at once, or while segments are read after the present one.

    A second one stops at once whatever is going on, as the checkpoint before it is as good.
    """

    def __init__(self) -> None:
        self.waits = False
        self.received: int | None = None

    def __enter__(self) -> Self:
        self._before = {signum: signal.getsignal(signum) for signum in _STOP}
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def listen(self) -> None:
        """Takes the signals over; only a process's main thread may."""
        if threading.current_thread() is threading.main_thread():
            for signum in _STOP:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        is_second, self.received = self.received is not None, signum
        if is_second or not self.waits:
            raise Interrupted(signum)


class Checkpoint(Callback):
    """Writes checkpoints, and puts a run that goes on where it was.

    What each part of the run has to remember it says itself: the module in `progress_state`, callbacks in `state_dict`.

    Args:
        folder: the run's.
        origin: what the run is made of.
        receipt: who knows the hashes of the model.
        period: how often; None: never, not even when the run is told to stop.
        signals: what tells it to stop.
    """

    is_record = True  # so that one process of those that read the same has it

    def __init__(
        self, folder: Path, origin: Origin, receipt: Receipt, period: CheckpointPeriod | None, signals: Signals
    ) -> None:
        self.folder = folder / UNFINISHED
        self.start: Start | None = None  # where the run goes on; None: at its beginning
        self._origin = origin
        self._receipt = receipt
        self._seconds = None if period is None else 60 * period.minutes
        self._signals = signals

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        # Last of all, so that what it saves is complete. A new list: Lightning is going through this one.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]  # type: ignore[attr-defined]
        self._others = {each.state_key: each for each in trainer.callbacks if each is not self}  # type: ignore[attr-defined]
        self._rank = trainer.global_rank
        self._origin.together = trainer.datamodule.together  # type: ignore[attr-defined] # a number by now
        self._segments = trainer.datamodule.skip  # type: ignore[attr-defined]
        self._finished = set() if self.start is None else self.start.finished
        if learns_in_step(trainer) or is_sharded(trainer):
            self._seconds = None  # of what all processes learn, checkpoints would have to be of the same moment
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._origin.check_hashes(self.folder.parent, self._receipt.contents["hashes"])
        if self._rank == 0:
            self._origin.write(self.folder)
        self._signals.listen()  # after Lightning, which takes them at the start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        # Here all others have begun as ever, and nothing was read yet.
        if self.start is not None:
            self._go_on(self.start, trainer, pl_module)
        self._signals.waits = self._seconds is not None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        self._segments += 1
        self._finished.update(document.index for document in batch.finished)
        stops = self._signals.received
        if self._seconds is not None and (stops is not None or time.monotonic() - self._saved >= self._seconds):
            self.save(pl_module)
        if stops is not None:
            raise Interrupted(stops)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        self._signals.waits = False  # all is read; what follows can be done again

    def on_exception(self, trainer: Trainer, pl_module: "DynamicEvaluation", exception: BaseException) -> None:
        # Another process was stopped, or failed: this one has just come to a segment that it hasn't read.
        if isinstance(exception, ProcessFailedError) and self._signals.waits:
            self.save(pl_module)

    def save(self, pl_module: "DynamicEvaluation") -> None:
        """Writes down where the run is."""
        others = {key: state for key, each in self._others.items() if (state := each.state_dict())}
        state = {
            "stream": self._origin.stream,
            "segments": self._segments,
            "finished": sorted(self._finished),
            "module": pl_module.progress_state(),
            "callbacks": others,
            "random": _random_state(),
        }
        seal(self.folder / f"rank{self._rank}-{self._segments:012d}.sealed", state)
        for old in checkpoints(self.folder, self._rank)[KEPT:]:
            old.unlink()
        sync_to_disk(self.folder)
        self._saved = time.monotonic()

    def _go_on(self, start: Start, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        start.drop_rows()
        for path in checkpoints(self.folder, self._rank):
            if path not in start.usable:
                path.unlink()
        if start.state is None:
            start.recount(trainer, pl_module, self._others.values())
            return
        pl_module.load_progress_state(start.state["module"])
        for key, state in start.state["callbacks"].items():
            self._others[key].load_state_dict(state)
        _set_random_state(start.state["random"])


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
