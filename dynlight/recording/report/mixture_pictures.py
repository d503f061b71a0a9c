"""The pictures of a mixture: bits per byte against rate, and the weight of each expert by position."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dynlight.recording.report.drawing import BLUE, GREY, POINTS, SOFT, count_axis, figure_with_axes, style, svg_of
from dynlight.recording.report.tables import readable
from dynlight.recording.report.text import number

RULES = ("#1f5fb4", "#c65d07", "#2e8b57", "#8250a8")  # a colour for each rule, in turn
MEMORIES = ("#9a7b1c", "#a0415d", "#3d7f7f")  # a colour for each kind of memory
STATIC = "#c9ced5"


def pictures_of_experts(path: Path, table: pd.DataFrame, summary: dict[str, Any]) -> dict[str, str]:
    """Draw bits per byte against rate, and each expert's weight in the mixture by position in the document, as SVG.

    Args:
        path: of experts.parquet.
        table: `documents_table` of the run.
        summary: of the run, with experts.
    """
    with style():
        drawn = {"shares": _draw_weights(*shares_by_position(path, table), summary)}
        if sum(bool(expert["rule"]) for expert in summary["experts"]) > 1:
            drawn["rates"] = _draw_rates(summary)
        return {name: svg_of(figure) for name, figure in drawn.items()}


def shares_by_position(path: Path, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return each expert's mean weight over the documents that reach a position.

    Returns:
        starts: int64 [positions], the first token of each segment.
        weights: float64 [experts, positions].
    """
    with readable(path):
        rows = pd.read_parquet(path, columns=["document", "segment", "expert", "tokens", "share"])
    rows = rows[rows.document.isin(table.document[table.failed == ""])]
    weights = rows.groupby(["expert", "segment"]).share.mean().unstack()
    segment = int(rows.tokens.max())
    return weights.columns.to_numpy() * segment, weights.to_numpy()


def _draw_rates(summary: dict[str, Any]) -> Figure:
    figure, (axes,) = figure_with_axes(3.2)
    learned = pd.DataFrame([expert for expert in summary["experts"] if expert["rule"]])
    lines = [("mixture", summary["bits_per_byte"], BLUE)]
    if summary["static"]:
        lines.append(("static", summary["static"]["bits_per_byte"], GREY))
    for name, value, colour in lines:
        axes.axhline(value, color=colour, linewidth=1.4)
        axes.annotate(f"{name} {number(value)}", (1, value), xycoords=("axes fraction", "data"),
                      xytext=(9, 0), textcoords="offset points", va="center", color=colour)  # fmt: skip
    scored = learned[learned.bits_per_byte.notna()]
    for colour, (name, rule) in zip(RULES * len(scored), scored.groupby("rule", sort=False), strict=False):
        axes.plot(rule.rate, rule.bits_per_byte.astype(float), "o-", color=colour, markersize=4.5, label=name)
    failed = learned[learned.bits_per_byte.isna()]
    for rate in failed.rate:
        axes.annotate("failed", (rate, 1), xycoords=("data", "axes fraction"), ha="center", va="top", color=SOFT)
    if positive := [rate for rate in learned.rate if rate > 0]:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.6, max(positive) * 1.6)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, loc="upper right", labelcolor=SOFT)
    axes.set_title("bits per byte of each rate alone")
    axes.set_xlabel("learning rate")
    return figure


def _draw_weights(starts: np.ndarray, weights: np.ndarray, summary: dict[str, Any]) -> Figure:
    figure, (axes,) = figure_with_axes(3.4)
    names = [_short(expert["name"]) for expert in summary["experts"]]
    places = np.linspace(0, len(starts) - 1, min(POINTS, len(starts))).round().astype(int)
    colours = expert_colours(summary["experts"])
    axes.stackplot(starts[places], weights[:, places], colors=colours, linewidth=0)
    middle = np.cumsum(weights[:, -1]) - weights[:, -1] / 2
    for name, height, weight in zip(names, middle, weights[:, -1], strict=True):
        if weight > 0.05:  # there is no room for the names of others, which are in the table
            axes.annotate(name, (starts[-1], height), xytext=(9, 0), textcoords="offset points",
                          va="center", color=SOFT, fontsize=8, annotation_clip=False)  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xlim(starts[0], max(starts[-1], 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_title("weight in the mixture, mean over documents")
    count_axis(axes, "token of the document", logarithmic=False)
    return figure


def expert_colours(experts: list[dict[str, Any]]) -> list[str]:
    """Give the static model grey, each rule a colour, the darker the higher the rate, and each kind of memory one."""
    rules = list(dict.fromkeys(expert["rule"] for expert in experts if expert["rule"]))
    memories = [_kind(expert) for expert in experts if expert.get("memory")]
    kinds = list(dict.fromkeys(memories))
    of_kinds: Counter[str] = Counter()
    colours = []
    for expert in experts:
        if expert["rule"]:
            rates = [other["rate"] for other in experts if other["rule"] == expert["rule"]]
            colour = RULES[rules.index(expert["rule"]) % len(RULES)]
            colours.append(_shade(colour, (rates.index(expert["rate"]) + 1) / len(rates)))
        elif expert.get("memory"):
            kind = _kind(expert)
            of_kinds[kind] += 1
            colour = MEMORIES[kinds.index(kind) % len(MEMORIES)]
            colours.append(_shade(colour, of_kinds[kind] / memories.count(kind)))
        else:
            colours.append(STATIC)
    return colours


def _kind(expert: dict[str, Any]) -> str:
    """What a memory is, without its settings."""
    return str(expert["memory"]).partition("(")[0]


def _short(name: str) -> str:
    """An expert's name without its settings where it has a base, too: `n-grams over Adam`."""
    parts = name.split(" over ")
    return name if len(parts) == 1 else " over ".join(part.partition("(")[0] for part in parts)


def _shade(colour: str, depth: float) -> str:
    """A colour at a depth from 0, the lightest, to 1."""
    base = np.array(matplotlib.colors.to_rgb(colour))
    return str(matplotlib.colors.to_hex(tuple(1 - (1 - base) * (0.25 + 0.75 * depth))))
