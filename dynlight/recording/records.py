"""Records: one row per document and segment, the run's only source of truth.

Rows go to disk while the run goes on, in parts of their own for each document, and are joined in the order of the data
set when it ends; so the files depend neither on which documents ran together nor on where the run was cut short.
"""

import json
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer

from dynlight.documents.document import Document
from dynlight.documents.waves import Segment
from dynlight.durable import draft_of, write_text
from dynlight.errors import SettingError
from dynlight.learning.processes.strategies import board_of
from dynlight.recording.parts import HELD, Part, Parts
from dynlight.recording.report.tables import documents_table

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation, Score

_KEY = [("document", pa.int32()), ("segment", pa.int32())]
SCHEMAS = {
    "segments": pa.schema(
        _KEY
        + [("start", pa.int64()), ("tokens", pa.int32()), ("bytes", pa.int64())]
        + [("nats", pa.float64()), ("static_nats", pa.float64())]
        + [("learned", pa.bool_()), ("updates", pa.int32())]
        + [(f"{part}flops", pa.int64()) for part in ("", "forward_", "activation_", "weight_", "update_", "static_")]
    ),
    "timings": pa.schema(
        _KEY + [(f"{part}seconds", pa.float64()) for part in ("", "scoring_", "learning_", "static_")]
    ),
    "tokens": pa.schema(
        [("document", pa.int32()), ("token", pa.int64()), ("segment", pa.int32()), ("text", pa.string())]
        + [("nats", pa.float32()), ("static_nats", pa.float32())]
    ),
}
# Of a mixture: what each expert said of a segment, and of each token.
_MIXTURE_SCHEMAS = {
    "tokens": SCHEMAS["tokens"].append(pa.field("expert_nats", pa.list_(pa.float32()))),
    "experts": pa.schema(
        [("document", pa.int32()), ("segment", pa.int32()), ("expert", pa.int16()), ("tokens", pa.int32())]
        + [("nats", pa.float64()), ("share", pa.float64())]
    ),
}


class Records(Callback):
    """Writes what each segment scored, learned and cost.

    Args:
        folder: where the rows go: `segments.parquet`, `timings.parquet`, `tokens.parquet`, of a mixture
            `experts.parquet`, and `run.json`. None keeps them in a temporary folder that lives as long as this object:
            results as tables in memory.
        settings: what `run.json` says besides: the command and the like.
        resumes: whether the rows that are there belong to this run, which goes on.
    """

    is_record = True  # so that one process of those that read the same has it

    def __init__(
        self, folder: str | Path | None = None, settings: dict[str, Any] | None = None, resumes: bool = False
    ) -> None:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="dynlight-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = Path(folder)
        self.parts = Parts(self.folder / "rows")
        self._settings = settings or {}
        self._resumes = resumes
        self._rows: dict[int, _Rows] = {}
        self._written: dict[int, int] = {}  # of documents that are being read: the segments on disk
        self._peak_memory = 0  # before this process went on with the run

    @property
    def has_begun(self) -> bool:
        """Whether there is a row on disk, or a place for one."""
        return self.parts.folder.exists()

    @property
    def segments(self) -> pd.DataFrame:
        """One row a segment, with the columns of `segments.parquet`."""
        return pd.read_parquet(self.folder / "segments.parquet")

    @property
    def tokens(self) -> pd.DataFrame:
        """One row a token: its text and its nats."""
        return pd.read_parquet(self.folder / "tokens.parquet")

    @property
    def documents(self) -> pd.DataFrame:
        """One row a document, with the columns of `documents.csv`."""
        return documents_table(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        self._schemas = SCHEMAS | (_MIXTURE_SCHEMAS if pl_module.mixture is not None else {})
        self._began = time.perf_counter()
        self._board = board_of(trainer)
        self.folder = Path(self._board.of_first("folder", str(self.folder)))  # where it is temporary, each has another
        self.parts = Parts(self.folder / "rows")
        self._device = pl_module.device
        if self._board.rank == 0:
            self.parts.folder.mkdir(parents=True, exist_ok=True)
            for document in () if self._resumes else trainer.datamodule.loaded:  # type: ignore[attr-defined]
                self.parts.drop(document.index)
        self._board.wait("rows")
        if not self.parts.folder.is_dir():
            raise SettingError("out", "be a folder that all nodes share", got=f"{self.folder}, which this one lacks")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        score = pl_module.score
        said = {} if score is None else _said_of_tokens(score)
        for row, document in enumerate(batch.documents):
            if document.index not in self._rows:
                # Not at `cut.index`: a document that has failed may have been passed over for a while.
                first = self._written.get(document.index, batch.cut.index)
                self._rows[document.index] = _Rows(document, first, self._schemas)
            rows = self._rows[document.index]
            rows.failure = _failure(document, pl_module)
            if score is not None and row in score.rows:
                rows.add(score, said, pl_module.flop_counter.count(score, row), row)
            rows.is_last = document in batch.finished
            if rows.is_last or rows.stop % HELD == 0:
                self._write(rows)
            if rows.is_last:
                del self._rows[document.index], self._written[document.index]

    def on_train_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        failed = [(each.index, failure) for each in trainer.datamodule.loaded if (failure := _failure(each, pl_module))]  # type: ignore[attr-defined]
        mine = {"failed": failed, "peak_memory_bytes": max(self._peak_memory, peak_memory(self._device))}
        processes = self._board.gather("records", mine)
        if not processes:  # process 0 joins what all have written
            return
        failures = dict(entry for process in processes for entry in process["failed"])
        documents = trainer.datamodule.loaded  # type: ignore[attr-defined]
        for name, schema in self._schemas.items():
            with draft_of(self.folder / f"{name}.parquet") as draft, pq.ParquetWriter(draft, schema) as writer:
                for document in documents:
                    for table in self.parts.tables(document.index, name):
                        if len(table):  # none of a document that failed at once
                            writer.write_table(table)
                        pa.default_memory_pool().release_unused()  # else it keeps more after each table
        run = self._settings | {
            "documents": [_describe(document, failures.get(document.index)) for document in documents],
            "protocol": pl_module.protocol,
            "experts": _describe_experts(pl_module) if pl_module.mixture is not None else None,
            "seconds": time.perf_counter() - self._began,
            "peak_memory_bytes": max(process["peak_memory_bytes"] for process in processes),
            "processes": trainer.world_size,
            "together": getattr(trainer.datamodule, "together", 1),  # type: ignore[attr-defined]
            "parameters": sum(weight.numel() for weight in pl_module.model.parameters()),
            "learned_parameters": sum(
                weight.numel() for weight in pl_module.model.parameters() if weight.requires_grad
            ),
            "device": str(pl_module.device),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("dynlight", "torch", "lightning", "transformers", "peft")},
        }
        write_text(self.folder / "run.json", json.dumps(run, indent=1))

    def on_fit_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        # Not before all that is made at the end is on disk: until then the parts may be needed to go on.
        if self._board.rank == 0:
            shutil.rmtree(self.parts.folder)

    def on_exception(self, trainer: Trainer, pl_module: "DynamicEvaluation", exception: BaseException) -> None:
        self._write_all()  # what was scored stays

    def state_dict(self) -> dict[str, Any]:
        """How far the rows go that are on disk once this returns."""
        self._write_all()
        self.parts.sync()
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

    def _write(self, rows: "_Rows") -> None:
        if rows.first < rows.stop or rows.is_last:
            self.parts.write(rows.take())
            self._written[rows.document.index] = rows.stop


class _Rows:
    """The rows of one document that are not on disk yet."""

    def __init__(self, document: Document, first: int, schemas: dict[str, pa.Schema]) -> None:
        self.document = document
        self._schemas = schemas
        self.first = self.stop = first  # segments
        self.is_last = False
        self.failure: dict[str, Any] | None = None
        self._held: dict[str, list[tuple[Any, ...]]] = {name: [] for name in schemas if name != "tokens"}
        self._tokens = 0  # those held, of each of which there is something in each of:
        self._said: dict[str, np.ndarray] = {}  # float32 [tokens, …] by column

    def add(self, score: "Score", said: dict[str, np.ndarray], flops: Any, row: int) -> None:
        """Takes down what a row of a segment scored, and what was said of each token, [D, S] or [D, S, E]."""
        cut, columns = score.segment.cut, score.segment.scored[row]
        self._held["segments"].append(self._segment(score, flops, row))
        self._held["timings"].append(self._timing(score))
        if score.experts is not None:
            self._held["experts"] += self._experts(score, row)
        stop = self._tokens + score.segment.tokens[row]
        for name, values in said.items():
            if name not in self._said:
                room = min(HELD * values.shape[1], len(self.document) - cut.start)
                self._said[name] = np.empty((room, *values.shape[2:]), np.float32)
            # Copied: what is kept of each segment by itself would leave holes in memory that the next doesn't fit into.
            self._said[name][self._tokens : stop] = values[row, columns]
        self._tokens, self.stop = stop, cut.index + 1

    def take(self) -> Part:
        """All of them as a part, from now on held no longer."""
        part = Part(self.document.index, self.first, self.stop, self.is_last, self.failure, self._tables())
        self.first, self._tokens = self.stop, 0
        for rows in self._held.values():
            rows.clear()
        return part

    def _tables(self) -> dict[str, pa.Table]:
        if not self._held["segments"]:
            return {name: schema.empty_table() for name, schema in self._schemas.items()}
        tables = {}
        for name, rows in self._held.items():
            fields = zip(zip(*rows, strict=True), self._schemas[name], strict=True)
            arrays = [pa.array(column, field.type) for column, field in fields]
            tables[name] = pa.Table.from_arrays(arrays, schema=self._schemas[name])
        return tables | {"tokens": self._token_table()}

    def _segment(self, score: "Score", flops: Any, row: int) -> tuple[Any, ...]:
        cut = score.segment.cut
        learners = 1 if score.experts is None else int(score.experts.learners[:, row].sum())
        updates = learners * score.updates_of(row)
        return (
            self.document.index,
            cut.index,
            cut.start,
            score.segment.tokens[row],
            score.segment.bytes[row],
            score.sums[row],
            None if score.static_sums is None else score.static_sums[row],
            updates > 0,
            updates,
            *(flops.total, flops.forward, flops.activation, flops.weight, flops.update, flops.static),
        )

    def _timing(self, score: "Score") -> tuple[Any, ...]:
        # Documents scored together took their time together: each is given its share.
        shared = {part: seconds / len(score.segment.documents) for part, seconds in score.seconds.items()}
        return (
            self.document.index,
            score.segment.cut.index,
            sum(shared.values()),
            *(shared["scoring"], shared["learning"], shared["static"]),
        )

    def _experts(self, score: "Score", row: int) -> list[tuple[Any, ...]]:
        assert score.experts is not None, "only a mixture has them"
        columns, shares = score.segment.scored[row], score.experts.shares[:, row].tolist()
        nats = score.experts.nats[:, row, columns].astype(np.float64).sum(axis=1).tolist()
        index, tokens = score.segment.cut.index, score.segment.tokens[row]
        return [
            (self.document.index, index, expert, tokens, nats[expert], shares[expert]) for expert in range(len(nats))
        ]

    def _token_table(self) -> pa.Table:
        start, tokens = self._held["segments"][0][2], self._tokens
        said = {name: values[:tokens] for name, values in self._said.items()}
        static = said.get("static_nats")
        columns = [
            pa.array([self.document.index] * tokens, pa.int32()),
            pa.array(range(start, start + tokens), pa.int64()),
            pa.array([row[1] for row in self._held["segments"] for _ in range(row[3])], pa.int32()),
            pa.array(self.document.pieces(start, start + tokens), pa.string()),
            pa.array(said["nats"], pa.float32()),
            pa.nulls(tokens, pa.float32()) if static is None else pa.array(static, pa.float32()),
        ]
        if "expert_nats" in said:
            columns.append(pa.array(list(said["expert_nats"]), pa.list_(pa.float32())))
        return pa.Table.from_arrays(columns, schema=self._schemas["tokens"])


def _said_of_tokens(score: "Score") -> dict[str, np.ndarray]:
    """What was said of each token, by column: [D, S], of experts [D, S, E]."""
    said = {"nats": score.nats.cpu().numpy()}
    if score.static_nats is not None:
        said["static_nats"] = score.static_nats.cpu().numpy()
    if score.experts is not None:
        said["expert_nats"] = score.experts.nats.transpose(1, 2, 0)
    return said


def _describe(document: Document, failure: dict[str, Any] | None) -> dict[str, Any]:
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


def _failure(document: Document, pl_module: "DynamicEvaluation") -> dict[str, Any] | None:
    """Where and why learning went wrong, and whether the document was stopped for it."""
    index = document.index
    for stopped, found in ((True, pl_module.failed), (False, pl_module.unlearned)):
        if index in found:
            return {"segment": found[index], "reason": pl_module.reasons[index], "stopped": stopped}
    return None


def _describe_experts(pl_module: "DynamicEvaluation") -> list[dict[str, Any]]:
    static = [{"name": "static", "rule": None, "rate": None}] * pl_module.has_static_expert
    names = pl_module.expert_names[len(static) :]
    rules = [(type(rule).__name__, float(rule.defaults["lr"])) for rule in pl_module.optimizer_of_each_expert]
    return static + [
        {"name": name, "rule": rule, "rate": rate} for name, (rule, rate) in zip(names, rules, strict=True)
    ]


def peak_memory(device: torch.device) -> int:
    """The most memory held at a time, in bytes: the device's on CUDA, else the process's since its program began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What `getrusage` says on Linux may be of the process that started this one: it outlives the change of program.
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if own:
        return 1024 * int(own[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
