"""Rows: the columns of a run's parquet files, and the rows of a document that are not on disk yet."""

import math
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
import pyarrow as pa

from dynlight.documents.document import Document
from dynlight.learning.finished import Failure
from dynlight.learning.flops import Flops
from dynlight.learning.score import Score
from dynlight.recording.pieces import BUFFERED, Piece

_KEY = [("document", pa.int32()), ("segment", pa.int32())]
SCHEMAS = {
    "segments": pa.schema(
        _KEY
        + [("start", pa.int64()), ("tokens", pa.int32()), ("bytes", pa.int64())]
        + [("nats", pa.float64()), ("static_nats", pa.float64())]
        + [("learned", pa.bool_()), ("updates", pa.int32())]
        + [(f"{kind}flops", pa.int64()) for kind in ("", "forward_", "activation_", "weight_", "update_", "static_")]
    ),
    "timings": pa.schema(
        _KEY + [(f"{kind}seconds", pa.float64()) for kind in ("", "scoring_", "learning_", "static_")]
    ),
    "tokens": pa.schema(
        [("document", pa.int32()), ("token", pa.int64()), ("segment", pa.int32()), ("text", pa.string())]
        + [("nats", pa.float32()), ("static_nats", pa.float32())]
    ),
}
# What a mixture has besides: the nats of each expert, for each token and for each segment.
MIXTURE_SCHEMAS = {
    "tokens": SCHEMAS["tokens"].append(pa.field("expert_nats", pa.list_(pa.float32()))),
    "experts": pa.schema(
        [("document", pa.int32()), ("segment", pa.int32()), ("expert", pa.int16()), ("tokens", pa.int32())]
        + [("nats", pa.float64()), ("share", pa.float64())]
    ),
}


# What a teacher has besides.
_TEACHER = {
    "segments": [("teacher_nats", pa.float64()), ("teacher_flops", pa.int64())],
    "timings": [("teacher_seconds", pa.float64())],
    "tokens": [("teacher_nats", pa.float32())],
}


def schemas(is_mixed: bool, has_teacher: bool) -> dict[str, pa.Schema]:
    """The columns of each file of a run."""
    found = SCHEMAS | (MIXTURE_SCHEMAS if is_mixed else {})
    if has_teacher:
        found |= {
            name: pa.schema([*found[name], *map(pa.field, *zip(*more, strict=True))]) for name, more in _TEACHER.items()
        }
    return found


class BufferedRows:
    """The rows of one document that are not on disk yet."""

    def __init__(self, document: Document, first: int, schemas: dict[str, pa.Schema]) -> None:
        self.document = document
        self._schemas = schemas
        self.first = self.stop = first  # the rows are those of the segments first … stop − 1
        self.is_last = False
        self.failure: Failure | None = None
        self._buffered: dict[str, list[tuple[Any, ...]]] = {name: [] for name in schemas if name != "tokens"}
        self._tokens = 0  # buffered: so far each array of `_of_tokens` is filled
        self._of_tokens: dict[str, np.ndarray] = {}  # column → float32 [room, …]

    def add(
        self, score: Score, of_tokens: dict[str, np.ndarray], flops: Flops, teacher_flops: float | None, row: int
    ) -> None:
        """Buffers the score of one row of a segment; `of_tokens` holds, by column, nats of each token [D, S] or [D, S, E]."""
        cut, columns = score.segment.cut, score.segment.scored[row]
        taught = [] if score.teacher_sums is None else [score.teacher_sums[row], _known(teacher_flops)]
        self._buffered["segments"].append((*self._segment(score, flops, row), *taught))
        self._buffered["timings"].append(self._timing(score))
        if score.experts is not None:
            self._buffered["experts"] += self._experts(score, row)
        stop = self._tokens + score.segment.tokens[row]
        for name, values in of_tokens.items():
            if name not in self._of_tokens:
                room = min(BUFFERED * values.shape[1], len(self.document) - cut.start)
                self._of_tokens[name] = np.empty((room, *values.shape[2:]), np.float32)
            # Copied into one array: an array for each segment would fragment the process's memory.
            self._of_tokens[name][self._tokens : stop] = values[row, columns]
        self._tokens, self.stop = stop, cut.index + 1

    def take(self) -> Piece:
        """The buffered rows as a piece; the buffer is empty afterwards."""
        failure = asdict(self.failure) if self.failure is not None else None
        piece = Piece(self.document.index, self.first, self.stop, self.is_last, failure, self._tables())
        self.first, self._tokens = self.stop, 0
        for rows in self._buffered.values():
            rows.clear()
        return piece

    def _tables(self) -> dict[str, pa.Table]:
        if not self._buffered["segments"]:
            return {name: schema.empty_table() for name, schema in self._schemas.items()}
        tables = {}
        for name, rows in self._buffered.items():
            fields = zip(zip(*rows, strict=True), self._schemas[name], strict=True)
            arrays = [pa.array(column, field.type) for column, field in fields]
            tables[name] = pa.Table.from_arrays(arrays, schema=self._schemas[name])
        return tables | {"tokens": self._token_table()}

    def _segment(self, score: Score, flops: Flops, row: int) -> tuple[Any, ...]:
        cut = score.segment.cut
        updates = sum(score.updates_of(row))
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
            *map(_known, (flops.total, *astuple(flops))),
        )

    def _timing(self, score: Score) -> tuple[Any, ...]:
        # The documents of a wave are scored together: the seconds are divided evenly among them.
        seconds = {kind: total / len(score.segment.documents) for kind, total in score.seconds.items()}
        return (
            self.document.index,
            score.segment.cut.index,
            sum(seconds.values()),
            *(seconds.get(kind, 0.0) for kind in ("scoring", "learning", "static")),
            *([] if score.teacher_nats is None else [seconds.get("teacher", 0.0)]),
        )

    def _experts(self, score: Score, row: int) -> list[tuple[Any, ...]]:
        assert score.experts is not None, "only a mixture has them"
        columns, weights = score.segment.scored[row], score.experts.weights[:, row].tolist()
        nats = score.experts.nats[:, row, columns].astype(np.float64).sum(axis=1).tolist()
        index, tokens = score.segment.cut.index, score.segment.tokens[row]
        return [
            (self.document.index, index, expert, tokens, nats[expert], weights[expert]) for expert in range(len(nats))
        ]

    def _token_table(self) -> pa.Table:
        start, tokens = self._buffered["segments"][0][2], self._tokens
        of_tokens = {name: values[:tokens] for name, values in self._of_tokens.items()}
        static = of_tokens.get("static_nats")
        columns = [
            pa.array([self.document.index] * tokens, pa.int32()),
            pa.array(range(start, start + tokens), pa.int64()),
            pa.array([row[1] for row in self._buffered["segments"] for _ in range(row[3])], pa.int32()),
            pa.array(self.document.pieces(start, start + tokens), pa.string()),
            pa.array(of_tokens["nats"], pa.float32()),
            pa.nulls(tokens, pa.float32()) if static is None else pa.array(static, pa.float32()),
        ]
        if "expert_nats" in of_tokens:
            columns.append(pa.array(list(of_tokens["expert_nats"]), pa.list_(pa.float32())))
        if "teacher_nats" in of_tokens:
            columns.append(pa.array(of_tokens["teacher_nats"], pa.float32()))
        return pa.Table.from_arrays(columns, schema=self._schemas["tokens"])


def _known(flops: float | None) -> float | None:
    """FLOPs, or null where they are not known."""
    return None if flops is None or math.isnan(flops) else flops


def columns_of_tokens(score: Score) -> dict[str, np.ndarray]:
    """The nats of each token, by column of tokens.parquet: [D, S], of experts [D, S, E]."""
    columns = {"nats": score.nats.numpy()}
    if score.static_nats is not None:
        columns["static_nats"] = score.static_nats.numpy()
    if score.teacher_nats is not None:
        columns["teacher_nats"] = score.teacher_nats.numpy()
    if score.experts is not None:
        columns["expert_nats"] = score.experts.nats.transpose(1, 2, 0)
    return columns
