"""Receipt: what was scored, by which weights, in an order that cannot be changed afterwards.

`receipt.json` holds hashes (SHA-256) of all that goes into a run, and a ledger with a row for each commit: document,
segment, tokens, nats, a digest of the learned weights before scoring and one after learning, and a link, the hash of the
row and of the link before. Who has the last link can tell whether any row was changed; who has the same model and data
can play rows again: `python -m dynlight.audit --receipt runs/x`.

What the ledger shows without playing: a document begins with unlearned weights, and nothing learns between two commits.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from dynlight.documents.waves import Segment, waves
from dynlight.durable import sync_to_disk, write_text
from dynlight.errors import SettingError
from dynlight.learning.processes.strategies import board_of, keeps_records
from dynlight.learning.sharded import Sharded, whole
from dynlight.learning.weights import InPlace, Stacked, as_index
from dynlight.recording.sealed import DamagedError

if TYPE_CHECKING:
    from dynlight.documents.document import Document
    from dynlight.learning.module import DynamicEvaluation

COLUMNS = ("document", "segment", "tokens", "nats", "before", "after", "link")
_RELATIVE = 1e-5  # how far nats may be away when another machine adds in another order


class Receipt(Callback):
    """Keeps the ledger of a run.

    While the run goes on its rows are lines of `rows/ledger.0.jsonl`, so that a long run needs no more memory.

    Args:
        folder: where `receipt.json` goes, beside `config.yaml`; None keeps it in memory, as `contents`.
        resumes: whether the rows that are there belong to this run, which goes on.
    """

    def __init__(self, folder: str | Path | None = None, resumes: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.resumes = resumes
        self.contents: dict[str, Any] = {}
        self._lines: IO[bytes] | None = None
        self._before: list[str] = []
        self._after: list[str] = []
        self._seen: list[tuple[int, int]] | None = None  # the state in which the weights were that `_after` is of

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        # Weights are looked at after the policies have acted on them. A new list: Lightning is going through this one.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]  # type: ignore[attr-defined]
        documents = trainer.datamodule.loaded  # type: ignore[attr-defined]
        config = None if self.folder is None else self.folder / "config.yaml"
        self.contents = {
            "hashes": {
                "model": hash_of_weights(pl_module.model.state_dict()),
                "tokenizer": hash_of_tokenizer(pl_module.tokenizer),
                "data": hash_of_documents(documents),
                "config": hash_of(config.read_bytes()) if config is not None and config.exists() else None,
            },
            "documents": len(documents),
            "tokens": sum(len(document) for document in documents),
            "bytes": sum(document.bytes for document in documents),
            "reset": pl_module.reset_choice.every,
            "columns": COLUMNS,
            "ledger": [],
        }
        self._link = first_link(self.contents)
        self._board = board_of(trainer)
        self._keeps_records = keeps_records(trainer)
        if self.folder is not None and self._keeps_records:
            ledger = ledger_of(self.folder, self._board.rank)
            ledger.parent.mkdir(parents=True, exist_ok=True)
            # Each row at once: a killed process leaves none behind, and a write costs less than a digest.
            self._lines = ledger.open("ab" if self.resumes else "wb", buffering=0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", batch: Segment, batch_idx: int
    ) -> None:
        # Reading all weights twice a segment would cost twice; torch counts what is done to a tensor. What goes round
        # its count (`weight.data.mul_`) shows in the digest after learning, and then when the row is played again.
        state = _state(pl_module)
        unchanged = self._seen is not None and self._seen == state
        self._before, self._seen = self._after if unchanged else digests(pl_module, len(batch.documents)), state

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        if (score := pl_module.score) is None:
            return
        # Without an update of this process's, too, weights may have changed: with `ddp` all learn what one has read.
        state = _state(pl_module)
        after = digests(pl_module, len(batch.documents)) if score.updates or state != self._seen else self._before
        self._after, self._seen = after, state
        for row in score.rows if self._keeps_records else ():
            commit: list[Any] = [batch.documents[row].index, batch.cut.index, batch.tokens[row]]
            commit += [score.sums[row], self._before[row], after[row]]
            self._add(commit)

    def on_train_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        if self.folder is None or self._lines is None:
            return
        self._lines.close()
        self._board.wait("receipt")
        if self._board.rank > 0:
            return
        self.contents["ledger"] = self._joined(self.folder)
        text = json.dumps(self.contents | {"ledger": None}, indent=1)
        rows = ",\n  ".join(json.dumps(row) for row in self.contents["ledger"])
        write_text(self.folder / "receipt.json", text.replace('"ledger": null', f'"ledger": [\n  {rows}\n ]') + "\n")

    def state_dict(self) -> dict[str, Any]:
        """How far the ledger goes that is on disk once this returns."""
        if self.folder is None or self._lines is None:
            return {}
        sync_to_disk(ledger_of(self.folder, self._board.rank))
        return {"first": first_link(self.contents), "last": self._link, "bytes": self._lines.tell()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leaves out the rows that came after."""
        assert self._lines is not None, "the run has begun"
        self._lines.truncate(state_dict["bytes"])
        self._lines.seek(0, os.SEEK_END)
        self._link = state_dict["last"]

    def keep(self, documents: Container[int]) -> None:
        """Leaves out the rows of all other documents; those that stay are linked anew."""
        assert self.folder is not None and self._lines is not None, "the run has begun"
        rows = list(read_ledger(ledger_of(self.folder, self._board.rank)))
        for rank, file in ledgers(self.folder).items():
            if self._board.rank == 0 and rank >= self._board.ranks:  # of a process that there was before
                rows += read_ledger(file)
        self._lines.truncate(0)
        self._lines.seek(0)
        for *commit, _ in rows:
            if commit[0] in documents:
                self._add(commit)
        for rank, file in ledgers(self.folder).items():
            if self._board.rank == 0 and rank >= self._board.ranks:
                file.unlink()

    def _add(self, commit: list[Any]) -> None:
        self._link = link(self._link, commit)
        row = [*commit, self._link]
        if self._lines is None:
            self.contents["ledger"].append(row)
        else:
            self._lines.write(_line(row))

    def _joined(self, folder: Path) -> list[list[Any]]:
        """The ledger; of several processes document by document."""
        ledger = [row for file in ledgers(folder).values() for row in read_ledger(file)]
        if self._board.ranks == 1:
            return ledger
        before, rows = first_link(self.contents), []
        for *commit, _ in sorted(ledger, key=lambda row: row[:2]):
            before = link(before, commit)
            rows.append([*commit, before])
        return rows


def digests(pl_module: "DynamicEvaluation", documents: int) -> list[str]:
    """A digest of the learned weights of each of a wave's first documents.

    Formula: the first 16 digits of SHA-256 over Σ_j b_j mod 2⁶⁴ of each weight, b its bits as 64-bit integers. A hash of
    all bytes would take as long as half the learning; this takes as long as reading them once. No single weight can
    change without it, nor can many unless their changes cancel to the last bit.
    """
    weights = pl_module.weights
    learned = [weight.detach() for weight in weights.learned]
    if not learned:
        return [hash_of(b"")[:16]] * documents
    if isinstance(weights, Sharded):
        starts = zip(learned, weights.starts, strict=True)
        sums = weights.over_all(torch.cat([_sums_of_bits(part.flatten()[None], start) for part, start in starts]))
        return [hash_of(sums.cpu().numpy().tobytes())[:16]]
    if isinstance(weights, InPlace):
        sums = torch.cat([_sums_of_bits(weight.reshape(1, -1)) for weight in learned]).view(1, -1)
        return [hash_of(sums.cpu().numpy().tobytes())[:16]]
    its = [[row for row, (_, owner) in enumerate(weights.owners) if owner == document] for document in range(documents)]
    wanted = as_index([row for own in its for row in own])
    sums = torch.stack([_sums_of_bits(weight[wanted].flatten(1)) for weight in learned], dim=1)
    found = iter(sums.cpu().numpy())
    return [hash_of(b"".join(next(found).tobytes() for _ in own))[:16] for own in its]


def _state(pl_module: "DynamicEvaluation") -> list[tuple[int, int]] | None:
    """Where each learned weight lies and how often it was changed; None for those of a wave, whose rows come and go."""
    if isinstance(pl_module.weights, Stacked):
        return None
    return [(weight.data_ptr(), weight._version) for weight in pl_module.weights.learned]


def _sums_of_bits(weight: Tensor, start: int = 0) -> Tensor:
    """Σ of each row's bits as 64-bit integers, int64 [rows]; learned weights are fp32, two to an integer.

    Of the part of a weight that begins at its number `start`, what it adds to the sum over the whole.
    """
    if start % 2 or weight.shape[1] % 2:
        weight = torch.nn.functional.pad(weight, (start % 2, (start + weight.shape[1]) % 2))
    integers = weight.contiguous().view(torch.int64)
    if integers.device.type == "cpu":
        # numpy adds in one thread: torch's many wait for each other longer than they add, where cores are shared.
        return torch.from_numpy(np.add.reduce(integers.numpy(), axis=1))
    return integers.sum(1)


def hash_of(data: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_of_weights(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, in the order of their names."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        found.update(whole(weight).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_of_tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 over the tokenizer's definition, or where it has none over its vocabulary."""
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        return hash_of(tokenizer.backend_tokenizer.to_str().encode())
    return hash_of(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def hash_of_documents(documents: Iterable["Document"]) -> str:
    """SHA-256 over prefix, ids and text of all documents, in order."""
    found = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        found.update(f"{document.index} {document.prefix} {len(document)} {len(text)}\n".encode())
        found.update(document.tokens.numpy().data)
        found.update(text)
    return found.hexdigest()


def first_link(contents: dict[str, Any]) -> str:
    """The link before the first row: the hash of what the run was made of."""
    made_of = {key: contents[key] for key in ("hashes", "documents", "tokens", "bytes", "reset")}
    return hash_of(json.dumps(made_of, sort_keys=True).encode())


def _line(row: Sequence[Any]) -> bytes:
    return json.dumps(list(row)).encode() + b"\n"


def link(before: str, commit: Sequence[Any]) -> str:
    """The hash of a row and of the link before it."""
    return hash_of((before + json.dumps(list(commit))).encode())


def check_ledger(file: Path, bytes: int, first: str, last: str) -> None:
    """Raises DamagedError unless the first `bytes` bytes of a ledger are rows that link `first` to `last`."""
    before, place = first, 0
    for row in read_ledger(file):
        if place >= bytes or row[-1] != link(before, row[:-1]):
            break
        before = row[-1]
        place += len(_line(row))
    if (place, before) != (bytes, last):
        raise DamagedError(f"{file.name} was changed or cut short")


def ledger_of(folder: Path, rank: int) -> Path:
    """Where a process keeps the rows of its ledger while the run goes on."""
    return folder / "rows" / f"ledger.{rank}.jsonl"


def ledgers(folder: Path) -> dict[int, Path]:
    """The ledgers of all processes, by their numbers."""
    return {int(file.name.split(".")[1]): file for file in sorted((folder / "rows").glob("ledger.*.jsonl"))}


def read_ledger(file: Path) -> Iterator[list[Any]]:
    """The rows of a ledger on its way, up to the first line that is torn."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # also of bytes that are no text
                return
            yield row


def faults_of(contents: dict[str, Any]) -> list[str]:
    """What is wrong with a ledger in itself: broken links, learning between two commits, tokens that don't add up."""
    faults: list[str] = []
    before = first_link(contents)
    weights: dict[int, str] = {}  # after the last commit of each document
    unlearned = contents["ledger"][0][4] if contents["ledger"] else ""
    tokens = 0
    for number, (*commit, found) in enumerate(contents["ledger"]):
        if found != link(before, commit):
            faults.append(f"row {number} of the ledger was changed")
            break
        before = found
        document, segment, count, _, digest, after = commit
        tokens += count
        if segment and weights.get(document, digest) != digest:
            faults.append(f"weights of document {document} changed before segment {segment} was scored")
        if segment == 0 and contents["reset"] == "document" and digest != unlearned:
            faults.append(f"document {document} began with weights that had learned")
        weights[document] = after
    else:
        if tokens > contents["tokens"]:
            faults.append(f"{tokens} tokens were scored, of {contents['tokens']}")
    return faults


@dataclass(frozen=True)
class Replay:
    """What playing segments again found."""

    rows: int  # compared
    faults: tuple[str, ...]
    deviation: float  # the largest of a segment's nats
    digests_equal: int  # rows whose two digests are the same

    @property
    def agrees(self) -> bool:
        """Whether ledger, hashes and nats are what the receipt says."""
        return not self.faults

    def table(self) -> str:
        """The result for a person."""
        lines = [
            f"segments played again   {self.rows:,}",
            f"largest difference      {self.deviation:.2g} nats a segment",
            f"digests of weights      {self.digests_equal:,} of {self.rows:,} equal"
            + ("" if self.digests_equal == self.rows else ": another machine or number of threads rounds otherwise"),
            *(f"fault                   {fault}" for fault in self.faults),
        ]
        return "\n".join([*lines, "the receipt holds" if self.agrees else "the receipt doesn't hold"])


def replay(folder: str | Path, documents: str | None = None, segments: str | None = None) -> Replay:
    """Plays segments of a run again and compares them with its receipt.

    Args:
        folder: the run's, with `config.yaml` and `receipt.json`.
        documents: numbers of documents, `0,2` or `0-3`; None: all.
        segments: numbers of segments; None: all. Those before them are played too, as weights come from them.

    Raises:
        SettingError: if there is no receipt, or nothing in it to play.
    """
    from dynlight import fit
    from dynlight.learning.module import DynamicEvaluation

    folder = Path(folder)
    contents = _read(folder)
    wanted_documents, wanted_segments = _numbers("documents", documents), _numbers("segments", segments)
    chosen = [row for row in contents["ledger"] if wanted_documents(row[0]) and wanted_segments(row[1])]
    if not chosen:
        raise SettingError("documents and segments", "name rows of the receipt", got=f"{documents} and {segments}")
    config = fit.parse(["--config", str(folder / "config.yaml")])
    config.trainer.logger = False
    choices = fit.parser().instantiate(config)
    tokenizer = choices.model.load_tokenizer()
    loaded = choices.data.load(tokenizer)
    seed_everything(config.seed, verbose=False)
    module = DynamicEvaluation(choices.model.load(), tokenizer, **{name: choices[name] for name in fit.CHOICES})
    stream = copy.copy(choices.data)
    indices = {row[0] for row in chosen}
    if choices.reset.every == "never":
        needed = list(range(max(indices) + 1))
    else:  # whole waves, as sums are in another order with other documents beside
        needed = [each.index for wave in waves(loaded, module.context, stream.together)
                  if indices & {each.index for each in wave} for each in wave]  # fmt: skip
    stream.loaded = [document for document in loaded if document.index in set(needed)]
    again = Receipt()
    alone = len(waves(stream.loaded, module.context, stream.together)) == 1
    last = max(row[1] for row in chosen) if alone else None
    fit.silent_trainer(fit.on_one_device(choices.trainer), [again, _StopAfter(last)], folder).fit(module, stream)
    hashes = again.contents["hashes"] | {
        "data": hash_of_documents(loaded),
        "config": hash_of((folder / "config.yaml").read_bytes()),
    }
    faults = faults_of(contents) + [
        f"{name} is another than the receipt says"
        for name, known in contents["hashes"].items()
        if hashes[name] != known
    ]
    found = {(row[0], row[1]): row for row in again.contents["ledger"]}
    deviation, equal = 0.0, 0
    for row in chosen:
        played = found.get((row[0], row[1]))
        if played is None or played[2] != row[2]:
            faults.append(f"document {row[0]}, segment {row[1]} was not scored again")
            continue
        away = abs(played[3] - row[3])
        deviation = max(deviation, math.inf if math.isnan(away) else away)
        equal += played[4:6] == row[4:6]
        if not away <= _RELATIVE * max(1.0, abs(row[3])):
            faults.append(f"document {row[0]}, segment {row[1]}: {played[3]:.6f} nats, the receipt says {row[3]:.6f}")
    return Replay(len(chosen), tuple(faults), deviation, equal)


class _StopAfter(Callback):
    """Ends the reading after a segment, where no more than one wave is read."""

    def __init__(self, last: int | None) -> None:
        self._last = last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        if self._last is not None and batch.cut.index >= self._last:
            trainer.should_stop = True


def _read(folder: Path) -> dict[str, Any]:
    for name in ("config.yaml", "receipt.json"):
        if not (folder / name).is_file():
            raise SettingError("receipt", "be the folder of a run", got=folder, advice=f"it has no {name}")
    try:
        contents = json.loads((folder / "receipt.json").read_text("utf-8"))
        assert list(contents["columns"]) == list(COLUMNS)
        assert all(len(row) == len(COLUMNS) for row in contents["ledger"])
        first_link(contents)
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise SettingError("receipt", "hold a ledger", got=f"{folder / 'receipt.json'} without ({error!r})") from error
    return contents


def _numbers(name: str, given: str | None) -> Callable[[int], bool]:
    """Whether a number is among those given as `0,2,5-7`."""
    if given is None:
        return lambda number: True
    ranges = []
    for part in given.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise SettingError(name, "be numbers and ranges like 0,2,5-7", got=given)
        ranges.append(range(int(first), int(last or first) + 1))
    return lambda number: any(number in each for each in ranges)
