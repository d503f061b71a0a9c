"""The page of several runs: one file that loads nothing."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import markupsafe

from dynlight.durable import write_text
from dynlight.recording.comparison.comparison import Comparison
from dynlight.recording.comparison.pairs import Pair
from dynlight.recording.comparison.pictures import drawn_of, pictures
from dynlight.recording.comparison.settings import words
from dynlight.recording.comparison.words import margin_words, settings_words
from dynlight.recording.report.ratios import ratio
from dynlight.recording.report.templates import rendered
from dynlight.recording.report.text import number, one_line


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(comparison))


def render(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    drawn = drawn_of(comparison)
    colours = {each.place: each.colour for each in drawn if each.colour}
    rows = [
        {
            "pair": made,
            "scores": made.run.scores,
            "is_baseline": made.run is comparison.baseline,
            "margin": margin_words(made),
            "words": words(made.run.settings, comparison.baseline.settings),
            "colour": colours.get(place),
        }
        for place, made in enumerate(comparison.pairs)
    ]
    compared = [made for made in comparison.pairs if made.margin is not None]
    return rendered(
        Path(__file__).with_name("compare.html.jinja"),
        rows=rows,
        comparison=comparison,
        best=best_of(comparison),
        margin_words=margin_words,
        verdict=verdict,
        pictures={
            name: markupsafe.Markup(_titled(svg, comparison)) for name, svg in pictures(comparison, drawn).items()
        },
        drawn=drawn,
        bars=bars(compared),
        settings=settings_words(comparison),
    )


def best_of(comparison: Comparison) -> Pair | None:
    """Return the run with the fewest bits of those that read all of the baseline's documents; None without any."""
    known = [made for made in comparison.pairs if made.is_drawn and made.run.scores.adapted is not None]
    return max(known, key=lambda made: made.margin or 0.0, default=None)  # the baseline has none: it is the zero


def verdict(pair: Pair) -> str:
    """Say whether a run is `better` or `worse` than the baseline, or `open`, where its interval allows both."""
    if pair.margin is None:
        return "open"
    low, high = (pair.margin if end is None else end for end in (pair.low, pair.high))
    return "better" if low > 0 else "worse" if high < 0 else "open"


def _titled(svg: str, comparison: Comparison) -> str:
    """Give each run's elements its name and bits per byte, which a browser shows to who points at them."""

    def title(match: re.Match[str]) -> str:
        made = comparison.pairs[int(match[1])]
        text = f"{one_line(made.run.name)}, {number(made.scores(made.run).adapted)} bits per byte"
        return f'<g class="run"><title>{escape(text)}</title>'

    return re.sub(r'<g id="run-(\d+)">', title, svg)


def bars(pairs: Sequence[Pair]) -> tuple[float, list[tuple[Pair, float, float, float]]]:
    """Place the margins on a line from the lowest to the highest end, best first, all in percent of its length.

    Returns:
        Where zero is, and of each margin its place and the left and the width of its interval.
    """
    ends = [0.0, *(end for made in pairs for end in (made.margin, made.low, made.high) if end is not None)]
    low, length = min(ends), max(ends) - min(ends)

    def place(value: float) -> float:
        return round(ratio(100 * (value - low), length) or 0.0, 2)

    placed = []
    for made in sorted(pairs, key=lambda made: made.margin or 0.0, reverse=True):
        middle = made.margin or 0.0
        left, right = (place(middle if end is None else end) for end in (made.low, made.high))
        placed.append((made, place(middle), left, round(right - left, 2)))
    return place(0.0), placed
