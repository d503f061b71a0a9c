"""The page of a run, report.html: one file that loads nothing, of a size that does not grow with the run."""

import math
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynlight.recording.report.drawing import BLUE
from dynlight.recording.report.mixture_pictures import pictures_of_experts
from dynlight.recording.report.pictures import pictures
from dynlight.recording.report.rates import best_rate_sentence
from dynlight.recording.report.ratios import ratio
from dynlight.recording.report.tables import Rows, read_run, readable
from dynlight.recording.report.templates import rendered

TABLE = 200  # documents in the table
BARS = 40  # documents in the bar chart
EXCERPT = 200  # tokens of each excerpt
SHADES = 7  # of a token's colour


def render(folder: Path, table: pd.DataFrame, summary: dict[str, Any]) -> str:
    """Return report.html of a run, made of the rows, the table with scores, and the summary."""
    rows = Rows(folder / "segments.parquet").keep(table.document[table.failed == ""])
    has_static, tokens, config = summary["static"] is not None, folder / "tokens.parquet", folder / "config.yaml"
    with readable(tokens):
        documents, limit = excerpts(tokens, table, has_static) if tokens.exists() else (None, 0)
    drawn = pictures(rows, has_static)
    if summary["experts"] and len(rows):
        drawn |= pictures_of_experts(folder / "experts.parquet", table, summary)
    work = [
        (label, 100 * (ratio(summary[name], summary["flops"]) or 0), colour)
        for name, label, colour in (
            ("forward_flops", "forward", BLUE),
            ("activation_flops", "backward through activations", "#7ba3d8"),
            ("weight_flops", "backward to weights", "#b9cfec"),
        )
    ]
    return rendered(
        Path(__file__).with_name("report.html.jinja"),
        run=dict.fromkeys(("device", "command", "versions")) | read_run(folder),
        summary=summary,
        static=summary["static"],
        table=table.head(TABLE).to_dict("records"),
        more=max(0, len(table) - TABLE),
        seconds=math.fsum(table.seconds[table.failed == ""]),
        times=ratio(summary["flops"], summary["static"]["flops"]) if has_static else None,
        work=work,
        pictures={name: markupsafe.Markup(svg) for name, svg in drawn.items()},
        best_rate=best_rate_sentence(summary["best_rate"]) if summary["experts"] else None,
        bars=bars(table) if has_static else None,
        documents=documents,
        limit=limit,
        shades=SHADES,
        config=config.read_text("utf-8", errors="replace") if config.exists() else None,
    )


def bars(table: pd.DataFrame) -> tuple[list[tuple], list[tuple], int]:
    """Place a bar for each document with a gain, largest first: name, gain, left and width in percent.

    Returns:
        The first bars, the last bars, and how many are left out between them.
    """
    table = table[table.gain.notna()].sort_values("gain", ascending=False, kind="stable")
    low, high = min(0, table.gain.min()), max(0, table.gain.max())
    scale = 100 / (high - low) if high > low else 0
    left, width = (table.gain.clip(upper=0) - low) * scale, table.gain.abs() * scale
    all_bars = list(zip(table.name, table.gain, left.round(2), width.round(2), strict=True))
    if len(all_bars) <= BARS:
        return all_bars, [], 0
    return all_bars[: BARS // 2], all_bars[-BARS // 2 :], len(all_bars) - BARS


def excerpts(path: Path, table: pd.DataFrame, has_static: bool) -> tuple[list[dict[str, Any]], float]:
    """Read the beginning, middle and end of the documents of largest, median and smallest gain, and shade each token.

    Without a static reference the documents are ranked by bits per byte, and the tokens shaded by nats.

    Returns:
        The documents, and the nats at which a shade is full.
    """
    with_text = pc.unique(pq.read_table(path, columns=["document"])["document"]).to_pylist()
    table = table[table.document.isin(with_text) & (table.failed == "")]
    table = table.sort_values("gain" if has_static else "adapted", ascending=False, kind="stable")
    ranks = {0: "largest", len(table) // 2: "median", len(table) - 1: "smallest"} if len(table) else {}
    documents: list[dict[str, Any]] = []
    for rank, which in ranks.items():
        in_document = ("document", "==", int(table.document.iloc[rank]))
        tokens = np.sort(pq.read_table(path, columns=["token"], filters=[in_document])["token"].to_numpy())
        spans = [tokens[:EXCERPT], tokens[(len(tokens) - EXCERPT) // 2 :][:EXCERPT], tokens[-EXCERPT:]]
        spans = spans if len(tokens) > 3 * EXCERPT else [tokens]
        texts = [_texts(path, [in_document, ("token", ">=", span[0]), ("token", "<=", span[-1])]) for span in spans]
        documents.append({"row": table.iloc[rank], "which": which, "parts": texts})
    excerpts_of_all = [excerpt for document in documents for excerpt in document["parts"]]
    for excerpt in excerpts_of_all:
        excerpt["value"] = (excerpt.static_nats - excerpt.nats if has_static else excerpt.nats).fillna(0)
    values = pd.concat([excerpt.value for excerpt in excerpts_of_all] or [pd.Series([0.0])])
    limit = max(0.1, round(float(values.abs().quantile(0.95)), 1))
    for excerpt in excerpts_of_all:
        excerpt["shade"] = (excerpt.value.abs() / limit * SHADES).clip(0, SHADES).round().astype(int)
        excerpt["hue"] = np.where(excerpt.value < 0, "worse", "better") if has_static else "plain"
    return documents, limit


def _texts(path: Path, filters: list[tuple]) -> pd.DataFrame:
    """Read the texts of the tokens that the filters let through, with tokens that share a character joined."""
    columns = ["token", "text", "nats", "static_nats"]
    tokens = pq.read_table(path, columns=columns, filters=filters).to_pandas().sort_values("token")
    tokens = tokens.astype({"nats": "float64", "static_nats": "float64"})
    # Of tokens that share a character only the first has text: the nats of the others are added to it.
    text_number = (tokens.text != "").cumsum()
    return tokens.groupby(text_number).agg(
        token=("token", "first"),
        last=("token", "last"),
        text=("text", "sum"),
        nats=("nats", "sum"),
        static_nats=("static_nats", "sum"),
    )
