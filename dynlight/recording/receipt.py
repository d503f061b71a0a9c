"""Receipt: what was scored, by which weights, in an order that cannot be changed afterwards.

`receipt.json` holds hashes (SHA-256) of all that goes into a run, and its ledger (`ledger.py`). Whoever has the same
model and data can play rows again: `python -m dynlight.audit --receipt runs/x`.
"""

import json
import os
import weakref
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer

from dynlight.documents.segments import Segment
from dynlight.durable import sync_to_disk, write_text
from dynlight.learning.digests import hash_of
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.score import Score
from dynlight.learning.stream import stream_of
from dynlight.recording.hashes import hash_of_documents, hash_of_tokenizer, hash_of_weights
from dynlight.recording.ledger import COLUMNS, first_link, ledger_of, ledgers, line_of, link, read_ledger
from dynlight.recording.meter import Meter


class Receipt(Meter):
    """Keeps the ledger of a run, and writes `receipt.json` at its end.

    While the run goes on, the rows are lines of `rows/ledger.<rank>.jsonl`, so that a long run needs no more memory.

    Args:
        folder: where `receipt.json` goes, beside `config.yaml`; None keeps it in memory, as `contents`.
        resumes: whether the run goes on, so that the rows in the folder are its own.
    """

    def __init__(self, folder: str | Path | None = None, resumes: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.contents: dict[str, Any] = {}
        self._resumes = resumes
        self._lines: IO[bytes] | None = None
        self._last: Score | None = None  # whose rows are not written, as its last digests come with the next score

    def on_train_start(self, trainer: Trainer, pl_module: DynamicEvaluation) -> None:
        # On every process, also where the meter is off: the hash gathers the shards of a model from all.
        models = {"model": pl_module.model, "teacher": pl_module.teacher_model}
        self._hashes = {
            name: hash_of_weights(model.state_dict()) for name, model in models.items() if model is not None
        }
        super().on_train_start(trainer, pl_module)

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        assert module.takes_digests, "a receipt is made of scores with digests: DynamicEvaluation(digests=True)"
        documents = stream_of(trainer).loaded
        config = None if self.folder is None else self.folder / "config.yaml"
        self.contents = {
            "hashes": {
                **self._hashes,
                "tokenizer": hash_of_tokenizer(module.tokenizer),
                "data": hash_of_documents(documents),
                "config": hash_of(config.read_bytes()) if config is not None and config.exists() else None,
            },
            "files": stream_of(trainer).source.digests,
            "documents": len(documents),
            "tokens": sum(len(document) for document in documents),
            "bytes": sum(document.bytes for document in documents),
            "reset": "partly" if module.reset_weights.keep else module.reset_weights.every,
            "columns": COLUMNS,
            "ledger": [],
        }
        self._link = first_link(self.contents)
        self._last = None
        self._board = module.processes.board
        if self.folder is not None:
            ledger = ledger_of(self.folder, self._board.rank)
            ledger.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a killed process loses no row but the last, and a write costs less than a digest.
            self._lines = ledger.open("ab" if self._resumes else "wb", buffering=0)
            weakref.finalize(self, self._lines.close)  # of a run that fails, whose last checkpoint still asks for it

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        if module.score is not None:
            self._write_last()
            self._last = module.score
        if segment.finished:  # its other files are written now
            self._write_last()

    def _write_last(self) -> None:
        if (score := self._last) is None:
            return
        assert score.digests is not None, "the module was asked for them"
        before, after = score.digests.before.names(), score.digests.after.names()
        for row in score.rows:
            commit: list[Any] = [score.segment.documents[row].index, score.segment.cut.index, score.segment.tokens[row]]
            self._add([*commit, score.sums[row], before[row], after[row]])
        self._last = None

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        self._write_last()
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

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        with suppress(RuntimeError):  # where the device itself has failed
            self._write_last()

    def state_dict(self) -> dict[str, Any]:
        """The first and last link of the ledger and its length in bytes; all of it is on disk once this returns."""
        if self.folder is None or self._lines is None:
            return {}
        self._write_last()
        sync_to_disk(ledger_of(self.folder, self._board.rank))
        return {"first": first_link(self.contents), "last": self._link, "bytes": self._lines.tell()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Drops the rows that came after the state."""
        assert self._lines is not None, "the run has begun"
        self._lines.truncate(state_dict["bytes"])
        self._lines.seek(0, os.SEEK_END)
        self._link = state_dict["last"]

    def keep_only(self, documents: Container[int]) -> None:
        """Drops the rows of all other documents; those that stay are linked anew."""
        assert self.folder is not None and self._lines is not None, "the run has begun"
        rows = list(read_ledger(ledger_of(self.folder, self._board.rank)))
        for rank, file in ledgers(self.folder).items():
            if self._board.rank == 0 and rank >= self._board.ranks:  # of a process that the run no longer has
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
            self._lines.write(line_of(row))

    def _joined(self, folder: Path) -> list[list[Any]]:
        """The rows of all processes; of several, sorted by document and segment and linked anew."""
        ledger = [row for file in ledgers(folder).values() for row in read_ledger(file)]
        if self._board.ranks == 1:
            return ledger
        before, rows = first_link(self.contents), []
        for *commit, _ in sorted(ledger, key=lambda row: row[:2]):
            before = link(before, commit)
            rows.append([*commit, before])
        return rows
