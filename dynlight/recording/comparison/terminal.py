"""The table of several runs for a terminal."""

import textwrap

from dynlight.recording.comparison.comparison import Comparison
from dynlight.recording.comparison.pairs import Pair
from dynlight.recording.comparison.settings import words
from dynlight.recording.comparison.words import margin_words
from dynlight.recording.report.text import number, one_line, pad_or_cut, si, terminal_width

WIDTH = 100
HEAD = ["run", "docs", "tokens", "static", "adapted", "gain, %", "margin, 95%", "FLOPs", "/static", "seconds"]


def printed_comparison(comparison: Comparison) -> str:
    """Return the table: a line for each run, below it the settings in which it differs from the baseline; then what can't be compared."""
    lines = [HEAD, *(_cells(made, comparison) for made in comparison.pairs)]
    widths = [max(map(terminal_width, column)) for column in zip(*lines, strict=True)]
    first = max(8, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    head, *rows = [
        pad_or_cut(name, first)
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)).rstrip()
        for name, *cells in lines
    ]
    rule = "─" * (first + sum(widths[1:]) + 2 * len(widths[1:]))
    printed = [head, rule]
    for row, made in zip(rows, comparison.pairs, strict=True):
        printed += [row, *_wrapped(words(made.run.settings, comparison.baseline.settings))]
    printed += [rule, *_legend(comparison)]
    for warning in comparison.warnings:
        printed += textwrap.wrap(f"warning: {one_line(warning)}", WIDTH, subsequent_indent="  ")
    return "\n".join(printed)


def _cells(made: Pair, comparison: Comparison) -> list[str]:
    scores = made.run.scores
    margin = "baseline" if made.run is comparison.baseline else margin_words(made)
    return [
        one_line(made.run.name),
        number(scores.documents, 0),
        si(scores.tokens),
        number(scores.static),
        number(scores.adapted),
        number(scores.percent, 1),
        margin,
        si(scores.flops),
        number(scores.times, 2),
        number(scores.seconds, 1),
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _legend(comparison: Comparison) -> list[str]:
    baseline = one_line(comparison.baseline.name)
    return textwrap.wrap(
        f"static, adapted: bits per byte. margin: bits per byte of {baseline} − the run's, positive where the run is "
        "better, with its 95% interval, paired by document. Below each run the settings in which it is another.",
        WIDTH,
    )
