"""What a comparison says in words, for the page and the terminal."""

from dynlight.recording.comparison.comparison import Comparison
from dynlight.recording.comparison.pairs import Pair
from dynlight.recording.comparison.settings import shown
from dynlight.recording.report.text import number, one_line


def margin_words(pair: Pair) -> str:
    """Say a margin and how far its 95% interval reaches to both sides: `0.031 ± 0.012`."""
    if pair.margin is None or pair.high is None:
        return number(pair.margin)
    return f"{number(pair.margin)} ± {number(pair.high - pair.margin)}"


def settings_words(comparison: Comparison) -> dict[str, list[tuple[str, list[str]]]]:
    """Return for each setting in which runs differ its values, and the names of the runs that have them."""
    said: dict[str, list[tuple[str, list[str]]]] = {}
    for name in comparison.differing:
        runs: dict[str, list[str]] = {}
        for made in comparison.pairs:
            if name in made.run.settings:
                runs.setdefault(shown(made.run.settings[name]), []).append(one_line(made.run.name))
        said[name] = list(runs.items())
    return said
