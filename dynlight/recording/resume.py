"""Resume: where a run that was cut short goes on.

From its last checkpoint a run goes on as if nothing had happened, to the last bit. Where no checkpoint can be used, or
documents are now read together in other waves, finished documents are kept, and the others are read from their start.
"""

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynlight.documents.document import Document
from dynlight.documents.segments import Context, Wave
from dynlight.documents.waves import count_segments
from dynlight.learning.finished import Failure, Finished
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.stream import DocumentStream, Position
from dynlight.recording.ledger import check_ledger, ledger_of, ledgers, read_ledger
from dynlight.recording.meter import Meter
from dynlight.recording.origin import UNFINISHED, Origin
from dynlight.recording.pieces import Pieces
from dynlight.recording.sealed import DamagedError, unseal


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is that of a run that was cut short, or still goes on."""
    return (folder / UNFINISHED / "origin.sealed").exists()


def is_read(folder: Path) -> bool:
    """Whether all documents of an unfinished run were read, so that only the report is missing."""
    return (folder / "receipt.json").exists() and not (folder / "rows").exists()


def remove_unfinished(folder: Path) -> None:
    """Removes what makes a run an unfinished one."""
    (folder / UNFINISHED / "origin.sealed").unlink()  # first: without it the folder is no unfinished run
    shutil.rmtree(folder / UNFINISHED)


def how_to_resume(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"python -m dynlight.fit --resume {shlex.quote(str(folder))}"


def checkpoints(unfinished: Path, rank: int) -> list[Path]:
    """The checkpoints of one process, the newest first."""
    return sorted(unfinished.glob(f"rank{rank}-*.sealed"), reverse=True)


@dataclass(frozen=True)
class Start:
    """Where one process of a run goes on."""

    pieces: Pieces
    origin: Origin
    rank: int  # of this process
    waves: list[Wave]  # that this process reads, whole or in part
    skip: int = 0  # segments of the waves that were read
    finished: frozenset[int] = frozenset()  # documents of the waves that were read to their end
    state: dict[str, Any] | None = None  # of a checkpoint; None: the run goes on at the start of a wave
    usable: list[Path] = field(default_factory=list)  # the checkpoint and older ones, which are kept

    @property
    def position(self) -> Position:
        """Where the stream of segments goes on."""
        return Position(frozenset(self.origin.done), self.skip)

    def drop_rows(self) -> None:
        """Drops the rows that were scored later; without a checkpoint, all rows of documents that aren't finished."""
        running = self.state["callbacks"]["Records"]["running"] if self.state else {}
        for document in (document.index for wave in self.waves for document in wave):
            if document not in self.finished:
                self.pieces.drop(document, running.get(document, 0))

    def recount(self, documents: Sequence[Document], module: DynamicEvaluation, meters: Iterable[Meter]) -> None:
        """Has module and meters count the finished documents; the first process counts those of earlier waves too."""
        counted = self.finished | (frozenset(self.origin.done) if self.rank == 0 else frozenset())
        finished = [self._finished(document) for document in documents if document.index in counted]
        module.recount(finished)
        for meter in meters:
            meter.recount(finished)
            meter.keep_only(self.finished | set(self.origin.done))

    def _finished(self, document: Document) -> Finished:
        tables = [list(self.pieces.tables(document.index, name)) for name in ("segments", "timings")]
        rows, timings = (pa.concat_tables(groups).to_pandas() for groups in tables)
        failure = self.pieces.failure(document.index)
        return Finished(document, None if failure is None else Failure(**failure), rows.merge(timings))


def find_start(
    folder: Path,
    origin: Origin,
    stream: DocumentStream,
    context: Context,
    carries_over: bool,
    share: tuple[int, int],
    may_checkpoint: bool,
) -> Start:
    """Finds the point where this process goes on with a run.

    Args:
        folder: the run's.
        origin: as the run left it.
        stream: of all documents, with as many together as they are read from now on.
        context: what cuts them into segments.
        carries_over: whether what is learned from one document is carried on to the next.
        share: the rank of this process among those that deal the documents among them, and their number.
        may_checkpoint: whether each process can go on from a checkpoint of its own.

    Returns:
        Where it goes on, with the origin changed where waves had to be made anew.
    """
    pieces, (rank, ranks) = Pieces(folder / "rows"), share
    if (stream.together, ranks) != (origin.together, origin.ranks):
        done = [] if carries_over else sorted(_whole(folder, pieces, stream.loaded))
        origin = replace(origin, together=stream.together, ranks=ranks, done=done)
    waves = stream.after(Position(frozenset(origin.done))).dealt_to(rank, ranks, context)
    start = Start(pieces, origin, rank, waves)
    from_checkpoint = _from_checkpoint(folder, start) if may_checkpoint else None
    start = from_checkpoint or _from_a_wave(folder, start, context, carries_over)
    if from_checkpoint is None and rank == 0:
        kept = len(start.finished) + len(origin.done)
        say(f"{kept} of {len(stream.loaded)} documents are kept, and the others read from their start")
    return start


def _from_checkpoint(folder: Path, start: Start) -> Start | None:
    """The start at the newest checkpoint that is whole, of the same waves, and has its rows on disk; None: there is none."""
    paths = checkpoints(folder / UNFINISHED, start.rank)
    for path in paths:
        try:
            state = unseal(path)
            if state["stream"] != start.origin.stream:
                continue
            _check_rows(folder, start, state)
        except DamagedError as error:
            say(f"{path} cannot be used: {error}")
            continue
        state["module"] = _module_state(state)
        usable = [other for other in paths if other <= path]
        finished = frozenset(state["finished"])
        return replace(start, skip=state["segments"], finished=finished, state=state, usable=usable)
    return None


def _from_a_wave(folder: Path, start: Start, context: Context, carries_over: bool) -> Start:
    """The start at the first wave that isn't finished: as waves are the same, scores are too, to the last bit."""
    documents = [document for wave in start.waves for document in wave]
    # Where learning carries over, all documents are read again: what the finished ones taught is lost.
    whole = set() if carries_over else _whole(folder, start.pieces, documents)
    waves = list(takewhile(lambda wave: whole.issuperset(document.index for document in wave), start.waves))
    finished = frozenset(document.index for wave in waves for document in wave)
    return replace(start, skip=count_segments(waves, context), finished=finished)


def _check_rows(folder: Path, start: Start, state: dict[str, Any]) -> None:
    """Raises DamagedError where rows that a checkpoint relies on are damaged or missing."""
    check_ledger(ledger_of(folder, start.rank), **state["callbacks"]["Receipt"])
    for document in (*start.origin.done, *state["finished"]):
        if not start.pieces.extent(document)[1]:
            raise DamagedError(f"rows of document {document} are damaged")
    for document, stop in state["callbacks"]["Records"]["running"].items():
        if stop not in start.pieces.extent(document)[0]:
            raise DamagedError(f"rows of document {document} are damaged")


def _whole(folder: Path, pieces: Pieces, documents: Iterable[Document]) -> set[int]:
    """The documents whose rows are all on disk, up to the last piece, with a commit in a ledger for each segment."""
    committed = Counter(row[0] for file in ledgers(folder).values() for row in read_ledger(file))
    extents = {document.index: pieces.extent(document.index) for document in documents}
    return {index for index, (stops, is_last) in extents.items() if is_last and committed[index] == stops[-1]}


def _module_state(state: dict[str, Any]) -> dict[str, Any]:
    """The module's state in a checkpoint; one of version 0.1.0, which kept the running sums thrice, in today's form."""
    module: dict[str, Any] = state["module"]
    if "totals" in module:
        return module
    sums = state["callbacks"].get("FlopsLogger", {})
    has_loggers = "axes" in sums and sums["axes"]["tokens"] > 0  # then these sums leave out documents that have stopped
    read = sums["read"] if has_loggers else module["adapted"] | {"static_nats": module["static"]["nats"]}
    failures = {
        document: {"segment": segment, "reason": module["reasons"][document], "stopped": name == "failed"}
        for name in ("unlearned", "failed")  # one that is in both has stopped
        for document, segment in module[name].items()
    }
    return {
        "weights": module["weights"],
        "optimizers": module["optimizers"],
        "predictor": module["log_weights"],
        "failures": failures,
        "totals": {"read": read, "whole": sums.get("whole", {}), "running": sums.get("running", {})},
        "random": module["random"],
    }


def say(message: str) -> None:
    """Prints one line about a decision that was made for the user."""
    print(f"resume: {message}", file=sys.stderr)
