"""What summary.json holds: a run's sums, ratios of these sums, and which documents failed."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from dynlight.recording.report import rates
from dynlight.recording.report.ratios import bits_per_byte, nats_per_token, ratio, word_perplexity
from dynlight.recording.report.tables import FLOPS, documents_table, read_run


def summarise(folder: str | Path, table: pd.DataFrame | None = None) -> dict[str, Any]:
    """Return what summary.json holds: sums over the documents that were read whole, their ratios, and which failed.

    `documents` counts those in the sums. `seconds` is the wall time of the whole run; those of scoring and learning are
    sums over documents. The gain is static − adapted: positive where learning helped. Without a reference `static` is
    None. `experts` and `best_rate` are those of a mixture (see `rates.py`), else None.

    Args:
        table: `documents_table(folder)`, where it is at hand already.
    """
    folder = Path(folder)
    run = read_run(folder)
    table = documents_table(folder) if table is None else table
    read_whole, failed = table[table.failed == ""], table[table.failed != ""]
    adapted, static = totals(read_whole, "nats"), static_totals(read_whole)
    gain, gain_percent = gain_of(adapted, static)
    experts, best = rates.compare(folder, read_whole, run["experts"]) if run.get("experts") else (None, None)
    return {
        "name": run.get("name"),
        "documents": len(read_whole),
        **adapted,
        "updates": sum(read_whole.updates.tolist()),
        **{name: flops_of(read_whole[name]) for name in FLOPS if name != "static_flops"},
        "seconds": run.get("seconds"),
        "scoring_seconds": math.fsum(read_whole.scoring_seconds),
        "learning_seconds": math.fsum(read_whole.learning_seconds),
        "tokens_per_second": ratio(adapted["tokens"], run.get("seconds")),
        **{name: run.get(name) for name in ("peak_memory_bytes", "learned_parameters", "parameters", "protocol")},
        "gain_bits_per_byte": gain,
        "gain_percent": gain_percent,
        "static": static,
        "teacher": _teacher(read_whole),
        "experts": experts,
        "best_rate": best,
        "failed": _failed(failed),
        "finished_static": [
            {"document": entry["document"], "name": entry["name"]} | entry["finished_static"]
            for entry in run["documents"]
            if entry.get("finished_static")
        ],
    }


def totals(table: pd.DataFrame, nats: str) -> dict[str, Any]:
    """Sum over documents, then divide: a ratio of sums, never a mean of ratios."""
    tokens, size, words = (sum(table[name].tolist()) for name in ("tokens", "bytes", "words"))
    total = math.fsum(table[nats])
    return {
        "tokens": tokens,
        "bytes": size,
        "words": words,
        "nats": total,
        "nats_per_token": nats_per_token(total, tokens),
        "bits_per_byte": bits_per_byte(total, size),
        "word_perplexity": word_perplexity(total, words),
    }


def flops_of(column: pd.Series) -> int | None:
    """The sum, exactly; None where FLOPs could not be counted."""
    return None if column.isna().any() else sum(column.tolist())


def static_totals(table: pd.DataFrame) -> dict[str, Any] | None:
    """The totals and the cost of the static reference; None in a run without one."""
    if not len(table) or table.static_nats.isna().any():
        return None
    cost = {"flops": flops_of(table.static_flops), "seconds": math.fsum(table.static_seconds)}
    return totals(table, "static_nats") | cost


def _teacher(table: pd.DataFrame) -> dict[str, Any] | None:
    """The totals and the cost of the teacher; None in a run without one."""
    if "teacher_nats" not in table or not len(table):
        return None
    cost = {"flops": flops_of(table.teacher_flops), "seconds": math.fsum(table.teacher_seconds)}
    return totals(table, "teacher_nats") | cost


def gain_of(adapted: dict[str, Any], static: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """Static − adapted in bits per byte, and in percent of static; None without a reference or without bytes."""
    if static is None or adapted["bits_per_byte"] is None:
        return None, None
    gain = static["bits_per_byte"] - adapted["bits_per_byte"]
    return gain, ratio(100 * gain, static["bits_per_byte"])


def _failed(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The documents in no sum, each with the segment to blame (None if there is none) and the reason."""
    failures = zip(*(table[name].tolist() for name in ("document", "name", "failed_segment", "failed")), strict=True)
    return [
        {"document": document, "name": name, "segment": None if pd.isna(segment) else segment, "reason": reason}
        for document, name, segment, reason in failures
    ]
