"""Does memory do as well as overlapping windows, for how much less compute? (C1)"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

BY = ["context"]
SAME = 0.01  # bits per byte: losses closer than this pass for the same


def figure(rows: pd.DataFrame) -> Figure:
    """Loss against FLOPs and against seconds, both schemes, adapted and static."""
    picture, panels = pictures.axes(2, sharey=True)
    found = results.totals(rows, [*BY, "role"])
    for column, unit, factor, axis in zip(
        ("flops_per_token", "seconds_per_token"), ("MFLOPs", "ms"), (1e-6, 1e3), panels, strict=True
    ):
        for scheme, color in zip(("TransformerXL", "Overlapping"), pictures.OTHER, strict=False):
            for role, line, fill in (("adapted", "o-", color), ("static", "o:", "white")):
                own = found[found.context.str.contains(scheme) & (found.role == role)]
                axis.plot(
                    factor * own[column], own.bits_per_byte, line, color=color, mfc=fill, label=f"{scheme}, {role}"
                )
        pictures.label(axis, f"{unit} per token")
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each point beside its controls."""
    return results.beside_controls(rows, BY)


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """For each window: how much lower memory's loss is, and how many times the FLOPs and seconds overlapping takes."""
    lines = []
    adapted = rows[rows.role == "adapted"]
    of = {results.short(context): own for context, own in adapted.groupby("context", sort=False)}
    for name, own in of.items():
        if not name.startswith("Overlapping"):
            continue
        segment, window = (int(part.split()[-1]) for part in name.rstrip(")").split(", "))
        memory = of.get(f"TransformerXL(segment {segment}, memory {window - segment})")
        if memory is not None:
            lines.append(
                {
                    "segment": segment,
                    "window": window,
                    "memory better by": results.margin(own, memory),
                    "FLOPs": round(own.flops.sum() / memory.flops.sum(), 2),
                    "seconds": round(own.seconds.sum() / memory.seconds.sum(), 2),
                }
            )
    return pd.DataFrame(lines)


def verdict(rows: pd.DataFrame) -> str:
    """Memory against overlapping, window for window: whether it does better, or less than SAME worse."""
    found = pairs(rows)
    word = results.word([results.is_above(better, -SAME) for better in found["memory better by"]])
    each = "; ".join(
        f"window {window}: {results.said(better)} bits per byte in memory's favour, {flops}× the FLOPs and {seconds}× the seconds "
        "for overlapping"
        for _, window, better, flops, seconds in found.itertuples(index=False)
    )
    return f"{word}: {each}"
