"""Progress: one line that shows how far the run is and its score so far."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar

from dynlight.documents.segments import Segment
from dynlight.learning.finished import Finished
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.stream import stream_of
from dynlight.recording.meter import Meter
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.text import number


class DocumentProgress(Meter, ProgressBar):
    """Shows documents done, tokens per second, running bits per byte (static → adapted), and the time left.

    On a terminal one line, no wider than the terminal, is written again and again; elsewhere a line is added every ten
    seconds and at the end. Of several processes the first shows what all have read, at most a second ago.

    Args:
        seconds: the least time between two refreshes on a terminal.
    """

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

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        documents = stream_of(trainer).loaded
        self._board = module.processes.board
        self._documents = len(documents)
        self._empty = sum(len(document) == 0 for document in documents)
        self._tokens = sum(len(document) for document in documents)
        self._read = self._finished = 0  # by this process, documents that failed included
        self._is_done = False
        self._is_terminal = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        self._read += sum(segment.tokens)
        self._finished += len(segment.finished)
        self._show_now_and_then(module)

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        self._is_done = True
        while self._counts(module)[-1] < self._board.ranks and self._board.rank == 0:
            self._board.look()
            self._show_now_and_then(module)
            time.sleep(0.05)
        self._show(module, end="\n")

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        if self._enabled and self._is_terminal:
            print(file=sys.stderr)  # what is printed next begins on a line of its own

    def _show_now_and_then(self, module: DynamicEvaluation) -> None:
        now = time.perf_counter()
        if now - self._shown >= (self._seconds if self._is_terminal else 10):
            self._shown = now
            self._show(module)

    def _counts(self, module: DynamicEvaluation) -> list[float]:
        """Summed over processes: tokens read, documents finished, nats, bytes, static nats and their bytes, processes done."""
        read, has_static = module.totals.read, module.reference is not None
        sums = [read.nats, read.bytes, read.static_nats, read.bytes * has_static]
        mine = [self._read, self._finished, *sums, self._is_done]
        return self._board.total("progress", mine, at_once=self._is_done)

    def state_dict(self) -> dict[str, Any]:
        """Tokens read and documents finished so far, and the seconds taken."""
        return {"read": self._read, "finished": self._finished, "seconds": time.perf_counter() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._read, self._finished = state_dict["read"], state_dict["finished"]
        self._began = time.perf_counter() - state_dict["seconds"]

    def recount(self, finished: Sequence[Finished]) -> None:
        self._read = sum(len(earlier.document) for earlier in finished)
        self._finished += len(finished)

    def _show(self, module: DynamicEvaluation, end: str = "") -> None:
        counts = self._counts(module)
        if not self._enabled:
            return
        width = shutil.get_terminal_size().columns - 1 if self._is_terminal else 119
        line = self._line(counts, width)
        try:
            if self._is_terminal:
                print(f"\r{line}\x1b[K", end=end, file=sys.stderr, flush=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:  # nobody reads it any more
            self._enabled = False

    def _line(self, counts: list[float], width: int) -> str:
        """The line, in at most `width` columns: what matters least is left out first."""
        read, finished, nats, size, static_nats, static_size, _ = counts
        seconds = time.perf_counter() - self._began
        left = seconds * (self._tokens - read) / read if read else 0.0
        fraction = read / self._tokens if self._tokens else 1.0
        adapted, static = bits_per_byte(nats, size), bits_per_byte(static_nats, static_size)
        score = number(adapted, 2)
        if static is not None:
            score = f"static {number(static, 2)} → adapted {score}"
        documents = f"{finished + self._empty:,.0f}/{self._documents:,}"
        speed, remaining = f"{read / max(seconds, 1e-9):,.0f} tok/s", f"{_clock(left)} left"
        bar = "█" * round(12 * fraction) + "░" * (12 - round(12 * fraction))
        for cells in (
            (f"{bar} {fraction:4.0%}", f"{documents} documents", speed, f"bits per byte {score}", remaining),
            (f"{fraction:4.0%}", f"{documents} documents", speed, f"bits per byte {score}", remaining),
            (f"{fraction:4.0%}", f"{documents} documents", speed, score, remaining),
            (f"{fraction:4.0%}", documents, score, remaining),
            (f"{fraction:4.0%}",),
        ):
            if len(line := " · ".join(cells)) <= width:
                break
        return line


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
