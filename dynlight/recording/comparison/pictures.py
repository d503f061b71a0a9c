"""The pictures of several runs: bits per byte against what it cost and against tokens read, and gain by position."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynlight.recording.comparison.comparison import Comparison
from dynlight.recording.comparison.pairs import Pair
from dynlight.recording.comparison.runs import Scores
from dynlight.recording.report.drawing import (
    GREY,
    POINTS,
    count_axis,
    end_labels,
    figure_with_axes,
    labels_apart,
    style,
    svg_of,
)
from dynlight.recording.report.pictures import gain_by_position
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.tables import Rows
from dynlight.recording.report.text import one_line, pad_or_cut

COLOURS = ("#1f5fb4", "#c65d07", "#2e8b57", "#8250a8", "#9a7b1c", "#a0415d", "#3d7f7f")  # the first is the baseline's
PALE = "#aebccd"
NAME = 17  # letters of a name beside a curve: what there is room for


class Drawn(NamedTuple):
    """A run in a picture."""

    place: int  # of the run in the comparison
    pair: Pair
    scores: Scores  # over the documents that are compared
    colour: str | None  # None: pale, and without a name

    @property
    def is_static(self) -> bool:
        """Whether nothing was learned."""
        return not self.pair.run.documents.updates.any()

    @property
    def label(self) -> str:
        """The run's name, as long as there is room."""
        return pad_or_cut(one_line(self.pair.run.name), NAME).rstrip()


class Point(NamedTuple):
    """A point of a picture of costs: a run, or static ones."""

    cost: float
    bits: float
    label: str  # empty: none
    colour: str
    gid: str  # by which the page finds it; empty: not
    is_static: bool = False


def drawn_of(comparison: Comparison) -> list[Drawn]:
    """Return the runs that may stand in a picture, and give each a colour if there are few.

    Of more than there are colours these go to the baseline and to the runs of the Pareto front over FLOPs, those with
    the fewest bits first.
    """
    pairs = [(place, made) for place, made in enumerate(comparison.pairs) if made.is_drawn]
    scores = {place: made.scores(made.run) for place, made in pairs}
    first = [place for place, made in pairs if made.run is comparison.baseline]
    others = [place for place, made in pairs if made.run is not comparison.baseline]
    if len(pairs) > len(COLOURS):
        costs = [(scores[place].flops, scores[place].adapted) for place in others]
        others = [others[each] for each in reversed(front(costs))]
    colours = dict(zip([*first, *others], COLOURS, strict=False))
    return [Drawn(place, made, scores[place], colours.get(place)) for place, made in pairs]


def front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Return the Pareto front of points (cost, bits per byte), cheapest first: no other is as cheap and as good.

    >>> front([(3, 1.0), (1, 2.0), (2, 2.5), (None, 0.5)])
    [1, 0]
    """
    known = [(cost, bits, place) for place, (cost, bits) in enumerate(points) if cost is not None and bits is not None]
    places, best = [], float("inf")
    for _, bits, place in sorted(known):
        if bits < best:
            places.append(place)
            best = bits
    return places


def pictures(comparison: Comparison, drawn: Sequence[Drawn]) -> dict[str, str]:
    """Draw bits per byte over FLOPs and over seconds, gain by position, and curves over tokens, as SVG.

    A picture has the runs of which its numbers can be compared, and is left out where these are none. What belongs to a
    run is in an element `run-` and the run's place.
    """
    timed = [each for each in drawn if each.pair.has_same_clock]
    read = [each for each in drawn if each.pair.has_same_tokens]
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own font draws the names
        figures = {
            "flops": _draw_costs(_points(drawn, "flops"), "FLOPs, forward and backward"),
            "seconds": _draw_costs(_points(timed, "seconds"), "seconds of scoring and learning"),
        } | _draw_rows(read)
        return {name: svg_of(figure) for name, figure in figures.items() if figure is not None}


def _points(drawn: Sequence[Drawn], cost: str) -> list[Point]:
    """The runs and their static references; those with the same bits and FLOPs are one point, of their median cost."""
    points = []
    static: dict[tuple, list[Drawn]] = {}
    for each in drawn:
        value, scores = getattr(each.scores, cost), each.scores
        if value is not None and scores.adapted is not None:
            label = each.label if each.colour else ""
            points.append(Point(value, scores.adapted, label, each.colour or PALE, f"run-{each.place}", each.is_static))
        if getattr(scores, f"static_{cost}") is not None and scores.static is not None:
            static.setdefault((f"{scores.static:.6g}", scores.static_flops), []).append(each)
    for number, same in enumerate(static.values()):
        value = float(np.median([getattr(each.scores, f"static_{cost}") for each in same]))
        label = "static" if len(static) == 1 else f"static {number + 1}"
        points.append(Point(value, same[0].scores.static or 0.0, label if number < 3 else "", GREY, "", True))
    return points


def _draw_costs(points: list[Point], label: str) -> Figure | None:
    if not points:
        return None
    figure, (axes,) = figure_with_axes(3.9)
    best = [points[place] for place in front([(point.cost, point.bits) for point in points])]
    axes.plot([each.cost for each in best], [each.bits for each in best], color=GREY, linewidth=1.1, linestyle="--")
    for point in sorted(points, key=lambda point: point.colour != PALE):  # the named ones on top
        marker = "s" if point.is_static else "o"
        axes.plot([point.cost], [point.bits], marker, color=point.colour, markersize=6, gid=point.gid or None)
    costs = [point.cost for point in points]
    count_axis(axes, label, logarithmic=min(costs) > 0 and max(costs) > 8 * min(costs))
    axes.margins(0.06, 0.1)
    labels_apart(axes, [(each.cost, each.bits, each.label, each.colour) for each in points if each.label])
    axes.set_title("bits per byte; dashed, the Pareto front: no point is as cheap and as good")
    return figure


def _draw_rows(drawn: Sequence[Drawn]) -> dict[str, Figure | None]:
    """Gain by position, and curves over tokens: what needs the rows of each run, which are read once."""
    points = POINTS if len(drawn) <= len(COLOURS) else POINTS // 4  # a page does not grow with its runs
    (position, by_position), (tokens, by_tokens) = figure_with_axes(3.6), figure_with_axes(3.9)
    gains: list[tuple[Drawn, np.ndarray, np.ndarray]] = []
    curves: list[tuple[Drawn, np.ndarray, np.ndarray]] = []
    for each in drawn:
        numbers = each.pair.table(each.pair.run).document.tolist()
        rows = Rows(each.pair.run.folder / "segments.parquet").keep(numbers)
        if not len(rows):
            continue
        curves.append((each, *_running(rows, numbers, points)))
        if each.pair.run.has_static:
            gains.append((each, *_mean_gain(rows)))
    _draw_lines(by_position[0], gains)
    by_position[0].axhline(0, color=GREY, linewidth=1)
    by_position[0].set_title("gain in bits per byte, mean over documents")
    count_axis(by_position[0], "token of the document")
    _draw_lines(by_tokens[0], curves, steady=True)
    by_tokens[0].set_title("bits per byte, of all tokens so far")
    count_axis(by_tokens[0], "tokens read", logarithmic=False)
    return {"position": position if gains else None, "tokens": tokens if curves else None}


def _draw_lines(axes: Axes, lines: list[tuple[Drawn, np.ndarray, np.ndarray]], steady: bool = False) -> None:
    """Draw a line for each run, the named ones on top with their last values.

    Args:
        axes: to draw on.
        lines: of each run x and y.
        steady: whether the first few points may lie far off, where they would squeeze all that follows.
    """
    for each, x, y in sorted(lines, key=lambda line: line[0].colour is not None):
        width = 1.8 if each.colour else 0.9
        axes.plot(x, y, color=each.colour or PALE, linewidth=width, gid=f"run-{each.place}")
    if steady and lines:
        seen = np.concatenate([y[len(y) // 8 :] for _, _, y in lines])
        margin = 0.08 * np.ptp(seen) + 0.005
        axes.set_ylim(seen.min() - margin, seen.max() + margin)
    end_labels(axes, [(x[-1], y[-1], each.label, each.colour) for each, x, y in lines if each.colour and len(x)])


def _running(rows: Rows, order: list[int], points: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens read, and bits per byte of all of them, at so many places, the documents in an order of numbers."""
    stops = np.append(rows.starts[1:], len(rows))
    spans = {
        number: np.arange(*span) for number, *span in zip(rows.documents.tolist(), rows.starts, stops, strict=True)
    }
    places = np.concatenate([spans[number] for number in order if number in spans])
    tokens, size, sums = (np.cumsum(rows[name][places]) for name in ("tokens", "bytes", "nats"))
    marks = np.unique(np.searchsorted(tokens, np.linspace(0, tokens[-1], points + 1)[1:]))
    bits = bits_per_byte(sums[marks], size[marks].astype(float))
    known = np.isfinite(bits)  # not where the first tokens have no bytes yet
    return tokens[marks][known], bits[known]


def _mean_gain(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Middles of positions that at least half of the documents reach, and the gain there."""
    edges, gains = gain_by_position(rows)
    counts = np.isfinite(gains).sum(axis=0)
    many = (2 * counts >= counts.max()) & (counts > 0)
    return ((edges[:-1] + edges[1:]) / 2)[many], np.nanmean(gains[:, many], axis=0)
