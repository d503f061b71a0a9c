"""Lines: how much each line of a text surprises a model that learns from the lines before it."""

import math
import re
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dynlight.recording.report.ratios import bits_per_byte
from dynlight.using.files import as_bytes

_KNOWN, FEWEST = 200, 50  # lines with which a line is compared: the last ones, and as many at least


@dataclass(frozen=True)
class Line:
    """A line and its nats, line end included; `static_nats` None without a reference."""

    number: int  # from 1
    text: str
    bytes: int
    nats: float
    static_nats: float | None

    @property
    def surprise(self) -> float:
        """Bits per byte, by the weights that have learned from the lines before."""
        return float(bits_per_byte(self.nats, self.bytes) or 0.0)


def lines_of(text: str, table: pd.DataFrame, first: int) -> Iterator[Line]:
    """The lines of a text, from the table that `Reader.read` gave of it; a token belongs to the line in which it begins.

    Args:
        text: lines, of which the last may have no end.
        table: of its tokens.
        first: the number of the first line.
    """
    lines = re.findall("[^\n]*\n|[^\n]+", text)  # what ends a line for `grep -n`, and nothing else
    ends = np.cumsum([len(line) for line in lines])
    begins = np.cumsum([0, *(len(piece) for piece in table["text"])])[:-1]
    places = np.minimum(np.searchsorted(ends, begins, side="right"), len(lines) - 1)
    sums = {name: np.bincount(places, table[name], len(lines)) for name in ("nats", "static_nats")}
    for place, line in enumerate(lines):
        static = float(sums["static_nats"][place])
        nats = float(sums["nats"][place])
        own = None if math.isnan(static) else static
        yield Line(first + place, line.rstrip("\r\n"), len(as_bytes(line)), nats, own)


class Surprising:
    """Tells the lines that surprise more than most of the lines before them.

    Args:
        share: of the last lines, how many may have surprised more.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    @property
    def is_ready(self) -> bool:
        """Whether there are enough lines before."""
        return len(self._sorted) >= FEWEST

    def sees(self, line: Line) -> bool:
        """Whether this line is one; it is then one of those before."""
        most = math.floor(self._share * len(self._sorted))  # lines that may surprise more
        bound = math.inf if not self.is_ready else self._sorted[-1 - most] if most < len(self._sorted) else -math.inf
        self._last.append(line.surprise)
        insort(self._sorted, line.surprise)
        if len(self._last) > _KNOWN:
            self._sorted.remove(self._last.popleft())
        return line.surprise > bound
