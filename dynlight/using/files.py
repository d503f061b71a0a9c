"""Files: what the commands that read bytes have in common: any bytes as text, their options, and how far they are."""

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from dynlight.arguments import own_options
from dynlight.errors import require


def as_text(data: bytes) -> str:
    r"""Any bytes as Unicode text: a byte that is no UTF-8 becomes U+001A and its two digits, and so does U+001A itself.

    >>> as_text(b"caf\xc3\xa9 \xff")
    'café \x1aff'
    """
    text = data.decode("utf-8", "surrogateescape")
    return re.sub("[\x1a\udc80-\udcff]", lambda found: f"\x1a{ord(found[0]) & 0xFF:02x}", text)


def as_bytes(text: str) -> bytes:
    """The bytes of which `as_text` made a text."""

    def byte(found: re.Match[str]) -> str:
        code = int(found[1], 16)
        return chr(code if code < 0x80 else 0xDC00 + code)

    return re.sub("\x1a([0-9a-f]{2})", byte, text).encode("utf-8", "surrogateescape")


def file_of(arguments: Sequence[str], what: str) -> tuple[Path, dict[str, str], list[str]]:
    """The file that comes first, the options `to` and `force`, and the arguments that are left, which describe a run.

    Raises:
        SettingError: if no file comes first.
    """
    file, *others = arguments
    require(not file.startswith("-"), what, "come first", got=file)
    require(Path(file).is_file(), what, "be a file", got=file)
    return Path(file), *own_options(others, ("to",), ("force",))


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
