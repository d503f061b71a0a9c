"""Waves: documents that begin together, and their segments one after another.

The documents of a wave are sorted longest first, so those still running at segment i are always its first ones: a
finished document is sliced off, never masked. Tokens that a forward scores must be equally many in every row, so a
document's short last segment is a forward of its own; these come first, and those who go on come last.

    wave of lengths 10, 7, 3 with segment 4:
    segment 0   row 2 (3 tokens)      rows 0–1 (4 tokens)
    segment 1   row 1 (3 tokens)      row 0 (4 tokens)
    segment 2   row 0 (2 tokens)
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynlight.context import Context, Cut

if TYPE_CHECKING:
    from dynlight.documents import Document

Wave = tuple["Document", ...]


@dataclass(frozen=True)
class Segment:
    """One segment of those documents of a wave for which it has equally many tokens.

    Shapes: D documents, C context tokens, S scored tokens.
    """

    documents: Wave
    rows: slice  # their rows in the wave
    running: int  # documents of the wave that run at this position
    cut: Cut
    inputs: Tensor  # int64 [D, C + S], what the forward reads
    targets: Tensor  # int64 [D, S], the tokens scored
    bytes: tuple[int, ...]  # UTF-8 bytes that the scored tokens of each document stand for

    @property
    def is_first(self) -> bool:
        """Whether this is the first forward of its wave."""
        return self.cut.index == 0 and self.rows.stop == self.running

    @property
    def finished(self) -> Wave:
        """The documents that end here."""
        return tuple(document for document in self.documents if len(document) == self.cut.stop)

    def begin(self, tokens: int) -> "Segment":
        """The same segment up to its first `tokens` scored tokens; its bytes are those of the whole."""
        cut = self.cut._replace(stop=self.cut.start + tokens)
        return replace(self, cut=cut, inputs=self.inputs[:, : cut.context + tokens], targets=self.targets[:, :tokens])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segment":
        """The same segment with its tensors on `device`; Lightning calls this."""
        if self.inputs.device == device:
            return self
        inputs = self.inputs.to(device, non_blocking=non_blocking)
        return replace(self, inputs=inputs, targets=self.targets.to(device, non_blocking=non_blocking))


def waves(documents: Sequence["Document"], together: int = 1) -> list[Wave]:
    """Documents in waves of `together` of like length, longest first; one at a time they keep their given order.

    Documents without tokens have nothing to score and are in no wave.
    """
    running = [document for document in documents if len(document)]
    if together > 1:
        running.sort(key=lambda document: (-len(document), document.index))
    return [tuple(running[i : i + together]) for i in range(0, len(running), together)]


def deal(documents: Sequence["Document"], ranks: int) -> list[list["Document"]]:
    """The documents of each of `ranks` processes, in their given order, so that the longest share is hardly over the mean.

    The longest document not dealt yet goes to the share with the fewest tokens. Then, while the longest share is more
    than 5% over the mean, it exchanges a document with another share, or gives one away, where that shortens it.
    """
    shares: list[list[Document]] = [[] for _ in range(ranks)]
    fewest = [(0, rank) for rank in range(ranks)]
    for document in sorted(documents, key=lambda document: (-len(document), document.index)):
        tokens, rank = fewest[0]
        shares[rank].append(document)
        heapq.heapreplace(fewest, (tokens + len(document), rank))
    while _shorten_longest(shares):
        pass
    return [sorted(share, key=lambda document: document.index) for share in shares]


def _shorten_longest(shares: list[list["Document"]]) -> bool:
    """Makes the exchange that levels the longest share best; False where none is needed or helps."""
    tokens = [sum(map(len, share)) for share in shares]
    most = max(tokens)
    longest = tokens.index(most)
    if most * len(shares) <= 1.05 * sum(tokens):
        return False
    best: tuple[int, int, Document, Document | None] | None = None
    for rank, share in enumerate(shares):
        for given in shares[longest]:
            for taken in (None, *share):
                moved = len(given) - (len(taken) if taken else 0)
                level = max(most - moved, tokens[rank] + moved)
                if rank != longest and level < (best[0] if best else most):
                    best = level, rank, given, taken
    if best is None:
        return False
    _, rank, given, taken = best
    shares[longest].remove(given)
    shares[rank].append(given)
    if taken is not None:
        shares[rank].remove(taken)
        shares[longest].append(taken)
    return True


def segments(wave: Wave, context: Context, skip: int = 0) -> Iterator[Segment]:
    """The segments of a wave, position by position; together they score each token of it exactly once.

    Args:
        wave: the documents.
        context: what cuts them into segments.
        skip: how many to leave out, from the first.
    """
    sequences: list[Tensor] = []
    for cut, rows, running in islice(_cuts(wave, context), skip, None):
        if not sequences:  # none are made of a wave that is skipped
            sequences = [
                torch.cat([document.tokens.new_tensor([document.prefix]), document.tokens]) for document in wave
            ]
        read = slice(cut.start - cut.context, cut.stop)
        scored = slice(cut.start + 1, cut.stop + 1)
        yield Segment(
            documents=wave[rows],
            rows=rows,
            running=running,
            cut=cut,
            inputs=torch.stack([sequence[read] for sequence in sequences[rows]]),
            targets=torch.stack([sequence[scored] for sequence in sequences[rows]]),
            bytes=tuple(int(document.byte_ends[cut.stop] - document.byte_ends[cut.start]) for document in wave[rows]),
        )


def _cuts(wave: Wave, context: Context) -> Iterator[tuple[Cut, slice, int]]:
    """Of each segment its cut, its rows, and how many documents run at its position."""
    for cut in context.cuts(len(wave[0])):
        running = [document for document in wave if len(document) > cut.start]
        stops = [min(cut.stop, len(document)) for document in running]
        row = len(running)
        for stop, group in groupby(reversed(stops)):
            rows = slice(row - len(list(group)), row)
            row = rows.start
            yield Cut(cut.index, cut.start, stop, context.context(cut.start, stop)), rows, len(running)


class SegmentStream:
    """All segments of all waves in the order in which they are scored and learned from.

    Args:
        waves: the documents.
        context: what cuts them into segments.
        rounds: after its own segments it yields empty ones, until there are as many as this.
        skip: how many segments to leave out, from the first.
    """

    def __init__(self, waves: Sequence[Wave], context: Context, rounds: int = 0, skip: int = 0) -> None:
        self.waves = waves
        self.context = context
        self.rounds = rounds
        self.skip = skip

    def __iter__(self) -> Iterator[Segment]:
        skip = self.skip
        for wave in self.waves:
            yield from segments(wave, self.context, skip)
            skip = max(0, skip - count_segments([wave], self.context)) if skip else 0
        for _ in range(self.rounds - count_segments(self.waves, self.context) if self.rounds else 0):
            yield _empty_segment()


def count_segments(waves: Sequence[Wave], context: Context) -> int:
    """Segments of waves."""
    return sum(1 for wave in waves for _ in _cuts(wave, context))


def _empty_segment() -> Segment:
    """A segment without documents, with which nothing begins and nothing ends."""
    nothing = torch.empty(0, 0, dtype=torch.int64)
    return Segment((), slice(0, 0), running=0, cut=Cut(1, 0, 0, 0), inputs=nothing, targets=nothing, bytes=())
