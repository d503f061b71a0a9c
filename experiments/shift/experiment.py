"""Under a shift, does a short adapted context beat a long static one, and where does that end? (C5, C6)"""

import itertools
import re

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

BY = ["model.pretrained", "context"]
RUNGS = {
    "general_3m": "no books",
    "books_little": "0.4M tokens of books",
    "books_more": "1.5M",
    "books_third": "5M, a third of them",
}


def window_of(context: str) -> int:
    """Tokens in view: segment and memory."""
    segment, memory = map(int, re.findall(r"\d+", context))
    return segment + memory


def figure(rows: pd.DataFrame) -> Figure:
    """One panel a rung: loss against the context's length, static and adapted."""
    rungs = list(rows.groupby("model.pretrained", sort=False))
    picture, panels = pictures.axes(len(rungs), width=3.2, squeeze=False)
    for axis, (model, own) in zip(panels[0], rungs, strict=True):
        found = results.totals(own, ["context", "role"])
        found["window"] = found.context.map(window_of)
        found = found.sort_values("window")
        for role, color in (("static", pictures.STATIC), ("adapted", pictures.ADAPTED)):
            line = found[found.role == role]
            axis.plot(line.window, line.bits_per_byte, "o-", color=color, label=role)
        axis.set_xscale("log", base=2)
        pictures.label(axis, "tokens in view", title=f"fine-tuned: {RUNGS[results.short(model)]}")
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each rung and window beside its controls."""
    found = results.beside_controls(rows, BY)
    found["context"] = [window_of(context) for _, context in rows[BY].drop_duplicates().itertuples(index=False)]
    found = found.rename(columns={"model.pretrained": "model", "context": "window"})
    rungs = {rung: place for place, rung in enumerate(RUNGS)}
    return found.sort_values(["model", "window"], key=lambda own: own.map(rungs) if own.name == "model" else own)


def short_against_long(rows: pd.DataFrame) -> dict[str, tuple[float, float | None, float | None]]:
    """Of each rung: by how much the shortest adapted context is better than the longest static one."""
    found = {}
    for model, own in rows.groupby("model.pretrained", sort=False):
        windows = own.context.map(window_of)
        short = own[(windows == windows.min()) & (own.role == "adapted")]
        long = own[(windows == windows.max()) & (own.role == "static")]
        found[str(model)] = results.margin(long, short)
    return found


def verdict(rows: pd.DataFrame) -> str:
    """C5 on the first rung, and whether the advantage shrinks from rung to rung."""
    found = short_against_long(rows)
    margins = [margin[0] for margin in found.values()]
    shrinks = all(later < earlier for earlier, later in itertools.pairwise(margins))
    word = "holds" if margins[0] > 0 and shrinks else "holds in part" if margins[0] > 0 or shrinks else "does not hold"
    each = "; ".join(f"{RUNGS[results.short(model)]}: {results.said(margin)}" for model, margin in found.items())
    return (
        f"{word}: 64 adapted tokens of context against 1,024 static ones, bits per byte in favour of adapting: {each}"
    )
