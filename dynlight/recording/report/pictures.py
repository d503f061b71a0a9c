"""The pictures of every run: bits per byte over tokens and over FLOPs, and gain by position in the document."""

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dynlight.recording.report.drawing import (
    BLUE,
    GREY,
    POINTS,
    RULE,
    SOFT,
    count_axis,
    end_labels,
    figure_with_axes,
    style,
    svg_of,
)
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.tables import Rows
from dynlight.recording.report.text import number, si


class Curve(NamedTuple):
    """A curve of bits per byte: of the static reference, or with learning."""

    name: str
    nats: str  # the column of the rows with its nats
    flops: str  # the column of the rows with its FLOPs
    colour: str


def pictures(rows: Rows, has_static: bool) -> dict[str, str]:
    """Draw running bits per byte over tokens and over FLOPs, and gain by position, as SVG; nothing without rows."""
    if not len(rows):
        return {}
    curves = [Curve("static", "static_nats", "static_flops", GREY)] if has_static else []
    curves.append(Curve("adapted" if has_static else "", "nats", "flops", BLUE))
    tokens = np.cumsum(rows["tokens"])
    ends = tokens[np.append(rows.starts[1:], len(rows)) - 1]
    # Running sums at POINTS places of the stream: a picture does not grow with the run.
    marks = np.unique(np.searchsorted(tokens, np.linspace(0, tokens[-1], POINTS + 1)[1:]))
    names = ["bytes", *(name for curve in curves for name in (curve.nats, curve.flops))]
    sums = {name: np.cumsum(rows[name])[marks].astype(float) for name in names} | {"tokens": tokens[marks]}
    with style():
        drawn = {"tokens": _draw_tokens(sums, curves, ends)}
        if all(np.isfinite(sums[curve.flops]).all() for curve in curves):  # else they could not be counted
            drawn["flops"] = _draw_flops(sums, curves)
        if has_static:
            drawn["position"] = _draw_position(*gain_by_position(rows))
        return {name: svg_of(figure) for name, figure in drawn.items()}


def gain_by_position(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return how fast the model adapts: static − adapted in bits per byte, by token position.

    Returns:
        edges: int64 [bins + 1], in tokens: the first bin is one segment, and each further edge the first multiple of a
            segment that is 1.5 times the edge before; the last edge is the end of the longest document.
        gains: float64 [documents, bins], NaN where a document does not reach.
    """
    start, tokens = rows["start"], rows["tokens"]
    segment, end = int(tokens.max()), int((start + tokens).max())
    edges = [0, segment]
    while edges[-1] < end:
        edges.append(segment * math.ceil(1.5 * edges[-1] / segment))
    shape = (len(rows.documents), len(edges) - 1)
    place = rows.owner * shape[1] + np.searchsorted(edges, start, "right") - 1
    sums = [np.bincount(place, of, math.prod(shape)) for of in (rows["static_nats"] - rows["nats"], rows["bytes"])]
    return np.array([*edges[:-1], end]), bits_per_byte(*sums).reshape(shape)


def _draw_tokens(sums: dict[str, np.ndarray], curves: list[Curve], ends: np.ndarray) -> Figure:
    figure, (top, bottom) = figure_with_axes(4.7, 2, (1.25, 1))
    tokens = sums["tokens"]
    reach = max(2, len(tokens) // 50)
    places = np.arange(1, len(tokens) + 1)
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach, len(tokens))
    size = np.append(0, sums["bytes"])
    last = []
    for curve in curves:
        nats = np.append(0, sums[curve.nats])
        running = bits_per_byte(nats[1:], size[1:])
        around = bits_per_byte(nats[high] - nats[low], size[high] - size[low])
        top.plot(tokens, running, color=curve.colour)
        bottom.plot(tokens, around, color=curve.colour, linewidth=1.2)
        last.append((tokens[-1], running[-1], curve.name, curve.colour))
    # The first few tokens may lie far off; they would squeeze all that follows.
    steady = np.concatenate([np.asarray(line.get_ydata())[len(tokens) // 40 :] for line in top.lines])
    margin = 0.08 * np.nanmax(steady) - 0.08 * np.nanmin(steady) + 0.01
    top.set_ylim(np.nanmin(steady) - margin, np.nanmax(steady) + margin)
    end_labels(top, last)
    for axes in (top, bottom) if len(ends) <= 60 else ():
        axes.vlines(ends, 0, 1, transform=axes.get_xaxis_transform(), color="#d5dae0", linewidth=0.7, zorder=0.5)
    top.set_title("bits per byte, of all tokens so far")
    bottom.set_title(f"bits per byte, of about {si(2 * reach * tokens[-1] / len(tokens), form='.2g')} tokens around")
    bottom.set_xlim(0, tokens[-1])
    count_axis(bottom, "tokens read", logarithmic=False)
    return figure


def _draw_flops(sums: dict[str, np.ndarray], curves: list[Curve]) -> Figure:
    figure, (axes,) = figure_with_axes(3.0)
    skip, last = len(sums["tokens"]) // 40, []
    for curve in curves:
        flops, running = sums[curve.flops], bits_per_byte(sums[curve.nats], sums["bytes"])
        axes.plot(flops[skip:], running[skip:], color=curve.colour)
        last.append((flops[-1], running[-1], curve.name, curve.colour))
    end_labels(axes, last)
    axes.set_title("bits per byte, of all tokens so far")
    count_axis(axes, "FLOPs spent", logarithmic=all(end[0] > 0 for end in last))
    return figure


def _draw_position(edges: np.ndarray, gains: np.ndarray) -> Figure:
    figure, (axes, strip) = figure_with_axes(3.7, 2, (5, 1))
    counts = np.isfinite(gains).sum(axis=0)
    reached = counts > 0
    middle, left = (edges[:-1] + edges[1:]) / 2, np.maximum(edges[:-1], edges[1] / 3)  # a logarithm has no zero
    strip.bar(left[reached], counts[reached], (edges[1:] - left)[reached], align="edge", color=RULE, edgecolor="white")
    many = (2 * counts >= counts.max()) & reached
    mean = np.array([np.nanmean(gains[:, place]) if reached[place] else np.nan for place in range(len(reached))])
    low, high = np.nanpercentile(gains[:, many], (25, 75), axis=0)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.fill_between(middle[many], low, high, color=BLUE, alpha=0.14, linewidth=0)
    axes.plot(middle[reached], mean[reached], "o-", color=BLUE, markersize=3.5, alpha=0.35)
    axes.plot(middle[many], mean[many], "o-", color=BLUE, markersize=4)
    end = np.flatnonzero(many)[-1]
    where: dict[str, Any] = {"xytext": (9, 9), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"mean {number(mean[end])}", (middle[end], mean[end]), color=BLUE, **where)
    axes.set_title("gain in bits per byte")
    for x, count in zip(middle[reached], counts[reached], strict=True):
        where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        strip.annotate(f"{count:,}", (x, 0), fontsize=8, color=SOFT, **where)
    strip.set_title("documents that reach so far", fontsize=8.5, pad=4)
    strip.set_yticks([])
    strip.set_xlim(left[0], edges[-1])
    count_axis(strip, "token of the document")
    return figure
