"""Totals: the running sums of a process, in one place: the progress line, series and dashboards read them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dynlight.learning.failures import Stop
from dynlight.learning.finished import Finished
from dynlight.learning.score import Score


@dataclass
class Sums:
    """Nats, adapted, static and the teacher's, and what to divide them by."""

    nats: float = 0.0
    static_nats: float = 0.0  # 0 without a reference
    tokens: int = 0
    bytes: int = 0
    words: int = 0  # of documents that were read to their end, as words are counted in whole documents
    teacher_nats: float = 0.0  # 0 without a teacher

    def add(self, other: "Sums", sign: int = 1) -> None:
        """Adds other sums; with a sign of −1 it subtracts them."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + sign * value)


def sums_of(score: Score) -> list[Sums]:
    """The sums of the rows of a score that count."""
    nothing, segment = [0.0] * len(score.sums), score.segment
    static, taught = score.static_sums or nothing, score.teacher_sums or nothing
    return [
        Sums(score.sums[row], static[row], segment.tokens[row], segment.bytes[row], teacher_nats=taught[row])
        for row in score.rows
    ]


class Totals:
    """Sums over all that was read, and over the documents that were read to their end.

    A document that stops is taken out again: its nats are in no total, as in the tables of a finished run.
    """

    def __init__(self) -> None:
        self.read = Sums()
        self.whole = Sums()
        self._running: dict[int, Sums] = {}  # of the documents that are being read

    def add(self, score: Score) -> None:
        """Adds a segment."""
        segment = Sums()
        for row, sums in zip(score.rows, sums_of(score), strict=True):
            document = score.segment.documents[row]
            segment.add(sums)
            self._running.setdefault(document.index, Sums()).add(sums)
            if document in score.segment.finished:
                self.whole.add(self._running.pop(document.index))
                self.whole.words += document.words
        self.read.add(segment)

    def leave_out(self, failures: Stop) -> None:
        """Takes out the documents that have stopped."""
        for stopped in [document for document in self._running if failures.has_stopped(document)]:
            self.read.add(self._running.pop(stopped), sign=-1)

    def recount(self, finished: Sequence[Finished]) -> None:
        """Adds the documents that were read to their end before the run was resumed."""
        for earlier in finished:
            if earlier.failure is None or not earlier.failure.stopped:
                rows = earlier.rows
                taught = math.fsum(rows.teacher_nats) if "teacher_nats" in rows else 0.0
                nats = math.fsum(rows.nats), math.fsum(rows.static_nats.fillna(0.0))
                sums = Sums(*nats, int(rows.tokens.sum()), int(rows.bytes.sum()), teacher_nats=taught)
                self.read.add(sums)
                self.whole.add(sums)
                self.whole.words += earlier.document.words

    def progress_state(self) -> dict[str, Any]:
        """All sums: plain data."""
        running = {document: asdict(sums) for document, sums in self._running.items()}
        return {"read": asdict(self.read), "whole": asdict(self.whole), "running": running}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` gave."""
        self.read, self.whole = Sums(**state["read"]), Sums(**state["whole"])
        self._running = {document: Sums(**sums) for document, sums in state["running"].items()}
