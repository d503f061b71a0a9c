"""Under a shift, does a short adapted context beat a long static one, and where does that end? (C5, C6)"""

import re

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

BY = ["model.pretrained", "context"]
RUNGS = {
    "general_3m": "no books",
    "books_little": "0.4M tokens of books",
    "books_more": "1.5M tokens of books",
    "books_third": "5M tokens of books",
}


def window_of(context: str) -> int:
    """Tokens in view: segment and memory."""
    segment, memory = map(int, re.findall(r"\d+", context))
    return segment + memory


def figure(rows: pd.DataFrame) -> Figure:
    """One panel a rung: loss against the context's length, static and adapted."""
    rungs = list(rows.groupby("model.pretrained", sort=False))
    picture, panels = pictures.axes(len(rungs), width=3.2, squeeze=False, sharey=True)
    for axis, (model, own) in zip(panels[0], rungs, strict=True):
        found = results.totals(own, ["context", "role"])
        found["window"] = found.context.map(window_of)
        found = found.sort_values("window")
        for role, color in (("static", pictures.STATIC), ("adapted", pictures.ADAPTED)):
            line = found[found.role == role]
            axis.plot(line.window, line.bits_per_byte, "o-", color=color, label=role)
        axis.set_xscale("log", base=2)
        pictures.label(axis, "tokens in view", title=RUNGS[results.short(model)])
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each rung and window beside its controls."""
    found = results.beside_controls(rows, BY)
    found["context"] = [window_of(context) for _, context in rows[BY].drop_duplicates().itertuples(index=False)]
    found = found.rename(columns={"model.pretrained": "model", "context": "window"})
    rungs = {rung: place for place, rung in enumerate(RUNGS)}
    return found.sort_values(["model", "window"], key=lambda own: own.map(rungs) if own.name == "model" else own)


def advantages(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of each rung and document: nats of static, in the window that is best for it, less those of the shortest adapted one.

    The rung is named with the window: `no books (1,024)`. The best window is chosen on the test itself, in favour of static.
    """
    rows = rows.assign(window=rows.context.map(window_of))
    found = {}
    shortest = rows.window.min()
    for model, own in rows.groupby("model.pretrained", sort=False):
        static, adapted = own[own.role == "static"], own[own.role == "adapted"]
        best = static.groupby("window").nats.sum().idxmin()
        long, short = (
            chosen.set_index("document")[["nats", "bytes"]]
            for chosen in (static[static.window == best], adapted[adapted.window == shortest])
        )
        name = f"{RUNGS[results.short(model)]} ({best:,})"
        found[name] = long.assign(nats=long.nats - short.nats).reset_index()
    return found


def verdict(rows: pd.DataFrame) -> str:
    """C5: the advantage on each rung; C6: by how much it shrinks from the first rung to the last."""
    found = list(advantages(rows).items())
    none = found[0][1].assign(nats=0.0)
    gained = {rung: results.margin(advantage, none) for rung, advantage in found}
    shrinks = results.margin(found[0][1], found[-1][1])
    word = results.word([*map(results.is_above, gained.values()), results.is_above(shrinks)])
    each = "; ".join(f"{rung}: {results.said(margin)}" for rung, margin in gained.items())
    return (
        f"{word}: 64 adapted tokens of context against the static window that is best of 64 to 1,024, bits per byte in favour of "
        f"adapting: {each}; from the first to the last it shrinks by {results.said(shrinks)}"
    )
