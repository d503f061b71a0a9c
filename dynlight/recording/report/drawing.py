"""The style of the pictures on the page: colours, axes, labels, and a figure as SVG."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dynlight.recording.report.text import number, si

POINTS = 600  # of a curve at most
LABEL = 13  # points from the line of one label to the next

INK, SOFT, GREY, RULE, BLUE, ORANGE = "#1b1f24", "#57606a", "#7d8590", "#e4e7eb", "#1f5fb4", "#c65d07"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # the page's own font, and text that can be selected
    "svg.hashsalt": "dynlight",  # the same picture from the same rows
    "font.size": 9.5,
    "text.color": INK,
    "lines.linewidth": 1.8,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{name: "#b9c0c9" for name in ("axes.edgecolor", "xtick.color", "ytick.color")},
    **{name: SOFT for name in ("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")},
    **{"axes.titlelocation": "left", "axes.titlesize": 9.5, "axes.titlepad": 10},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE},
    **{"ytick.left": False, "xtick.minor.size": 0},
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with the style of the page, whatever style the machine has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # undoes a matplotlibrc of the user's
        matplotlib.rcParams.update(STYLE)
        yield


def figure_with_axes(height: float, panels: int = 1, ratios: tuple[float, ...] = (1,)) -> tuple[Figure, list[Axes]]:
    """Make a figure of the page's width with panels one below the other, with room for labels at their right.

    Args:
        height: of the figure, in inches.
        panels: how many.
        ratios: of the heights of the panels.
    """
    figure = Figure(figsize=(8.4, height))
    figure.subplots_adjust(0.055, 0.5 / height, 0.855, 1 - 0.35 / height, hspace=0.38)
    return figure, list(figure.subplots(panels, sharex=True, height_ratios=ratios, squeeze=False)[:, 0])


def count_axis(axes: Axes, label: str, logarithmic: bool = True) -> None:
    """Label an x-axis of counts, written with SI prefixes."""
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: si(value, form=".3g"))
    axes.set_xlabel(label)


def end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write the name and the last value of each curve beside its end, and keep labels apart.

    Args:
        axes: with the curves, its limits set.
        ends: of each curve: x, y, name, colour.
    """
    for x, y, _, colour in ends:
        axes.plot([x], [y], "o", color=colour, markersize=4.5, clip_on=False)
    labels_apart(axes, [(x, y, f"{name} {number(y)}".strip(), colour) for x, y, name, colour in ends])


def labels_apart(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write labels to the right of points, moved up or down by as little as keeps them apart.

    Args:
        axes: with the points, its limits set.
        labels: of each point: x, y, text, colour.
    """
    low, high = axes.get_ylim()
    points_high = axes.get_window_extent().height * 72 / axes.figure.dpi
    heights = [points_high * (y - low) / (high - low) for _, y, _, _ in labels]
    places = spread(heights, LABEL, (0.5 * LABEL, points_high))
    for (x, y, text, colour), height, place in zip(labels, heights, places, strict=True):
        where: dict[str, Any] = {"xytext": (9, place - height), "textcoords": "offset points", "va": "center"}
        where["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4}  # over points and lines
        axes.annotate(text, (x, y), color=colour, annotation_clip=False, parse_math=False, **where)


def spread(heights: list[float], gap: float, within: tuple[float, float]) -> list[float]:
    """Move heights as little as keeps them a gap apart, in the sense of least squares, and within two bounds.

    >>> spread([0.0, 30.0, 32.0, 34.0], 10, (0, 99))
    [0.0, 22.0, 32.0, 42.0]
    >>> spread([33.0, 34.0], 10, (0.0, 35.0))
    [25.0, 35.0]
    """
    blocks: list[
        list[float]
    ] = []  # of neighbours that touch: the sum of their heights less gaps below, and their count
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for rank, index in enumerate(order):
        blocks.append([heights[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    low, high = within[0], max(within[0], within[1] - gap * (len(heights) - 1))
    bases = [min(max(total / count, low), high) for total, count in blocks for _ in range(int(count))]
    places = dict(zip(order, (base + rank * gap for rank, base in enumerate(bases)), strict=True))
    return [places[index] for index in range(len(heights))]


def svg_of(figure: Figure) -> str:
    """Write a figure as an element of a page: no prologue, no metadata, no names but those that the figure refers to.

    What was given a name that begins with `run-` (`set_gid`) keeps it.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">", text.index("<svg")) + 1 :]
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">' + re.sub(r'<g id="(?!run-)[^"]*">', "<g>", body)
