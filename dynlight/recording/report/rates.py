"""The experts of a mixture: what each scores alone, and which was best, static left out.

All experts read the same tokens, so they are compared document by document: what is hard about a document is hard for
each of them, and cancels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynlight.recording.report.ratios import bits_per_byte, nats_per_token
from dynlight.recording.report.tables import readable
from dynlight.recording.report.text import number

CONFIDENCE = 0.95


def compare(
    folder: Path, table: pd.DataFrame, names: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return a row for each expert, and which was best (see `experts_table` and `best_rate`).

    Args:
        folder: of the run.
        table: `documents_table(folder)`, the documents that count.
        names: of each expert a dictionary with `name`, `rule`, `rate` and `memory`.
    """
    path = folder / "experts.parquet"
    with readable(path):
        rows = pd.read_parquet(path, columns=["document", "expert", "tokens", "nats", "share"])
    rows = rows[rows.document.isin(table.document)]
    nats = nats_by_document(rows)
    experts = experts_table(rows, nats, table, names)
    return experts, best_rate(nats, table, experts)


def nats_by_document(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the nats of each expert (columns) on each document that has tokens, NaN where an expert failed on it."""
    sums = rows.groupby(["document", "expert"]).nats.agg(
        lambda nats: math.fsum(nats) if np.isfinite(nats).all() else math.nan
    )
    return sums.unstack()


def experts_table(
    rows: pd.DataFrame, nats: pd.DataFrame, table: pd.DataFrame, names: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return for each expert its name, rule and rate, what it scores alone, and its weight in the mixture.

    `share` is the mean of this weight over all tokens. An expert that failed on some document has no score that could be
    compared, and `failed` counts these documents.
    """
    tokens, size = sum(table.tokens.tolist()), sum(table.bytes.tolist())
    weights = (rows.share * rows.tokens).groupby(rows.expert).sum() / max(1, tokens)
    experts = []
    for expert, name in enumerate(names):
        alone = nats[expert] if expert in nats else pd.Series(dtype=float)
        total = math.fsum(alone) if len(alone) and alone.notna().all() else None
        scores = {
            "nats": total,
            "nats_per_token": nats_per_token(total, tokens),
            "bits_per_byte": bits_per_byte(total, size),
            "share": float(weights.get(expert, 0.0)),
            "failed": int(alone.isna().sum()),
        }
        experts.append(name | scores)
    return experts


def best_rate(nats: pd.DataFrame, table: pd.DataFrame, experts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return which expert that learns or remembers was best, by how much, and how sure that is; None where all have failed.

    Formula: the margin over the next best is m = Σ_d δ_d / Σ_d b_d, δ the difference on a document in bits and b its
    bytes; its interval is m ± t · √(n/(n−1) · Σ_d (δ_d − m b_d)²) / Σ_d b_d, with t the quantile of Student's distribution
    with n − 1 degrees of freedom, over n documents. It says whether the order of these two would hold on other such
    documents, not that the rate would be best on other text.
    """
    learned = [
        index for index, expert in enumerate(experts) if not _is_static(expert) and expert["bits_per_byte"] is not None
    ]
    if not learned:
        return None
    first, *others = sorted(learned, key=lambda index: experts[index]["bits_per_byte"])
    best = {key: experts[first][key] for key in ("name", "rule", "rate", "bits_per_byte")}
    if not others:
        return best | {"runner_up": None}
    bits = ((nats[others[0]] - nats[first]) / math.log(2)).to_numpy()
    margin, low, high = paired_margin(bits, table.set_index("document").bytes[nats.index].to_numpy())
    return best | {
        "runner_up": experts[others[0]]["name"],
        "margin_bits_per_byte": margin,
        "margin_low": low,
        "margin_high": high,
        "documents_better": int((bits > 0).sum()),
        "documents": len(bits),
    }


def paired_margin(bits: np.ndarray, size: np.ndarray) -> tuple[float, float | None, float | None]:
    """Return Σ bits / Σ bytes over documents, with the ends of its interval; None with a single document."""
    from scipy.special import stdtrit  # not scipy.stats, which takes half a second to load

    total, count = int(size.sum()), len(bits)
    margin = math.fsum(bits) / total
    if count < 2:
        return margin, None, None
    spread = math.sqrt(count / (count - 1) * float(((bits - margin * size) ** 2).sum())) / total
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * spread
    return margin, margin - reach, margin + reach


def _is_static(expert: dict[str, Any]) -> bool:
    return not expert["rule"] and not expert.get("memory")  # which runs of dynlight 0.1 don't tell of


def best_rate_sentence(best: dict[str, Any] | None) -> str:
    """Say which expert was best, by how much, and how sure that is.

    Args:
        best: as `best_rate` returns it.
    """
    if best is None:
        return "no expert but static read all documents to their end"
    if best["runner_up"] is None:
        return f"beside static, only {best['name']} read all documents to their end"
    margin = (
        f"{best['name']} was best, by {number(best['margin_bits_per_byte'])} bits per byte over {best['runner_up']}"
    )
    if best["margin_low"] is None:
        return f"{margin}; one document says nothing of how sure that is"
    return (
        f"{margin} (95%: {number(best['margin_low'])} to {number(best['margin_high'])}), on {best['documents_better']:,} "
        f"of {best['documents']:,} documents"
    )
