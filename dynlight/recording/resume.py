"""Resume: where a run that was cut short goes on, and whether it is still the same run.

From its last checkpoint it goes on as if nothing had happened, to the last bit. Where none can be used, or documents are
now read together in other waves, the documents that were read to their end are kept, and the others read from their start.
"""

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from lightning.pytorch import Trainer

from dynlight.choices.context import Context
from dynlight.documents.document import Document, DocumentStream
from dynlight.documents.waves import Wave, count_segments
from dynlight.errors import SettingError
from dynlight.learning.processes.strategies import is_sharded, share_of
from dynlight.recording.parts import Parts
from dynlight.recording.receipt import check_ledger, hash_of_documents, ledger_of, ledgers, read_ledger
from dynlight.recording.sealed import DamagedError, seal, unseal

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation

UNFINISHED = "unfinished"  # the folder in a run's folder that only an unfinished run has
# Settings that may change: where things are, who is told, and what changes no document's scores.
_FREE = ["config", "out", "overwrite", "checkpoint", "data.together", "trainer.devices", "trainer.accelerator"]
_FREE += ["trainer.strategy", "trainer.num_nodes", "trainer.logger", "trainer.profiler", "trainer.plugins"]


@dataclass
class Origin:
    """What a run is made of, and which documents its processes read in which waves.

    Raises:
        SettingError: from its checks, where something has changed since.
    """

    settings: dict[str, str] = field(default_factory=dict)
    documents: list[list[str]] = field(default_factory=list)  # of each its name, and a hash
    together: int | str = 1
    ranks: int = 1
    done: list[int] = field(default_factory=list)  # documents read before the present waves were made
    hashes: dict[str, str | None] = field(default_factory=dict)  # of the model and its tokenizer
    loggers: list[list[Any]] = field(default_factory=list)  # of each its class and version

    @classmethod
    def read(cls, folder: Path) -> "Origin":
        """That of the unfinished run in a folder."""
        unfinished = folder / UNFINISHED
        if not (unfinished / "origin.sealed").exists():
            advice = "it is finished" if (folder / "summary.json").exists() else "it has nothing to go on from"
            raise SettingError("resume", "be the folder of an unfinished run", got=folder, advice=advice)
        try:
            return cls(**unseal(unfinished / "origin.sealed"))
        except (DamagedError, TypeError) as error:
            raise SettingError(
                "resume",
                "be the folder of an unfinished run",
                got=folder,
                advice=f"its origin.sealed is damaged ({error}), so begin it again with overwrite: true",
            ) from error

    def begin(self, stream: DocumentStream, ranks: int) -> None:
        """Takes down the documents of a new run; the model's hashes come with the first check."""
        self.documents = [[document.name, hash_of_documents([document])] for document in stream.loaded]
        self.together, self.ranks = stream.together, ranks

    def write(self, unfinished: Path) -> None:
        """Puts it where an unfinished run has it."""
        seal(unfinished / "origin.sealed", vars(self))

    def check_settings(self, folder: Path, settings: dict[str, str]) -> None:
        """Whether these are the settings that the run began with, but for those that may change; takes a new run's down."""
        self.settings = self.settings or settings
        for name in sorted({*self.settings, *settings}):
            old, new = (each.get(name, "nothing") for each in (self.settings, settings))
            if old != new:
                raise SettingError(
                    name, f"be {old} as when {folder} began", got=new, advice="change it back, or begin another run"
                )

    def check_documents(self, folder: Path, documents: Sequence[Document]) -> None:
        """Whether these are the documents that the run began with."""
        if len(documents) != len(self.documents):
            raise SettingError(
                "data",
                f"hold {len(self.documents)} document(s) as when {folder} began",
                got=len(documents),
                advice="begin another run",
            )
        for (name, known), document in zip(self.documents, documents, strict=True):
            if document.name != name or hash_of_documents([document]) != known:
                got = "another text" if document.name == name else f"{document.name!r}"
                raise SettingError(
                    "data", f"hold {name!r} as it was when {folder} began", got=got, advice="begin another run"
                )

    def check_hashes(self, folder: Path, hashes: dict[str, str | None]) -> None:
        """Whether these are the hashes of the model and the tokenizer that the run began with."""
        own = {name: hashes[name] for name in ("model", "tokenizer")}
        for name, known in (self.hashes or own).items():
            if own[name] != known:
                what = "weights" if name == "model" else "definition"
                setting = "model.pretrained" if name == "model" else "model.tokenizer"
                raise SettingError(
                    setting, f"have the {what} it had when {folder} began", got="others", advice="begin another run"
                )
        self.hashes = own

    @property
    def stream(self) -> dict[str, Any]:
        """What a position in the stream of segments depends on."""
        return {"together": self.together, "ranks": self.ranks, "done": self.done}


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """A configuration's settings that must not change, by name, in words."""
    return {
        name: str(value)
        for name, value in _leaves(config)
        if not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    }


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, above if name == "init_args" else f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is that of a run that was cut short, or still goes on."""
    return (folder / UNFINISHED / "origin.sealed").exists()


def is_read(folder: Path) -> bool:
    """Whether all documents of an unfinished run were read, so that only the report is missing."""
    return (folder / "receipt.json").exists() and not (folder / "rows").exists()


def remove_unfinished(folder: Path) -> None:
    """Makes a run a finished one."""
    (folder / UNFINISHED / "origin.sealed").unlink()  # what is left then is no run
    shutil.rmtree(folder / UNFINISHED)


def how_to_resume(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"python -m dynlight.fit --resume {shlex.quote(str(folder))}"


def checkpoints(unfinished: Path, rank: int) -> list[Path]:
    """The checkpoints of one process, the newest first."""
    return sorted(unfinished.glob(f"rank{rank}-*.sealed"), reverse=True)


@dataclass(frozen=True)
class Kept:
    """A document that isn't read again, with its rows."""

    document: Document
    failure: dict[str, Any] | None
    rows: pd.DataFrame  # of `segments.parquet` and `timings.parquet`


@dataclass
class Start:
    """Where one process of a run goes on."""

    parts: Parts
    origin: Origin
    reads: list[Wave]  # of this process, whole or in part
    skip: int = 0  # segments of these waves that are done
    finished: set[int] = field(default_factory=set)  # documents of these waves that are
    state: dict[str, Any] | None = None  # of a checkpoint; None: from the start of a wave
    usable: list[Path] = field(default_factory=list)  # checkpoints that agree with it

    def drop_rows(self) -> None:
        """Leaves out what was scored later."""
        running = self.state["callbacks"]["Records"]["running"] if self.state else {}
        for document in (document.index for wave in self.reads for document in wave):
            if document not in self.finished:
                self.parts.drop(document, running.get(document, 0))

    def recount(self, trainer: Trainer, pl_module: "DynamicEvaluation", callbacks: Iterable[Any]) -> None:
        """Tells all that keep sums about the documents that are kept; of those of other waves the first process does."""
        kept = []
        counts = self.finished | (set(self.origin.done) if trainer.global_rank == 0 else set())
        for document in trainer.datamodule.loaded:  # type: ignore[attr-defined]
            if document.index in counts:
                tables = [list(self.parts.tables(document.index, name)) for name in ("segments", "timings")]
                rows, timings = (pa.concat_tables(each).to_pandas() for each in tables)
                kept.append(Kept(document, self.parts.failure(document.index), rows.merge(timings)))
        for each in (pl_module, *callbacks):
            if hasattr(each, "recount"):
                each.recount(kept)
            if hasattr(each, "keep"):
                each.keep(self.finished | set(self.origin.done))


def find_start(
    folder: Path, origin: Origin, stream: DocumentStream, context: Context, every: str, trainer: Trainer
) -> Start:
    """Where the run in `folder` goes on, for one of its processes; sets the stream to it, whose documents are loaded.

    Changes `origin` where waves have to be made anew.
    """
    parts, (rank, ranks) = Parts(folder / "rows"), share_of(trainer)
    if (stream.together, ranks) != (origin.together, origin.ranks):
        origin.done = sorted(_whole(folder, parts, stream.loaded) if every == "document" else [])
        origin.together, origin.ranks = stream.together, ranks
    stream.done = set(origin.done)
    reads = stream.share(rank, ranks, context)
    # Where all processes learn one set of weights, their checkpoints would have to be of the same moment.
    in_step = (every == "never" and ranks > 1) or is_sharded(trainer)
    start = None if in_step else _from_checkpoint(folder, parts, origin, reads, rank)
    start = start or _from_a_wave(folder, parts, origin, reads, context, every)
    stream.skip = start.skip
    if start.state is None and trainer.is_global_zero:
        kept = len(start.finished) + len(origin.done)
        say(f"{kept} of {len(stream.loaded)} documents are kept, and the others read from their start")
    return start


def _from_checkpoint(folder: Path, parts: Parts, origin: Origin, reads: list[Wave], rank: int) -> Start | None:
    found = checkpoints(folder / UNFINISHED, rank)
    for path in found:
        try:
            state = unseal(path)
            if state["stream"] != origin.stream:
                continue
            _check_rows(folder, parts, state, origin.done, rank)
        except DamagedError as error:
            say(f"{path} cannot be used: {error}")
            continue
        usable = [other for other in found if other <= path]
        return Start(parts, origin, reads, state["segments"], set(state["finished"]), state, usable)
    return None


def _from_a_wave(folder: Path, parts: Parts, origin: Origin, reads: list[Wave], context: Context, every: str) -> Start:
    """From the first wave that isn't finished: in the same waves all is as it would have been, to the last bit."""
    documents = [document for wave in reads for document in wave]
    whole = _whole(folder, parts, documents) if every == "document" else set()  # else what they taught is lost
    finished = list(takewhile(lambda wave: whole.issuperset(document.index for document in wave), reads))
    kept = {document.index for wave in finished for document in wave}
    return Start(parts, origin, reads, count_segments(finished, context), kept)


def _check_rows(folder: Path, parts: Parts, state: dict[str, Any], done: Iterable[int], rank: int) -> None:
    """Raises DamagedError where rows are missing that a checkpoint relies on."""
    check_ledger(ledger_of(folder, rank), **state["callbacks"]["Receipt"])
    for document in (*done, *state["finished"]):
        if not parts.extent(document)[1]:
            raise DamagedError(f"rows of document {document} are damaged")
    for document, stop in state["callbacks"]["Records"]["running"].items():
        if stop not in parts.extent(document)[0]:
            raise DamagedError(f"rows of document {document} are damaged")


def _whole(folder: Path, parts: Parts, documents: Iterable[Document]) -> set[int]:
    """The documents whose rows are all there."""
    committed = Counter(row[0] for file in ledgers(folder).values() for row in read_ledger(file))
    extents = {document.index: parts.extent(document.index) for document in documents}
    return {index for index, (stops, is_last) in extents.items() if is_last and committed[index] == stops[-1]}


def say(message: str) -> None:
    """One line about what is done in the user's stead."""
    print(f"resume: {message}", file=sys.stderr)
