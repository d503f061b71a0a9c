"""Segments: the tokens that are scored together, and the context, which cuts a document into segments.

Token numbers count the document's own tokens from 0; the prefix (BOS, else EOS) is the input from which token 0 is
predicted, so a forward that scores tokens `start … stop − 1` reads the inputs `start … stop − 1` of the sequence (prefix,
token 0, token 1, …), and before them what the context adds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dynlight.documents.document import Document
from dynlight.errors import require_at_least

Wave = tuple[Document, ...]  # documents that begin at the same time, longest first
NOT_SCORED = -100  # a target that cross-entropy ignores: 0 nats and no gradient


class Cut(NamedTuple):
    """Where one segment lies: it scores tokens `start … stop − 1` after reading `context` inputs again."""

    index: int  # type: ignore[assignment] # hides `tuple.index`, which nothing here calls
    start: int
    stop: int
    context: int


class Context(ABC):
    """Cuts a document into segments of `segment` tokens; subclasses say what else a forward has in view."""

    def __init__(self, segment: int) -> None:
        require_at_least("context.segment", 1, segment)
        self.segment = segment

    @property
    def memory(self) -> int | None:
        """Positions whose keys and values are carried over; None: nothing is carried and positions restart at 0."""
        return None

    @property
    def sinks(self) -> int:
        """How many of these positions are left to the first tokens of the document, once they would drop out."""
        return 0

    @property
    def refresh(self) -> int | None:
        """After how many updates the memory is made anew by the present weights; None: never."""
        return None

    def kept(self, stop: int) -> int | None:
        """Of how many positions keys and values are carried on behind token `stop`, sinks left out."""
        return self.memory if self.memory is None or stop <= self.memory else self.memory - self.sinks

    @property
    def prefixes(self) -> bool:
        """Whether the first input of every forward is the prefix, in the place of the token there."""
        return False

    def context(self, start: int, stop: int) -> int:
        """Inputs read again before the segment `start … stop − 1`, in tokens."""
        return 0

    def cuts(self, tokens: int) -> Iterator[Cut]:
        """The segments of a document of `tokens` tokens, in order; together they score each token exactly once."""
        for index, start in enumerate(range(0, tokens, self.segment)):
            stop = min(start + self.segment, tokens)
            yield Cut(index, start, stop, self.context(start, stop))

    @abstractmethod
    def check(self, config: PretrainedConfig) -> None:
        """Raises SettingError where a model of this configuration cannot be read with this context."""


@dataclass(frozen=True)
class Segment:
    """One segment of those documents of a wave that have not ended before it.

    Shapes: D documents, C context tokens, S columns, of which each document scores those of its slice `scored`.
    """

    documents: Wave
    cut: Cut  # of the columns: a document that ends among them scores fewer
    inputs: Tensor  # int64 [D, C + S], what the forward reads
    targets: Tensor  # int64 [D, S], the tokens scored, else NOT_SCORED
    scored: tuple[slice, ...]  # of each document, the columns that it scores
    bytes: tuple[int, ...]  # UTF-8 bytes that the scored tokens of each document stand for
    sinks: Tensor | None = (
        None  # int64 [D, sinks], the first inputs of each document, where they are no longer in memory
    )

    @property
    def is_first(self) -> bool:
        """Whether this is the first forward of its wave."""
        return self.cut.index == 0

    @property
    def finished(self) -> Wave:
        """The documents that end with this segment."""
        return tuple(document for document in self.documents if len(document) <= self.cut.stop)

    @property
    def tokens(self) -> list[int]:
        """How many tokens of each document are scored."""
        return [columns.stop - columns.start for columns in self.scored]

    def head(self, columns: int) -> "Segment":
        """The first `columns` columns as a segment, whose `scored` and `bytes` stay those of the whole segment."""
        cut = self.cut._replace(stop=self.cut.start + columns)
        return replace(self, cut=cut, inputs=self.inputs[:, : cut.context + columns], targets=self.targets[:, :columns])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segment":
        """The same segment with its tensors on `device`; Lightning calls this."""
        if self.inputs.device == device:
            return self
        segment = self
        if device.type == "cuda" and self.inputs.device.type == "cpu":  # else the host would wait for the device
            non_blocking, segment = True, self.changed(Tensor.pin_memory)
        return segment.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Segment":
        """The same segment with each of its tensors changed."""
        sinks = None if self.sinks is None else change(self.sinks)
        return replace(self, inputs=change(self.inputs), targets=change(self.targets), sinks=sinks)


def empty_segment() -> Segment:
    """A segment without documents, with which no wave begins and no document ends."""
    nothing = torch.empty(0, 0, dtype=torch.int64)
    return Segment((), Cut(1, 0, 0, 0), inputs=nothing, targets=nothing, scored=(), bytes=())
