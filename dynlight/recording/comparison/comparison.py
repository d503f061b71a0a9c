"""Several runs beside one of them, the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynlight.errors import SettingError, require
from dynlight.recording.comparison.finding import find_runs, is_run, names_of
from dynlight.recording.comparison.pairs import Pair, pair
from dynlight.recording.comparison.runs import Run, read
from dynlight.recording.comparison.settings import differing

NAMED = 5  # runs in a warning, of which the others are counted


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were given, each beside the baseline.

    Args:
        pairs: of each run.
        baseline: which run the others are compared with.
        differing: the settings in which runs differ.
        warnings: what can't be compared, in sentences.
    """

    pairs: list[Pair]
    baseline: Run
    differing: list[str]
    warnings: list[str]


def compare(given: Sequence[str], baseline: str | None = None) -> Comparison:
    """Read runs and compare each with the baseline.

    A folder that holds no finished run, or a damaged one, is left out, and a warning says so.

    Args:
        given: folders of runs, globs of them, or folders in which runs lie.
        baseline: the folder of a run, one of them or not, or the name of a run in the table; default the first.

    Raises:
        SettingError: if fewer than two runs are left, or the baseline is none of them.
    """
    folders, left_out = find_runs(given)
    is_folder = baseline is not None and is_run(Path(baseline))
    if is_folder and Path(baseline or "").resolve() not in [folder.resolve() for folder in folders]:
        folders = [Path(baseline or ""), *folders]
    runs = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            runs.append(read(folder, name))
        except SettingError as error:
            left_out[str(folder)] = f"is damaged: {error}"
    why = "; ".join(f"{name} {reason}" for name, reason in list(left_out.items())[:NAMED])
    require(len(runs) > 1, "runs", "be at least 2 that were finished", got=len(runs), advice=why)
    first = runs[0] if baseline is None else _find(baseline, runs)
    pairs = [pair(run, first) for run in runs]
    warnings = [f"{name} {reason}; left out" for name, reason in left_out.items()] + _gathered(pairs)
    return Comparison(pairs, first, differing([run.settings for run in runs]), warnings)


def _find(baseline: str, runs: Sequence[Run]) -> Run:
    for run in runs:
        if run.name == baseline.rstrip("/") or run.folder.resolve() == Path(baseline).resolve():
            return run
    names = ", ".join(run.name for run in runs[:NAMED])
    raise SettingError("baseline", "be one of the runs", got=baseline, advice=f"the first of them: {names}")


def _gathered(pairs: Sequence[Pair]) -> list[str]:
    """The notes of all runs, each said once with the runs that it is of."""
    of: dict[str, list[str]] = {}
    for made in pairs:
        for note in made.notes:
            of.setdefault(note, []).append(made.run.name)
    return [f"{_listed(names)}: {note}" for note, names in of.items()]


def _listed(names: Sequence[str]) -> str:
    shown = names if len(names) <= NAMED + 1 else names[:NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
