"""Waves: documents that begin together, and their segments one after another.

The documents of a wave are sorted longest first, so those still running at segment i are always its first ones: a
finished document is sliced off. All that run are read in one forward, so their inputs must be equally long: where a
document ends within the segment, filler follows it in its row up to the end of the segment.

    wave of lengths 10, 7, 3 with segment 4; · is filler:
    segment 0   row 0 (0 1 2 3)   row 1 (0 1 2 3)   row 2 (0 1 2 ·)
    segment 1   row 0 (4 5 6 7)   row 1 (4 5 6 ·)
    segment 2   row 0 (8 9 · ·)

The model needs no mask: it is causal, so no token of a document sees the filler behind it, and filler is neither scored
nor learned from. The model reads it nevertheless, and its FLOPs are counted. Rows are filled to a whole segment; the row
of a document shorter than one segment is filled to the next power of two, and a wave holds only documents whose rows are
filled to the same length. So neighbours change neither the shapes nor the FLOPs of a document, and filler less than
doubles its cost. Where documents are read one at a time, no row is filled.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor

from dynlight.documents.document import Document
from dynlight.documents.segments import NOT_SCORED, Context, Cut, Segment, Wave, empty_segment


def waves(documents: Sequence[Document], context: Context, together: int = 1) -> list[Wave]:
    """Documents in waves of `together`, longest first; one at a time, documents keep their given order.

    A document without tokens has nothing to score and is in no wave.
    """
    running = [document for document in documents if len(document)]
    if together == 1:
        return [(document,) for document in running]
    running.sort(key=lambda document: (-len(document), document.index))
    alike = (list(group) for _, group in groupby(running, key=lambda document: _filled_columns(document, context)))
    return [tuple(group[i : i + together]) for group in alike for i in range(0, len(group), together)]


def _filled_columns(document: Document, context: Context) -> int:
    """The columns to which a document's row is filled in each of its segments."""
    return min(context.segment, 1 << (len(document) - 1).bit_length())


def deal(documents: Sequence[Document], ranks: int) -> list[list[Document]]:
    """Deals documents to `ranks` processes, whose shares keep the given order and are nearly equally long.

    The longest document not dealt yet goes to the share with the fewest tokens. Then, while the longest share is more
    than 5% over the mean, it exchanges a document with another share, or gives one to it, where that shortens it.
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
    """Makes the exchange that levels the longest share best; returns False where none is needed or none helps."""
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
    """The segments of a wave, in order; together they score each of its tokens exactly once.

    Args:
        wave: the documents.
        context: what cuts them into segments.
        skip: how many segments to leave out, from the first.
        fills: whether rows are filled, even where no neighbour is longer.
    """
    sequences: list[Tensor] = []
    for cut in islice(context.cuts(len(wave[0])), skip, None):
        if not sequences:  # here, as a wave that is skipped needs none
            sequences = [
                torch.cat([document.tokens.new_tensor([document.prefix]), document.tokens]) for document in wave
            ]
        if fills:
            stop = cut.start + _filled_columns(wave[0], context)
            cut = cut._replace(stop=stop, context=context.context(cut.start, stop))
        yield _segment(tuple(document for document in wave if len(document) > cut.start), cut, sequences, context)


def segments_behind(document: Document, tokens: range, index: int, context: Context) -> Iterator[Segment]:
    """The segments of these tokens of a document, the first of them with this index, and cut at the first token."""
    sequence = torch.cat([document.tokens.new_tensor([document.prefix]), document.tokens])
    for cut in context.cuts(len(tokens)):
        first, stop = tokens.start + cut.start, tokens.start + cut.stop
        own = Cut(index + cut.index, first, stop, context.context(first, stop))
        yield _segment((document,), own, [sequence], context)


def earlier_segment(segment: Segment, index: int, context: Context) -> Segment:
    """The segment of an earlier index of the same documents, on the host."""
    start = index * context.segment
    cut = Cut(index, start, start + context.segment, context.context(start, start + context.segment))
    sequences = [torch.cat([each.tokens.new_tensor([each.prefix]), each.tokens]) for each in segment.documents]
    return _segment(segment.documents, cut, sequences, context)


def _segment(documents: Wave, cut: Cut, sequences: Sequence[Tensor], context: Context) -> Segment:
    """The segment at a cut, from the sequence (prefix, token 0, token 1, …) of each document."""
    columns = cut.stop - cut.start
    inputs = sequences[0].new_full((len(documents), cut.context + columns), documents[0].prefix)
    targets = sequences[0].new_full((len(documents), columns), NOT_SCORED)
    scored, nbytes = [], []
    for row, (document, sequence) in enumerate(zip(documents, sequences, strict=False)):
        start, stop = cut.start, min(cut.stop, len(document))
        # A document that ends here may have more context than its neighbours; its scored columns then begin later.
        tokens_again = context.context(start, stop)
        place = slice(tokens_again - cut.context, tokens_again - cut.context + stop - start)
        inputs[row, : tokens_again + stop - start] = sequence[start - tokens_again : stop]
        if context.prefixes:
            inputs[row, 0] = document.prefix
        targets[row, place] = sequence[start + 1 : stop + 1]
        scored.append(place)
        nbytes.append(int(document.byte_ends[stop] - document.byte_ends[start]))
    sinks = None
    if context.memory is not None and context.sinks and cut.start > context.memory:
        sinks = torch.stack([sequence[: context.sinks] for sequence in sequences[: len(documents)]])
    return Segment(documents, cut, inputs, targets, tuple(scored), tuple(nbytes), sinks)


class SegmentStream:
    """All segments of all waves in the order in which they are scored and learned from.

    Args:
        waves: the documents.
        context: what cuts them into segments.
        rounds: how many segments to yield at least; empty ones make up for those that the waves lack.
        skip: how many segments to leave out, from the first.
        fills: whether rows are filled, as they are where documents are read together.
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
    """How many segments the waves have."""
    return sum(-(-len(wave[0]) // context.segment) for wave in waves)
