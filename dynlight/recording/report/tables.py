"""The files of a run's folder as tables: its rows, run.json, and one row for each document."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynlight.errors import SettingError, require
from dynlight.recording.report.ratios import bits_per_byte, ratio

FLOPS = ["flops", "forward_flops", "activation_flops", "weight_flops", "update_flops", "static_flops"]
SECONDS = ["seconds", "scoring_seconds", "learning_seconds", "static_seconds"]
COUNTS = ["document", "tokens", "bytes", "words"]  # of a document's entry in run.json


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn pyarrow's error at a damaged parquet file into a SettingError that names the file."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise SettingError("folder", f"have a whole {path.name}", got=path.parent, advice=str(error)) from error


class Rows:
    """Rows of a parquet file sorted by document and segment, with one column in memory at a time.

    `names` are the columns that there are, `documents` those that have rows, `starts` the index of the first row of each
    of them, and `owner` says of each row whose it is, as an index into `documents`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with readable(path):
            self._file = pq.ParquetFile(path)
        self.names: list[str] = self._file.schema_arrow.names
        self._order = np.lexsort((self._read("segment"), self._read("document")))
        self._index()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)[self._order]

    def _read(self, name: str) -> np.ndarray:
        with readable(self._path):
            has_column = name in self.names
            require(has_column, "folder", f"have a column {name} in {self._path.name}", got=self._path.parent)
            column = self._file.read(columns=[name], use_threads=False)[name]  # threads take longer to start than this
            if name.endswith(("nats", "seconds")) or (name.endswith("flops") and column.null_count):
                return column.cast(pa.float64()).to_numpy()  # null becomes NaN
            return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()

    def _index(self) -> None:
        unique = np.unique(self["document"], return_index=True, return_inverse=True)
        self.documents, self.starts, self.owner = unique

    def keep(self, documents: Any) -> "Rows":
        """Leave out the rows of all other documents."""
        self._order = self._order[np.isin(self["document"], documents)]
        self._index()
        return self

    def sums(self, name: str) -> np.ndarray:
        """Sum a column for each of `documents`, exactly: int64, or fsum, which gives NaN if a value is not finite."""
        values = self[name]
        if not len(values):
            return values
        if values.dtype == np.int64:
            return np.add.reduceat(values, self.starts)
        of_documents = np.split(values, self.starts[1:])
        return np.array([math.fsum(own.tolist()) if np.isfinite(own).all() else math.nan for own in of_documents])

    def not_finite(self, name: str) -> dict[int, int]:
        """Map each document that has a value that is not finite to the first segment that has one."""
        bad = ~np.isfinite(self[name])
        if not bad.any():
            return {}
        documents, first = np.unique(self["document"][bad], return_index=True)
        return dict(zip(documents.tolist(), self["segment"][bad][first].tolist(), strict=True))


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; SettingError where the folder holds no run."""
    for name in ("run.json", "segments.parquet", "timings.parquet"):
        if not (folder / name).is_file():
            raise SettingError("folder", "be the folder of a run", got=folder, advice=f"it has no {name}")
    try:
        run = json.loads((folder / "run.json").read_text("utf-8"))
        # The name of a document's file need not be valid Unicode; the names in what is written must be.
        run = json.loads(json.dumps(run, ensure_ascii=False).encode("utf-8", "replace"))
        len(run["documents"])
    except (ValueError, TypeError, LookupError) as error:
        must = "have a run.json that is an object with a list of documents"
        raise SettingError("folder", must, got=folder, advice=repr(error)) from error
    return run


def documents_table(folder: str | Path) -> pd.DataFrame:
    """Return one row a document: the sums of documents.csv, FLOPs by kind, failures, seconds.

    A document counts if it was read whole. Where it failed, was not finished or has nats that are not finite, `failed`
    holds the reason (else ""), `failed_segment` the segment if one is to blame; its nats are NaN, its FLOPs and seconds
    what it cost up to there. `static_from` is the segment from which on the initial weights read it, as the learned ones
    had failed. Without a static reference `static_nats` is NaN.
    """
    folder = Path(folder)
    entries = read_run(folder)["documents"]
    table = _entries_table(folder, entries)
    rows, timings = Rows(folder / "segments.parquet"), Rows(folder / "timings.parquet")
    documents = table.document.tolist()
    unnamed = sorted(set(rows.documents.tolist()) - set(documents))
    must = "have a run.json with all documents of segments.parquet"
    require(not unnamed, "folder", must, got=folder, advice=f"run.json lacks documents {unnamed[:5]}")

    def sums(source: Rows, name: str) -> np.ndarray:
        of_documents = source.sums(name)
        known = dict(zip(source.documents.tolist(), of_documents.tolist(), strict=True))
        return np.array([known.get(document, 0) for document in documents], of_documents.dtype)

    of_rows = {name: sums(rows, name) for name in ("nats", "static_nats", "updates", *FLOPS)}
    table = pd.concat([table, pd.DataFrame(of_rows)], axis=1)
    has_static = np.isfinite(rows["static_nats"]).any()
    not_finite = (rows.not_finite("static_nats") if has_static else {}) | rows.not_finite("nats")
    scored = sums(rows, "tokens").tolist()
    failures = [_failure(entry, tokens, not_finite) for entry, tokens in zip(entries, scored, strict=True)]
    table["failed"] = pd.Series([reason for reason, _ in failures], dtype="str")
    table["failed_segment"] = pd.array([segment for _, segment in failures], dtype="Int64")
    static_from = [(entry.get("finished_static") or {}).get("segment") for entry in entries]
    table["static_from"] = pd.array(static_from, dtype="Int64")
    read_whole = table.failed == ""
    table["bytes"] = np.where(read_whole, sums(rows, "bytes"), table.bytes)
    table["nats"] = table.nats.where(read_whole)
    table["static_nats"] = table.static_nats.where(read_whole & has_static)
    for name in SECONDS:
        table[name] = sums(timings, name)
    if "teacher_nats" in rows.names:
        table["teacher_nats"], table["teacher_flops"] = (sums(rows, f"teacher_{kind}") for kind in ("nats", "flops"))
        table["teacher_seconds"] = sums(timings, "teacher_seconds")
    return table


def _entries_table(folder: Path, entries: list[dict[str, Any]]) -> pd.DataFrame:
    """The number, name and counts of each document of run.json."""
    try:
        table = pd.DataFrame(entries, columns=["document", "name", "tokens", "bytes", "words"])
        return table.astype(dict.fromkeys(COUNTS, "int64") | {"name": "str"})
    except ValueError as error:
        must = f"have a run.json with whole numbers {', '.join(COUNTS)} of each document"
        raise SettingError("folder", must, got=folder, advice=str(error)) from error


def _failure(entry: dict[str, Any], scored: int, not_finite: dict[int, int]) -> tuple[str, int | None]:
    """Why a document is in no sum, and the segment to blame if there is one; an empty reason if it was read whole.

    Args:
        entry: of the document, in run.json.
        scored: tokens.
        not_finite: the first segment whose nats are not finite, of the documents that have one.
    """
    if failed := entry.get("failed"):
        return failed["reason"], failed["segment"]
    if entry["document"] in not_finite:
        return "nats are not finite", not_finite[entry["document"]]
    if scored != entry["tokens"]:
        return f"{scored:,} of {entry['tokens']:,} tokens were scored", None
    return "", None


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Add to each document its bits per byte, adapted and static, and its gain, in bits per byte and in percent."""
    adapted, static = (bits_per_byte(table[name], table.bytes) for name in ("nats", "static_nats"))
    gain = static - adapted
    return table.assign(adapted=adapted, static=static, gain=gain, percent=ratio(100 * gain, static))
