"""Progress: one line that shows how far the run is and what it has found so far."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar

from dynlight.documents.waves import Segment
from dynlight.learning.processes.strategies import board_of
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.text import number

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation
    from dynlight.recording.resume import Kept


class DocumentProgress(ProgressBar):
    """Shows documents done, tokens per second, running bits per byte (static → adapted), and the time left.

    On a terminal it is one line that is written again, no wider than the terminal; elsewhere a line every ten seconds,
    and the last. Of several processes the first shows what all have read, as they told within the last second.

    Args:
        seconds: the least time between two refreshes on a terminal.
    """

    is_record = True  # so that one process of those that read the same has it

    def __init__(self, seconds: float = 0.2) -> None:
        super().__init__()
        self._seconds = seconds
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing from now on; Lightning calls this on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the line again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        documents = trainer.datamodule.loaded  # type: ignore[attr-defined]
        self._board = board_of(trainer)
        self._documents = len(documents)
        self._empty = sum(len(document) == 0 for document in documents)
        self._tokens = sum(len(document) for document in documents)
        self._read = self._finished = 0  # by this process
        self._is_done = False
        self._is_terminal = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        self._read += sum(batch.tokens)
        self._finished += len(batch.finished)
        self._show_now_and_then(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        self._is_done = True
        while self._counts(pl_module)[-1] < self._board.ranks and self._board.rank == 0:
            self._board.look()
            self._show_now_and_then(pl_module)
            time.sleep(0.05)
        self._show(pl_module, end="\n")

    def on_exception(self, trainer: Trainer, pl_module: "DynamicEvaluation", exception: BaseException) -> None:
        if self._enabled and getattr(self, "_is_terminal", False):
            print(file=sys.stderr)  # what comes next begins on a line of its own

    def _show_now_and_then(self, pl_module: "DynamicEvaluation") -> None:
        now = time.perf_counter()
        if now - self._shown >= (self._seconds if self._is_terminal else 10):
            self._shown = now
            self._show(pl_module)

    def _counts(self, pl_module: "DynamicEvaluation") -> list[float]:
        """Of all processes: tokens read, documents finished; nats and bytes, and those of the reference; how many are done."""
        sums = [float(each) for metric in (pl_module.adapted, pl_module.static) for each in (metric.nats, metric.bytes)]
        mine = [self._read, self._finished, *sums, self._is_done]
        return self._board.total("progress", mine, at_once=self._is_done)

    def state_dict(self) -> dict[str, Any]:
        """What was read so far, and in how many seconds."""
        return {"read": self._read, "finished": self._finished, "seconds": time.perf_counter() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._read, self._finished = state_dict["read"], state_dict["finished"]
        self._began = time.perf_counter() - state_dict["seconds"]

    def recount(self, kept: Sequence["Kept"]) -> None:
        """Counts the documents that are kept from before."""
        self._read = sum(len(each.document) for each in kept)
        self._finished += len(kept)

    def _show(self, pl_module: "DynamicEvaluation", end: str = "") -> None:
        counts = self._counts(pl_module)
        if not self._enabled:
            return
        width = shutil.get_terminal_size().columns - 1 if self._is_terminal else 119
        line = self._line(counts, width)
        if self._is_terminal:
            print(f"\r{line}\x1b[K", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _line(self, counts: list[float], width: int) -> str:
        """What there is to tell, in at most `width` columns: the less important gives way first."""
        read, finished, nats, size, static_nats, static_size, _ = counts
        seconds = time.perf_counter() - self._began
        left = seconds * (self._tokens - read) / read if read else 0.0
        share = read / self._tokens if self._tokens else 1.0
        adapted, static = bits_per_byte(nats, size), bits_per_byte(static_nats, static_size)
        found = (
            f"static {number(static, 2)} → adapted {number(adapted, 2)}" if static is not None else number(adapted, 2)
        )
        documents = f"{finished + self._empty:,.0f}/{self._documents:,}"
        speed, remaining = f"{read / max(seconds, 1e-9):,.0f} tok/s", f"{_clock(left)} left"
        bar = "█" * round(12 * share) + "░" * (12 - round(12 * share))
        for parts in (
            (f"{bar} {share:4.0%}", f"{documents} documents", speed, f"bits per byte {found}", remaining),
            (f"{share:4.0%}", f"{documents} documents", speed, f"bits per byte {found}", remaining),
            (f"{share:4.0%}", f"{documents} documents", speed, found, remaining),
            (f"{share:4.0%}", documents, found, remaining),
            (f"{share:4.0%}",),
        ):
            if len(line := " · ".join(parts)) <= width:
                break
        return line


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
