"""Audit: whether the scores of a run, or of any scorer, are honest.

A scorer maps documents (lists of token ids) to lists of nats. `audit` tries a scorer from outside; `checks.py` says of each
check what it does, what follows from it, and what it cannot see.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from dynlight.auditing import checks
from dynlight.auditing.subject import Check, Policy, Scorer, Subject, Tokens, as_dictionary
from dynlight.errors import SettingError


@dataclass(frozen=True)
class Audit:
    """What an audit shows: `honest` unless a check failed; a check that was not tried proves nothing."""

    checks: tuple[Check, ...]
    calls: int  # of the scorer
    seconds: float

    @property
    def honest(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "failed" for check in self.checks)

    @property
    def streamable(self) -> bool:
        """Whether prefixes score as they do with their continuation."""
        check = self["truncation"]
        assert check.deviation is not None and check.tolerance is not None, "truncation always measures"
        return check.deviation <= check.tolerance

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def as_dictionary(self) -> dict[str, Any]:
        """The result for a machine, as in audit.json."""
        return {
            "honest": self.honest,
            "streamable": self.streamable,
            "checks": [as_dictionary(check) for check in self.checks],
            "calls": self.calls,
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> str:
        """The result for a person."""
        rows: list[tuple[str, ...]] = [("check", "what was tried", "worst", "tolerance", "verdict", "")]
        for check in self.checks:
            remarks = [f"at {check.where}" if check.verdict == "failed" and check.where else "", check.note]
            numbers = [_number(check.deviation), _number(check.tolerance)]
            rows.append((check.name, shorten(check.tried, 64, placeholder=" …"), *numbers, check.verdict,
                         "; ".join(filter(None, remarks))))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i in (2, 3) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, row[5]]).rstrip())
        rule = "─" * min(100, max(map(len, lines)))
        verdict = "honest: no check failed" if self.honest else "not honest"
        ending = f"{verdict} · {self.calls:,} calls of the scorer in {self.seconds:.0f} s"
        return "\n".join([lines[0], rule, *lines[1:], rule, ending])


def audit(
    scorer: Scorer,
    documents: Sequence[Sequence[int]],
    *,
    vocabulary: int,
    policy: Policy = "document",
    segment: int | None = None,
    learns: Callable[[int], bool] | None = None,
    make: Callable[[], Scorer] | None = None,
    texts: Sequence[str] | None = None,
    count: Callable[[list[str]], Sequence[tuple[Tokens, int]]] | None = None,
    tokenize: Callable[[str], Tokens] | None = None,
    sampler: Callable[[int, int], Sequence[tuple[Tokens, Sequence[float]]]] | None = None,
    guess: Callable[[Tokens], Sequence[float]] | None = None,
    rate_0: Scorer | None = None,
    static: Scorer | None = None,
    noisy: Scorer | None = None,
    long: Sequence[Tokens] = (),
    tolerance: float = 1e-3,
    exact: int = 512,
    samples: int = 96,
    positions: int = 6,
    seed: int = 0,
) -> Audit:
    """Audits a scorer from outside; see `checks.py` for what each check does and cannot see.

    The suffix check and the Kraft sum together are complete at the positions tested: nats that don't change with later
    tokens, and whose exp(−nats) add up to 1 over all tokens that might stand there, are those of a distribution fixed
    before its token was seen.

    Args:
        scorer: documents (lists of token ids) → nats of each token, a list a document.
        documents: what it is tried on, best of a few segments each, and of different lengths; some may have no or one
            token. Beside a single one another is read, of other tokens.
        vocabulary: how many tokens there are; ids are below it.
        policy: what a document's nats may depend on: `document`, itself; `stream`, also the documents before it.
        segment: tokens that are scored, and learned from, together, where that is known: positions are chosen by it.
        learns: segment's index → whether the segment is learned from (default: every one is).
        make: makes the scorer anew in a fresh process; a function that can be imported (`multiprocessing` pickles it).
        texts: for `count`; else a few with spaces, emoji and wide letters.
        count: what the scorer reads of texts: the ids and the bytes of each.
        tokenize: the ids of a text by the tokenizer alone.
        sampler: number, seed → documents drawn from the static model, each with the nats of its tokens.
        guess: prefix → chances of the next token by the static model, where the vocabulary is above `exact`.
        rate_0: the scorer at learning rate 0.
        static: the scorer with nothing learned.
        noisy: the scorer with noise of 1e-7 in its initial weights.
        long: longer documents, of dozens of segments, over which a difference can grow.
        tolerance: by how many nats a token may differ, and a Kraft sum from 1; a leak that gains less is not seen.
        exact: the largest vocabulary whose Kraft sum is made in full.
        samples: tokens drawn for an estimate of a Kraft sum.
        positions: positions of a document whose Kraft sum is made.
        seed: of every replacement.

    Raises:
        SettingError: if there is nothing to try the scorer on, or it doesn't return a list for each document.
    """
    token_lists = [[int(token) for token in tokens] for tokens in documents]
    if policy not in ("document", "stream"):
        raise SettingError("policy", "be document or stream", got=policy)
    all_tokens = {token for tokens in token_lists for token in tokens}
    if max(map(len, token_lists), default=0) < 2:
        raise SettingError("documents", "hold one of two tokens at least", got=f"lengths {[*map(len, token_lists)]}")
    if vocabulary < 2 or max(all_tokens) >= vocabulary or min(all_tokens) < 0:
        raise SettingError("vocabulary", "be above every token and at least 2", got=vocabulary)
    began = time.perf_counter()
    always = lambda index: True  # noqa: E731
    subject = Subject(scorer, token_lists, vocabulary, policy, tolerance, segment, learns or always, seed)
    if len(token_lists) == 1:
        token_lists.append(subject.replaced([*token_lists[0], 0], "beside"))
    # Before all other checks: a scorer's first call must read other tokens than its next, to show what it keeps.
    repeated = checks.repeat(subject, None if make is None else FreshProcess(make))
    results = (
        checks.coverage(subject, checks.PROBES if texts is None else texts, count, tokenize),
        repeated,
        checks.suffix(subject),
        checks.truncation(subject),
        checks.independence(subject),
        checks.kraft(subject, guess, exact, samples, samples, positions),
        checks.beat_the_truth(subject, sampler),
        checks.static_identity(subject, rate_0, static),
        checks.rounding(subject, noisy, long),
    )
    return Audit(results, subject.calls, time.perf_counter() - began)


class FreshProcess:
    """A scorer that is made anew, in a process of its own, for each call."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self.make = make

    def __call__(self, documents: list[Tokens]) -> Sequence[Sequence[float]]:
        # spawn: a forked process would inherit what the scorer holds in memory.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_make_and_score, (self.make, documents))


def _make_and_score(make: Callable[[], Scorer], documents: list[Tokens]) -> list[list[float]]:
    return [[float(value) for value in nats] for nats in make()(documents)]


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    return f"{value:.2g}" if value else "0"
