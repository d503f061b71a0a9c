"""Which weights are the best place to learn? (C9)"""

from collections.abc import Iterable

import pandas as pd
from matplotlib.figure import Figure

from experiments import pictures, results

BY = ["parameters"]


def name_of(parameters: str) -> str:
    """`mlp`, `blocks 1–2`, `all weights`."""
    name = results.short(parameters)
    if name == "All":
        return "all weights"
    names, _, blocks = name.removeprefix("Matching(names ").rstrip(")").partition(", blocks ")
    if not blocks:
        return names
    first, last = blocks.split()
    return f"block {first}" if first == last else f"blocks {first}–{last}"


def figure(rows: pd.DataFrame) -> Figure:
    """Gain over static of each choice, with its interval."""
    picture, axis = pictures.axes(height=4.2)
    for place, (name, middle, low, high) in enumerate(reversed(gains(rows))):
        axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=pictures.ADAPTED, capsize=3)
        axis.annotate(name, (0, place), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=8,
                      xycoords=("axes fraction", "data"))  # fmt: skip
    axis.set_yticks([])
    axis.axvline(0, color=pictures.STATIC, linewidth=0.8)
    pictures.label(axis, "bits per byte below static", "")
    return picture


def gains(rows: pd.DataFrame) -> list[tuple[str, float, float, float]]:
    """Of each choice its name and its gain over static with the ends of the interval."""
    found = []
    for parameters, own in rows.groupby("parameters", sort=False):
        middle, low, high = results.margin(own[own.role == "static"], own[own.role == "adapted"])
        found.append((name_of(parameters), middle, middle if low is None else low, middle if high is None else high))
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each choice beside its controls."""
    found = results.beside_controls(rows, BY)
    return found.assign(parameters=[name_of(parameters) for parameters in rows.parameters.unique()])


def verdict(rows: pd.DataFrame) -> str:
    """MLPs against the next best kind of weights in the blocks and against embeddings; middle blocks and pairs against outer ones."""
    adapted = {name_of(parameters): own for parameters, own in rows[rows.role == "adapted"].groupby("parameters")}
    of = {name: gain for name, gain, *_ in gains(rows)}

    def best(names: Iterable[str]) -> list[str]:
        return sorted(names, key=of.__getitem__, reverse=True)

    def ahead(better: str, worse: str) -> results.Margin:
        return results.margin(adapted[worse], adapted[better])

    def said(better: str, worse: str) -> str:
        return results.said(ahead(better, worse))

    kinds = best(("mlp", "self_attn", "q_proj", "norm"))
    blocks = best(name for name in of if name.startswith("block "))
    pairs = best(name for name in of if name.startswith("blocks "))
    outer = {f"block {block}" for block in (0, len(blocks) - 1)}
    outer |= {f"blocks {first}–{first + 1}" for first in (0, len(blocks) - 2)}
    inner_and_outer = [
        tuple(next(name for name in names if (name in outer) is is_outer) for is_outer in (False, True))
        for names in (blocks, pairs)
    ]
    claimed = [("mlp", next(name for name in kinds if name != "mlp")), ("mlp", "embed_tokens"), *inner_and_outer]
    word = results.word([results.is_above(ahead(*two)) for two in claimed])
    return (
        f"{word}: in the blocks {kinds[0]} is best, {said(*kinds[:2])} bits per byte ahead of {kinds[1]}; embed_tokens, which "
        f"is the output layer too, is {said('embed_tokens', kinds[0])} ahead of it; the best single block is "
        f"{blocks[0][6:]}, {said(*blocks[:2])} ahead of {blocks[1][6:]}; the best pair {pairs[0][7:]}, {said(*pairs[:2])} ahead "
        f"of {pairs[1][7:]}"
    )
