"""The page of a run, report.html: one file that loads nothing, of a size that does not grow with the run."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import matplotlib.colors
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dynlight.recording.report.summary import (
    Rows,
    best_rate_sentence,
    bits_per_byte,
    number,
    one_line,
    ratio,
    read_run,
    si,
    visible,
)

POINTS = 600  # of a curve
TABLE = 200  # documents in the table
BARS = 40  # documents in the bar chart
EXCERPT = 200  # tokens
SHADES = 7

RULES = ("#1f5fb4", "#c65d07", "#2e8b57", "#8250a8")  # of update rules in a mixture
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


def render(folder: Path, table: pd.DataFrame, summary: dict[str, Any]) -> str:
    """Return report.html for a run, from its rows, its table with scores, and its summary."""
    rows = Rows(folder / "segments.parquet").keep(table.document[table.failed == ""])
    has_static, tokens, config = summary["static"] is not None, folder / "tokens.parquet", folder / "config.yaml"
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
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**strict, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(visible=visible, one_line=one_line, number=number, si=si)
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text("utf-8")).render(
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
        colours={"ink": INK, "soft": SOFT, "grey": GREY, "blue": BLUE, "orange": ORANGE, "rule": RULE},
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

    Without a static reference it is bits per byte that ranks the documents, and nats that shade.

    Returns:
        The documents, and the nats at which a shade is full.
    """
    held = pc.unique(pq.read_table(path, columns=["document"])["document"]).to_pylist()
    table = table[table.document.isin(held) & (table.failed == "")]
    table = table.sort_values("gain" if has_static else "adapted", ascending=False, kind="stable")
    ranks = {0: "largest", len(table) // 2: "median", len(table) - 1: "smallest"} if len(table) else {}
    documents: list[dict[str, Any]] = []
    for rank, which in ranks.items():
        this = ("document", "==", int(table.document.iloc[rank]))
        tokens = np.sort(pq.read_table(path, columns=["token"], filters=[this])["token"].to_numpy())
        spans = [tokens[:EXCERPT], tokens[(len(tokens) - EXCERPT) // 2 :][:EXCERPT], tokens[-EXCERPT:]]
        spans = spans if len(tokens) > 3 * EXCERPT else [tokens]
        parts = [_pieces(path, [this, ("token", ">=", span[0]), ("token", "<=", span[-1])]) for span in spans]
        documents.append({"row": table.iloc[rank], "which": which, "parts": parts})
    all_parts = [part for document in documents for part in document["parts"]]
    for part in all_parts:
        part["value"] = (part.static_nats - part.nats if has_static else part.nats).fillna(0)
    values = pd.concat([part.value for part in all_parts] or [pd.Series([0.0])])
    limit = max(0.1, round(float(values.abs().quantile(0.95)), 1))
    for part in all_parts:
        part["shade"] = (part.value.abs() / limit * SHADES).clip(0, SHADES).round().astype(int)
        part["hue"] = np.where(part.value < 0, "worse", "better") if has_static else "plain"
    return documents, limit


def _pieces(path: Path, filters: list[tuple]) -> pd.DataFrame:
    columns = ["token", "text", "nats", "static_nats"]
    part = pq.read_table(path, columns=columns, filters=filters).to_pandas().sort_values("token")
    part = part.astype({"nats": "float64", "static_nats": "float64"})
    # Of tokens that share a character only the first has text: the nats of the others are shown there.
    whole = (part.text != "").cumsum()
    return part.groupby(whole).agg(
        token=("token", "first"),
        last=("token", "last"),
        text=("text", "sum"),
        nats=("nats", "sum"),
        static_nats=("static_nats", "sum"),
    )


def pictures(rows: Rows, has_static: bool) -> dict[str, str]:
    """Draw running loss over tokens and over FLOPs and gain by position, as SVG; nothing if there are no rows."""
    if not len(rows):
        return {}
    kinds = [("static", "static_nats", "static_flops", GREY)] if has_static else []
    kinds.append(("adapted" if has_static else "", "nats", "flops", BLUE))
    tokens = np.cumsum(rows["tokens"])
    ends = tokens[np.append(rows.starts[1:], len(rows)) - 1]
    # Running sums at some places of the stream: what is drawn does not grow with the run.
    marks = np.unique(np.searchsorted(tokens, np.linspace(0, tokens[-1], POINTS + 1)[1:]))
    names = ["bytes", *(name for kind in kinds for name in kind[1:3])]
    curves = {name: np.cumsum(rows[name])[marks].astype(float) for name in names} | {"tokens": tokens[marks]}
    with _style():
        drawn = {"tokens": _draw_tokens(curves, kinds, ends), "flops": _draw_flops(curves, kinds)}
        if has_static:
            drawn["position"] = _draw_position(*gain_by_position(rows))
        return {name: _svg(figure) for name, figure in drawn.items()}


def pictures_of_experts(path: Path, table: pd.DataFrame, summary: dict[str, Any]) -> dict[str, str]:
    """Draw loss against rate, and each expert's weight in the mixture by position in the document, as SVG."""
    with _style():
        drawn = {"rates": _draw_rates(summary), "shares": _draw_shares(*shares_by_position(path, table), summary)}
        return {name: _svg(figure) for name, figure in drawn.items()}


def shares_by_position(path: Path, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return each expert's mean weight over the documents that reach a position.

    Returns:
        starts: int64 [positions], tokens, of the segments.
        shares: float64 [experts, positions].
    """
    rows = pd.read_parquet(path, columns=["document", "segment", "expert", "tokens", "share"])
    rows = rows[rows.document.isin(table.document[table.failed == ""])]
    shares = rows.groupby(["expert", "segment"]).share.mean().unstack()
    segment = int(rows.tokens.max())
    return shares.columns.to_numpy() * segment, shares.to_numpy()


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whoever looks: a matplotlibrc of one's own changes nothing
        matplotlib.rcParams.update(STYLE)
        yield


def gain_by_position(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return how fast the model adapts: static − adapted in bits per byte, by token position.

    Returns:
        edges: int64 [bins + 1], whole segments, the first bin one of them, and then each as far again by half.
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


def _axes(height: float, panels: int = 1, ratios: tuple[float, ...] = (1,)) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.4, height))
    figure.subplots_adjust(0.055, 0.5 / height, 0.855, 1 - 0.35 / height, hspace=0.38)
    return figure, list(figure.subplots(panels, sharex=True, height_ratios=ratios, squeeze=False)[:, 0])


def _count_axis(axes: Axes, label: str, logarithmic: bool = True) -> None:
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: si(value, form=".3g"))
    axes.set_xlabel(label)


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each curve's name and last value beside its end, and keep two of them apart."""
    heights = [end[1] for end in ends]
    close = np.ptp(heights) < 0.11 * np.ptp(axes.get_ylim()) and len(ends) > 1
    for index, (x, y, name, colour) in enumerate(ends):
        shift = (7 if index == np.argmax(heights) else -7) if close else 0
        axes.plot([x], [y], "o", color=colour, markersize=4.5, clip_on=False)
        where: dict[str, Any] = {
            "xytext": (9, shift),
            "textcoords": "offset points",
            "va": "center",
            "annotation_clip": False,
        }
        axes.annotate(f"{name} {number(y)}".strip(), (x, y), color=colour, **where)


def _draw_tokens(curves: dict[str, np.ndarray], kinds: list[tuple], ends: np.ndarray) -> Figure:
    figure, (top, bottom) = _axes(4.7, 2, (1.25, 1))
    tokens = curves["tokens"]
    reach = max(2, len(tokens) // 50)
    places = np.arange(1, len(tokens) + 1)
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach, len(tokens))
    size = np.append(0, curves["bytes"])
    last = []
    for name, nats, _, colour in kinds:
        sums = np.append(0, curves[nats])
        running = bits_per_byte(sums[1:], size[1:])
        top.plot(tokens, running, color=colour)
        bottom.plot(tokens, bits_per_byte(sums[high] - sums[low], size[high] - size[low]), color=colour, linewidth=1.2)
        last.append((tokens[-1], running[-1], name, colour))
    # The first few tokens may lie far off; they would squeeze all that follows.
    steady = np.concatenate([np.asarray(line.get_ydata())[len(tokens) // 40 :] for line in top.lines])
    margin = 0.08 * np.nanmax(steady) - 0.08 * np.nanmin(steady) + 0.01
    top.set_ylim(np.nanmin(steady) - margin, np.nanmax(steady) + margin)
    _end_labels(top, last)
    for axes in (top, bottom) if len(ends) <= 60 else ():
        axes.vlines(ends, 0, 1, transform=axes.get_xaxis_transform(), color="#d5dae0", linewidth=0.7, zorder=0.5)
    top.set_title("bits per byte, of all tokens so far")
    bottom.set_title(f"bits per byte, of about {si(2 * reach * tokens[-1] / len(tokens), form='.2g')} tokens around")
    bottom.set_xlim(0, tokens[-1])
    _count_axis(bottom, "tokens read", logarithmic=False)
    return figure


def _draw_flops(curves: dict[str, np.ndarray], kinds: list[tuple]) -> Figure:
    figure, (axes,) = _axes(3.0)
    skip, last = len(curves["tokens"]) // 40, []
    for name, nats, flops, colour in kinds:
        running = bits_per_byte(curves[nats], curves["bytes"])
        axes.plot(curves[flops][skip:], running[skip:], color=colour)
        last.append((curves[flops][-1], running[-1], name, colour))
    _end_labels(axes, last)
    axes.set_title("bits per byte, of all tokens so far")
    _count_axis(axes, "FLOPs spent", logarithmic=all(end[0] > 0 for end in last))
    return figure


def _draw_position(edges: np.ndarray, gains: np.ndarray) -> Figure:
    figure, (axes, strip) = _axes(3.7, 2, (5, 1))
    counts = np.isfinite(gains).sum(axis=0)
    held = counts > 0
    middle, left = (edges[:-1] + edges[1:]) / 2, np.maximum(edges[:-1], edges[1] / 3)  # a logarithm has no zero
    strip.bar(left[held], counts[held], (edges[1:] - left)[held], align="edge", color=RULE, edgecolor="white")
    many = (2 * counts >= counts.max()) & held
    mean = np.array([np.nanmean(gains[:, place]) if held[place] else np.nan for place in range(len(held))])
    low, high = np.nanpercentile(gains[:, many], (25, 75), axis=0)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.fill_between(middle[many], low, high, color=BLUE, alpha=0.14, linewidth=0)
    axes.plot(middle[held], mean[held], "o-", color=BLUE, markersize=3.5, alpha=0.35)
    axes.plot(middle[many], mean[many], "o-", color=BLUE, markersize=4)
    end = np.flatnonzero(many)[-1]
    where: dict[str, Any] = {"xytext": (9, 9), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"mean {number(mean[end])}", (middle[end], mean[end]), color=BLUE, **where)
    axes.set_title("gain in bits per byte")
    for x, count in zip(middle[held], counts[held], strict=True):
        where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        strip.annotate(f"{count:,}", (x, 0), fontsize=8, color=SOFT, **where)
    strip.set_title("documents that reach so far", fontsize=8.5, pad=4)
    strip.set_yticks([])
    strip.set_xlim(left[0], edges[-1])
    _count_axis(strip, "token of the document")
    return figure


def _draw_rates(summary: dict[str, Any]) -> Figure:
    figure, (axes,) = _axes(3.2)
    learned = pd.DataFrame([expert for expert in summary["experts"] if expert["rule"]])
    lines = [("mixture", summary["bits_per_byte"], BLUE)]
    if summary["static"]:
        lines.append(("static", summary["static"]["bits_per_byte"], GREY))
    for name, value, colour in lines:
        axes.axhline(value, color=colour, linewidth=1.4)
        axes.annotate(f"{name} {number(value)}", (1, value), xycoords=("axes fraction", "data"),
                      xytext=(9, 0), textcoords="offset points", va="center", color=colour)  # fmt: skip
    held = learned[learned.bits_per_byte.notna()]
    for colour, (name, rule) in zip(RULES * len(held), held.groupby("rule", sort=False), strict=False):
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


def _draw_shares(starts: np.ndarray, shares: np.ndarray, summary: dict[str, Any]) -> Figure:
    figure, (axes,) = _axes(3.4)
    names = [expert["name"] for expert in summary["experts"]]
    places = np.linspace(0, len(starts) - 1, min(POINTS, len(starts))).round().astype(int)
    colours = expert_colours(summary["experts"])
    axes.stackplot(starts[places], shares[:, places], colors=colours, linewidth=0)
    middle = np.cumsum(shares[:, -1]) - shares[:, -1] / 2
    for name, height, share in zip(names, middle, shares[:, -1], strict=True):
        if share > 0.05:  # others are in the table
            axes.annotate(name, (starts[-1], height), xytext=(9, 0), textcoords="offset points",
                          va="center", color=SOFT, fontsize=8, annotation_clip=False)  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xlim(starts[0], max(starts[-1], 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_title("weight in the mixture, mean over documents")
    _count_axis(axes, "token of the document", logarithmic=False)
    return figure


def expert_colours(experts: list[dict[str, Any]]) -> list[str]:
    """Give the static model grey and each rule a colour, the darker the higher the rate."""
    rules = list(dict.fromkeys(expert["rule"] for expert in experts if expert["rule"]))
    colours = []
    for expert in experts:
        if not expert["rule"]:
            colours.append("#c9ced5")
            continue
        rates = [other["rate"] for other in experts if other["rule"] == expert["rule"]]
        depth = (rates.index(expert["rate"]) + 1) / len(rates)
        base = np.array(matplotlib.colors.to_rgb(RULES[rules.index(expert["rule"]) % len(RULES)]))
        colours.append(matplotlib.colors.to_hex(tuple(1 - (1 - base) * (0.25 + 0.75 * depth))))
    return colours


def _svg(figure: Figure) -> str:
    """Write a figure as an element of a page: no prologue, no metadata, no names but those it refers to."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">", text.index("<svg")) + 1 :]
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">' + re.sub(r'<g id="[^"]*">', "<g>", body)
