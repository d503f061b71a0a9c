"""Which folders hold the runs that are to be compared, and by which names they go."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynlight.errors import SettingError

UNFINISHED = "is unfinished (no run.json): go on with `python -m dynlight.fit --resume` and the folder"


def find_runs(given: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Return the folders of runs that are meant, each once, and why others are left out.

    Args:
        given: folders of runs, globs of them, or folders in which runs lie at any depth.

    Raises:
        SettingError: if there is nothing of a name.
    """
    folders: dict[Path, Path] = {}  # by where they lie, whatever path leads there
    left_out: dict[str, str] = {}
    for text in given:
        paths = [Path(text)] if text and Path(text).exists() else sorted(_folders_like(text), key=_in_order)
        if not paths:
            raise SettingError("runs", "be folders that exist", got=text)
        for path in paths:
            runs, unfinished = _runs_in(path)
            folders |= {run.resolve(): run for run in runs if run.resolve() not in folders}
            left_out |= {str(folder): UNFINISHED for folder in unfinished}
            if not runs and not unfinished:
                left_out[str(path)] = "holds no run"
    return list(folders.values()), left_out


def _folders_like(pattern: str) -> list[Path]:
    return [path for path in map(Path, glob.glob(pattern)) if path.is_dir()]  # beside them lies the page


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that was finished."""
    return (folder / "run.json").is_file()


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return for each run the end of its path, of as few folders as tell the runs apart.

    >>> names_of([Path("runs/a/1"), Path("runs/b/1")])
    ['a/1', 'b/1']
    """
    paths = [folder.resolve().parts for folder in folders]
    ends: list[tuple[str, ...]] = []
    for count in range(1, max(map(len, paths), default=0) + 1):
        ends = [path[-count:] for path in paths]
        if len(set(ends)) == len(ends):
            break
    return [str(Path(*end)) for end in ends]


def _runs_in(path: Path) -> tuple[list[Path], list[Path]]:
    """The runs at or below a path, those finished and those that are not."""
    finished, unfinished = [], []
    for folder in _folders(path):
        if is_run(folder):
            finished.append(folder)
        else:
            unfinished.append(folder)
    return finished, unfinished


def _folders(path: Path) -> Iterator[Path]:
    """Folders of runs, finished or not, in the order of their names, 9 before 10; none is sought within a run."""
    if is_run(path) or (path / "config.yaml").is_file():
        yield path
    elif path.is_dir():
        for inner in sorted(path.iterdir(), key=_in_order):
            is_link = inner.is_symlink() and not is_run(inner)  # which may lead back up
            if inner.is_dir() and not is_link and not inner.name.startswith("."):
                yield from _folders(inner)


def _in_order(path: Path) -> list[Any]:
    """A name as its texts and numbers in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]
