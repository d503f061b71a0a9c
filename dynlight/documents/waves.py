"""Waves: documents that begin together, and their segments one after another.

The documents of a wave are sorted longest first, so those still running at segment i are always its first ones: a
finished document is sliced off. All that run are read in one forward, so their inputs must be equally long; where a
document ends within the segment its row is filled on the right, up to the end of the segment:

    wave of lengths 10, 7, 3 with segment 4, · is filled:
    segment 0   row 0 (0 1 2 3)   row 1 (0 1 2 3)   row 2 (0 1 2 ·)
    segment 1   row 0 (4 5 6 7)   row 1 (4 5 6 ·)
    segment 2   row 0 (8 9 · ·)

No mask is needed in the model: it is causal, so no token of the document sees what is filled in behind it, and what is
filled in is neither scored nor learned from. It is read nevertheless, and its FLOPs are counted. How far a row is filled
depends on its document alone: always to a whole segment, or for a document shorter than one to a power of two, and only
documents that are filled alike are in one wave. So filling less than doubles what a document costs, and neighbours change
neither the shapes it is read in nor its FLOPs. Where documents are read one at a time, none is filled.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor

from dynlight.documents.document import Document
from dynlight.documents.segments import NOT_SCORED, Context, Cut, Segment, Wave, empty_segment


def waves(documents: Sequence[Document], context: Context, together: int = 1) -> list[Wave]:
    """Documents in waves of `together` of like length, longest first; one at a time they keep their given order.

    Documents without tokens have nothing to score and are in no wave.
    """
    running = [document for document in documents if len(document)]
    if together == 1:
        return [(document,) for document in running]
    running.sort(key=lambda document: (-len(document), document.index))
    alike = (list(group) for _, group in groupby(running, key=lambda document: _filled(document, context)))
    return [tuple(group[i : i + together]) for group in alike for i in range(0, len(group), together)]


def _filled(document: Document, context: Context) -> int:
    """The columns to which each of a document's segments is filled."""
    return min(context.segment, 1 << (len(document) - 1).bit_length())


def deal(documents: Sequence[Document], ranks: int) -> list[list[Document]]:
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


def _shorten_longest(shares: list[list[Document]]) -> bool:
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


def segments(wave: Wave, context: Context, skip: int = 0, fills: bool = False) -> Iterator[Segment]:
    """The segments of a wave, position by position; together they score each token of it exactly once.

    Args:
        wave: the documents.
        context: what cuts them into segments.
        skip: how many to leave out, from the first.
        fills: whether rows are filled, even where no neighbour needs it.
    """
    sequences: list[Tensor] = []
    for cut in islice(context.cuts(len(wave[0])), skip, None):
        if not sequences:  # none are made of a wave that is skipped
            sequences = [
                torch.cat([document.tokens.new_tensor([document.prefix]), document.tokens]) for document in wave
            ]
        if fills:
            stop = cut.start + _filled(wave[0], context)
            cut = cut._replace(stop=stop, context=context.context(cut.start, stop))
        yield _segment(tuple(document for document in wave if len(document) > cut.start), cut, sequences, context)


def _segment(documents: Wave, cut: Cut, sequences: Sequence[Tensor], context: Context) -> Segment:
    """A segment, from each document's prefix and tokens."""
    columns = cut.stop - cut.start
    inputs = sequences[0].new_full((len(documents), cut.context + columns), documents[0].prefix)
    targets = sequences[0].new_full((len(documents), columns), NOT_SCORED)
    scored, nbytes = [], []
    for row, (document, sequence) in enumerate(zip(documents, sequences, strict=False)):
        start, stop = cut.start, min(cut.stop, len(document))
        # A document that ends here may see more before its tokens than its neighbours: then these come in later columns.
        before = context.context(start, stop)
        place = slice(before - cut.context, before - cut.context + stop - start)
        inputs[row, : before + stop - start] = sequence[start - before : stop]
        targets[row, place] = sequence[start + 1 : stop + 1]
        scored.append(place)
        nbytes.append(int(document.byte_ends[stop] - document.byte_ends[start]))
    return Segment(documents, cut, inputs, targets, tuple(scored), tuple(nbytes))


class SegmentStream:
    """All segments of all waves in the order in which they are scored and learned from.

    Args:
        waves: the documents.
        context: what cuts them into segments.
        rounds: after its own segments it yields empty ones, until there are as many as this.
        skip: how many segments to leave out, from the first.
        fills: whether rows are filled, as where documents are read together.
    """

    def __init__(
        self, waves: Sequence[Wave], context: Context, rounds: int = 0, skip: int = 0, fills: bool = False
    ) -> None:
        self.waves = waves
        self.context = context
        self.rounds = rounds
        self.skip = skip
        self.fills = fills

    def __iter__(self) -> Iterator[Segment]:
        skip = self.skip
        for wave in self.waves:
            yield from segments(wave, self.context, skip, self.fills)
            skip = max(0, skip - count_segments([wave], self.context)) if skip else 0
        for _ in range(self.rounds - count_segments(self.waves, self.context) if self.rounds else 0):
            yield empty_segment()


def count_segments(waves: Sequence[Wave], context: Context) -> int:
    """Segments of waves."""
    return sum(-(-len(wave[0]) // context.segment) for wave in waves)
