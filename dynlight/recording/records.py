"""Records: one row per document and segment, the run's only source of truth.

Rows go to disk while the run goes on, in pieces of their own for each document, and are joined in the order of the data
set when it ends; so the files depend neither on which documents ran together nor on where the run was cut short.
"""

import json
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Trainer

from dynlight.documents.document import Document
from dynlight.documents.segments import Segment
from dynlight.durable import draft_of, write_text
from dynlight.errors import require
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.stream import stream_of
from dynlight.recording.memory import peak_memory
from dynlight.recording.meter import Meter
from dynlight.recording.pieces import BUFFERED, Pieces
from dynlight.recording.report.tables import documents_table
from dynlight.recording.rows import BufferedRows, columns_of_tokens, schemas


class Records(Meter):
    """Writes what each segment scored, learned and cost.

    Args:
        folder: where the rows go: `segments.parquet`, `timings.parquet`, `tokens.parquet`, of a mixture
            `experts.parquet`, and `run.json`. None keeps them in a temporary folder that lives as long as this object:
            results as tables in memory.
        settings: entries that `run.json` has besides: the run's name and command.
        resumes: whether the run goes on, so that the rows in the folder are its own.
    """

    def __init__(
        self, folder: str | Path | None = None, settings: dict[str, Any] | None = None, resumes: bool = False
    ) -> None:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="dynlight-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = Path(folder)
        self.pieces = Pieces(self.folder / "rows")
        self._settings = settings or {}
        self._resumes = resumes
        self._rows: dict[int, BufferedRows] = {}
        self._written: dict[int, int] = {}  # document being read → its segments on disk
        self.has_begun = False  # whether the first segment was begun: before that nothing was read
        self._peak_memory = 0  # bytes, before the run went on in this process

    @property
    def segments(self) -> pd.DataFrame:
        """One row a segment, with the columns of `segments.parquet`."""
        return pd.read_parquet(self.folder / "segments.parquet")

    @property
    def tokens(self) -> pd.DataFrame:
        """One row a token, with the columns of `tokens.parquet`."""
        return pd.read_parquet(self.folder / "tokens.parquet")

    @property
    def documents(self) -> pd.DataFrame:
        """One row a document, with the columns of `documents.csv`."""
        return documents_table(self.folder)

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        self._schemas = schemas(module.mixture is not None, module.teacher_model is not None)
        self._began = time.perf_counter()
        self._board = module.processes.board
        # The first process's folder: of a temporary one each process has made its own.
        self.folder = Path(self._board.of_first("folder", str(self.folder)))
        self.pieces = Pieces(self.folder / "rows")
        self._device = module.device
        if self._board.rank == 0:
            self.pieces.folder.mkdir(parents=True, exist_ok=True)
            for document in () if self._resumes else stream_of(trainer).loaded:
                self.pieces.drop(document.index)
        self._board.wait("rows")
        require(
            self.pieces.folder.is_dir(),
            "out",
            "be a folder that all nodes share",
            got=f"{self.folder}, which this one lacks",
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: DynamicEvaluation, batch: Segment, batch_idx: int
    ) -> None:
        self.has_begun = True

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        score = module.score
        of_tokens = {} if score is None else columns_of_tokens(score)
        for row, document in enumerate(segment.documents):
            if document.index not in self._rows:
                # Not `cut.index`: a document that has failed has no rows for a while, so its next piece begins at the last one's end.
                first = self._written.get(document.index, segment.cut.index)
                self._rows[document.index] = BufferedRows(document, first, self._schemas)
            rows = self._rows[document.index]
            rows.failure = module.failures.of_documents.get(document.index)
            if score is not None and row in score.rows:
                taught = None if module.teacher is None else module.teacher_flop_counter.forward(segment.cut)
                rows.add(score, of_tokens, module.flop_counter.count(score, row), taught, row)
            rows.is_last = document in segment.finished
            if rows.is_last or rows.stop % BUFFERED == 0:
                self._write(rows)
            if rows.is_last:
                del self._rows[document.index], self._written[document.index]

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        failures = [(document, asdict(failure)) for document, failure in module.failures.of_documents.items()]
        mine = {"failures": failures, "peak_memory_bytes": max(self._peak_memory, peak_memory(self._device))}
        processes = self._board.gather("records", mine)
        if not processes:  # only the first process gets what all have sent, and joins their pieces
            return
        documents = stream_of(trainer).loaded
        for name, schema in self._schemas.items():
            self._join(name, schema, documents)
        of_documents = dict(entry for process in processes for entry in process["failures"])
        peak = max(process["peak_memory_bytes"] for process in processes)
        run = self._settings | {
            "documents": [_describe(document, of_documents.get(document.index)) for document in documents],
            "seconds": time.perf_counter() - self._began,
            "peak_memory_bytes": peak,
        }
        run |= _describe_run(trainer, module)
        write_text(self.folder / "run.json", json.dumps(run, indent=1))

    def _join(self, name: str, schema: pa.Schema, documents: Sequence[Document]) -> None:
        """Writes `<name>.parquet` from the pieces of all documents, in the order of the documents."""
        with draft_of(self.folder / f"{name}.parquet") as draft, pq.ParquetWriter(draft, schema) as writer:
            for document in documents:
                for table in self.pieces.tables(document.index, name):
                    if len(table):  # a document that failed in its first segment has no rows
                        writer.write_table(table)
                    pa.default_memory_pool().release_unused()  # else the pool grows with each table

    def close(self) -> None:
        # Not in `end`: until the other meters have written their files too, the run may have to go on from its pieces.
        if self._board.rank == 0:
            shutil.rmtree(self.pieces.folder)

    def fail(self, module: DynamicEvaluation, exception: BaseException) -> None:
        self._write_all()  # what was scored stays

    def state_dict(self) -> dict[str, Any]:
        """How many segments of each document are on disk once this returns, the seconds taken, and the peak of memory."""
        self._write_all()
        self.pieces.sync()
        return {
            "running": self._written.copy(),
            "seconds": time.perf_counter() - self._began,
            "peak_memory": max(self._peak_memory, peak_memory(self._device)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began = time.perf_counter() - state_dict["seconds"]
        self._peak_memory = state_dict["peak_memory"]
        self._written = state_dict["running"]

    def _write_all(self) -> None:
        for rows in self._rows.values():
            self._write(rows)

    def _write(self, rows: BufferedRows) -> None:
        if rows.first < rows.stop or rows.is_last:
            self.pieces.write(rows.take())
            self._written[rows.document.index] = rows.stop


def _describe(document: Document, failure: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a document in run.json."""
    failure = dict(failure or {})
    stopped = failure.pop("stopped", None)
    return {
        "document": document.index,
        "name": document.name,
        "tokens": len(document),
        "bytes": document.bytes,
        "words": document.words,
        "failed": failure if stopped is True else None,
        "finished_static": failure if stopped is False else None,
    }


def _describe_run(trainer: Trainer, module: DynamicEvaluation) -> dict[str, Any]:
    """The entries of run.json that say what was run, and on what."""
    weights = list(module.model.parameters())
    return {
        "protocol": module.protocol,
        "experts": [asdict(expert) for expert in module.experts] if module.mixture is not None else None,
        "processes": trainer.world_size,
        "gradient_bytes": module.gradients.bytes_sent,
        "together": stream_of(trainer).together,
        "parameters": sum(weight.numel() for weight in weights),
        "learned_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
        "device": str(module.device),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dynlight", "torch", "lightning", "transformers", "peft")},
    }
