"""Subject: a scorer under audit, what is known of it, and what a check says of it."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dynlight.errors import SettingError

Tokens = list[int]
Nats = np.ndarray
Scorer = Callable[[list[Tokens]], Sequence[Sequence[float]]]
Policy = Literal["document", "stream"]
Verdict = Literal["passed", "failed", "reported", "undecided", "not tried"]


@dataclass(frozen=True)
class Place:
    """Where a deviation shows: a document, and one of its tokens if the deviation is a token's."""

    document: int
    token: int | None = None

    def __str__(self) -> str:
        return f"document {self.document}" + (f", token {self.token}" if self.token is not None else "")


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `deviation` is the largest that was seen, and `tolerance` the largest that an honest scorer may show, in the check's
    own unit: nats, a sum of probabilities, or a count.
    """

    name: str
    verdict: Verdict
    tried: str
    deviation: float | None = None
    tolerance: float | None = None
    where: Place | None = None
    note: str = ""


@dataclass
class Worst:
    """The largest deviation so far, and its place."""

    deviation: float = 0.0
    where: Place | None = None

    def see(self, deviation: float, where: Place | None) -> None:
        """Takes one more deviation into account; NaN counts as infinite."""
        deviation = math.inf if math.isnan(deviation) else deviation
        if deviation > self.deviation:
            self.deviation, self.where = deviation, where

    def compare(self, found: Nats, expected: Nats, document: int, upto: int | None = None) -> None:
        """Compares the nats of a document's first `upto` tokens (default: of all)."""
        if upto is None and len(found) != len(expected):
            self.see(math.inf, Place(document, min(len(found), len(expected))))
        shared = min(len(found), len(expected)) if upto is None else upto
        if min(len(found), len(expected)) < shared:
            self.see(math.inf, Place(document, min(len(found), len(expected))))
            return
        if shared:
            with np.errstate(invalid="ignore"):
                differences = np.abs(found[:shared] - expected[:shared])
            differences[np.isnan(differences)] = math.inf
            token = int(differences.argmax())
            self.see(float(differences[token]), Place(document, token))

    def check(self, name: str, tried: str, tolerance: float, note: str = "") -> Check:
        """The verdict: failed where the deviation is above the tolerance."""
        failed = self.deviation > tolerance
        return Check(name, "failed" if failed else "passed", tried, self.deviation, tolerance, self.where, note)


@dataclass
class Subject:
    """A scorer under audit, the documents it is tried on, and what is known of it."""

    scorer: Scorer
    documents: list[Tokens]
    vocabulary: int
    policy: Policy = "document"
    tolerance: float = 1e-3
    segment: int | None = None
    learns: Callable[[int], bool] = lambda segment: True
    seed: int = 0
    noise: float = 0.0
    calls: int = field(default=0, init=False)

    def score(self, documents: list[Tokens]) -> list[Nats]:
        """The nats of each document, as the scorer gives them."""
        self.calls += 1
        scored = self.scorer([list(tokens) for tokens in documents])
        if len(scored) != len(documents):
            raise SettingError("scorer", f"return nats for each of {len(documents)} documents", got=len(scored))
        return [np.asarray(nats, dtype=np.float64).reshape(-1) for nats in scored]

    @cached_property
    def nats(self) -> list[Nats]:
        """The nats of the documents themselves."""
        return self.score(self.documents)

    @property
    def allowed(self) -> float:
        """The largest deviation that passes: the tolerance, or four times the noise where that is larger."""
        return max(self.tolerance, 4 * self.noise)

    def random(self, *salt: object) -> random.Random:
        """A source of random numbers that depends on the seed and on what it is for."""
        return random.Random(repr((self.seed, *salt)))

    def replaced(self, tokens: Tokens, *salt: object, start: int = 0) -> Tokens:
        """The tokens with all from `start` on replaced, each by another one."""
        chance = self.random("replaced", start, *salt)
        shifted = [(token + chance.randrange(1, self.vocabulary)) % self.vocabulary for token in tokens[start:]]
        return tokens[:start] + shifted

    def positions(self, tokens: Tokens) -> list[int]:
        """Positions just before, within and just after segments that are learned from; else spread over the document.

        They lie around the first two segments that are learned from, as the second is scored by what the first taught:
        the last position before a segment, its first, middle and last one, and the first after it.
        """
        length = len(tokens)
        if self.segment is None:
            return sorted({round(i * (length - 1) / 8) for i in range(9)}) if length else []
        learned = [i for i in range(-(-length // self.segment)) if self.learns(i)][:2]
        near = {0, length - 2, length - 1}
        for index in learned or [0, 1]:
            begin = index * self.segment
            near |= {begin - 1, begin, begin + self.segment // 2, begin + self.segment - 1, begin + self.segment}
        return sorted(position for position in near if 0 <= position < length)

    def few_positions(self, tokens: Tokens, count: int) -> list[int]:
        """The last `count` of the positions that lie in segments that are learned from and have tokens behind."""
        within = [t for t in self.positions(tokens) if 0 < t < len(tokens) - 1 and self._is_learned(t)]
        return within[-count:]

    def _is_learned(self, position: int) -> bool:
        return self.segment is None or self.learns(position // self.segment)


def as_dictionary(check: Check) -> dict[str, Any]:
    """The check for a machine; numbers that are not finite become text, as JSON has none."""

    def plain(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else str(value)

    where = None if check.where is None else {"document": check.where.document, "token": check.where.token}
    numbers = {"deviation": plain(check.deviation), "tolerance": plain(check.tolerance)}
    return {
        "name": check.name,
        "verdict": check.verdict,
        "tried": check.tried,
        **numbers,
        "where": where,
        "note": check.note,
    }
