"""A run as it is compared: its documents, and what all or some of them come to."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dynlight.errors import SettingError, require
from dynlight.recording.comparison.settings import read_settings
from dynlight.recording.report.ratios import ratio
from dynlight.recording.report.summary import flops_of, gain_of, static_totals, totals
from dynlight.recording.report.tables import documents_table, read_run


class Scores(NamedTuple):
    """What documents of a run come to: bits per byte, gain in percent of static, FLOPs, seconds; None where unknown.

    `flops` and `seconds` are with those of a teacher, if there is one. `seconds` are those of scoring and learning, `static_seconds` those of the reference, which come on top; a run in which
    nothing learns has none, as it is its own.
    """

    documents: int
    tokens: int
    adapted: float | None
    static: float | None
    percent: float | None
    flops: int | None
    static_flops: int | None
    times: float | None  # flops / static_flops
    seconds: float
    static_seconds: float | None


@dataclass(frozen=True)
class Run:
    """A run's files, as far as a comparison asks them.

    Args:
        name: by which the comparison calls it.
        folder: of the run.
        described: what run.json holds.
        settings: of config.yaml and run.json, by name (see `read_settings`).
        receipt: `hashes` and `files` of receipt.json, as far as there are.
        documents: `documents_table` by name, those that were read whole.
        failed: how many were not.
    """

    name: str
    folder: Path
    described: dict[str, Any]
    settings: dict[str, Any]
    receipt: dict[str, Any]
    documents: pd.DataFrame
    failed: int

    @property
    def has_static(self) -> bool:
        """Whether a reference was read beside it."""
        return len(self.documents) > 0 and not self.documents.static_nats.isna().any()

    def hash(self, what: str) -> str | None:
        """SHA-256 of the run's `model`, `tokenizer` or `data`; None where its receipt does not tell."""
        return self.receipt["hashes"].get(what)

    @cached_property
    def scores(self) -> Scores:
        """What all its documents come to."""
        return scores_of(self.documents)


def scores_of(table: pd.DataFrame) -> Scores:
    """Return what documents come to, of a table as in `Run.documents`."""
    adapted, static = totals(table, "nats"), static_totals(table)
    flops, static_flops = flops_of(_with(table, "flops")), static["flops"] if static else None
    is_own = static_flops == 0  # where nothing learns the run is its own reference, which costs nothing on top
    return Scores(
        documents=len(table),
        tokens=adapted["tokens"],
        adapted=adapted["bits_per_byte"],
        static=static["bits_per_byte"] if static else None,
        percent=gain_of(adapted, static)[1],
        flops=flops,
        static_flops=None if is_own else static_flops,
        times=1.0 if is_own else ratio(flops, static_flops),
        seconds=math.fsum([*table.scoring_seconds, *table.learning_seconds, *table.get("teacher_seconds", [])]),
        static_seconds=static["seconds"] if static and not is_own else None,
    )


def _with(table: pd.DataFrame, cost: str) -> Any:
    """A cost of each document, with that of a teacher."""
    return table[cost] + table[f"teacher_{cost}"] if f"teacher_{cost}" in table else table[cost]


def read(folder: Path, name: str) -> Run:
    """Read a run; SettingError where its files are damaged."""
    described, table = read_run(folder), documents_table(folder)
    named = all({"name", "bytes"} <= entry.keys() for entry in described["documents"])
    require(named, "folder", "have a run.json that names each document", got=folder)
    require(table.name.is_unique, "folder", "have a run.json that names each document once", got=folder)
    whole = table[table.failed == ""].set_index("name", drop=False)
    settings, receipt = read_settings(folder, described), _read_receipt(folder)
    return Run(name, folder, described, settings, receipt, whole, len(table) - len(whole))


def _read_receipt(folder: Path) -> dict[str, Any]:
    path = folder / "receipt.json"
    try:
        receipt = json.loads(path.read_bytes()) if path.exists() else {}
        return {name: dict(receipt.get(name) or {}) for name in ("hashes", "files")}
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError("folder", "have a whole receipt.json", got=folder, advice=repr(error)) from error
