"""Files: what the commands that read a file have in common: their own options, and how they say how far they are."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from dynlight.errors import SettingError, require


def own_options(arguments: Sequence[str], what: str) -> tuple[Path, dict[str, str], list[str]]:
    """The file that comes first, the options `to` and `force`, and the arguments that are left, which describe a run.

    Raises:
        SettingError: if no file comes first, or `to` has no value.
    """
    file, *others = arguments
    require(not file.startswith("-"), what, "come first", got=file)
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(others)
    for argument in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--force":
            options[name] = ""
        elif argument.startswith("--") and name == "to":
            options[name] = value if equals else next(waiting, "")
            if not options[name]:
                raise SettingError(name, "be given a value", got="nothing")
        else:
            rest.append(argument)
    return Path(file), options, rest


def target_of(options: dict[str, str], usual: Path, source: Path) -> Path:
    """The file to write: one that is not there yet, or that `force` lets be replaced.

    Raises:
        SettingError: if it cannot be written.
    """
    target = Path(options.get("to", usual))
    require("force" in options or not target.exists(), "to", "be a new file", got=target, advice="set --force")
    is_file = not target.exists() or (target.is_file() and not target.is_symlink())
    require(is_file, "to", "be a file that can be replaced", got=target)
    require(not target.exists() or not target.samefile(source), "to", "be another file than is read", got=target)
    folder = target.absolute().parent
    require(folder.is_dir() and os.access(folder, os.W_OK), "to", "lie in a folder that can be written to", got=target)
    return target


class Told:
    """Says on a terminal how many tokens are done, once a second at most; a pipe is told nothing.

    Args:
        what: is done to them.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_on = sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if self._is_on and now - self._last >= 1:
            rate = done / (now - self._began)
            print(
                f"\r{100 * done // tokens:3}% {self._what}, {rate:.0f} tokens/s ", end="", file=sys.stderr, flush=True
            )
            self._last = now

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
