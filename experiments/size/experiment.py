"""Can a small adapted model match a larger static one? (C7)"""

import itertools

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

BY = ["model.pretrained"]
WEIGHTS = {"general_1m": 1.1e6, "general_3m": 3.4e6, "general_8m": 7.5e6}


def figure(rows: pd.DataFrame) -> Figure:
    """Loss against weights and against FLOPs, static and adapted."""
    picture, (left, right) = pictures.axes(2, sharey=True)
    found = results.totals(rows, [*BY, "role"])
    found["weights"] = found[BY[0]].map(lambda model: WEIGHTS[results.short(model)])
    for role, color in (("static", pictures.STATIC), ("adapted", pictures.ADAPTED)):
        own = found[found.role == role]
        left.plot(own.weights / 1e6, own.bits_per_byte, "o-", color=color, label=role)
        right.plot(own.flops_per_token / 1e6, own.bits_per_byte, "o-", color=color, label=role)
    pictures.label(left, "million weights")
    pictures.label(right, "MFLOPs per token")
    return picture


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each size beside its controls."""
    return results.beside_controls(rows, BY)


def verdict(rows: pd.DataFrame) -> str:
    """Each adapted model against each larger static one."""
    sizes = {results.short(model): own for model, own in rows.groupby(BY[0], sort=False)}
    names = list(sizes)
    told: list[str] = []
    holds: list[bool | None] = []
    for small, large in itertools.combinations(names, 2):
        adapted, static = sizes[small], sizes[large]
        margin = results.margin(static[static.role == "static"], adapted[adapted.role == "adapted"])
        holds.append(results.is_above(margin))
        told.append(f"{small} adapted against {large} static: {results.said(margin)}")
    return f"{results.word(holds)}: bits per byte in favour of the small adapted model: {'; '.join(told)}"
