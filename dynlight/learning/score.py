"""Score: what one `training_step` committed."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dynlight.documents.segments import Segment
from dynlight.learning.digests import WeightDigests


@dataclass(frozen=True)
class ExpertScores:
    """The nats and weights of each expert of a mixture on a segment: static, teacher, rules, memories, those that there are.

    Shapes: E experts, D documents, S columns of the segment.
    """

    nats: np.ndarray  # [E, D, S], float32, with memories float64; NaN where an expert has failed
    weights: np.ndarray  # float64 [E, D], each expert's mean weight in the mixture over the segment
    learners: np.ndarray  # bool [rules, D], whether the rule still learned from the document
    remembered: list[int]  # [D], the tokens that memories knew before the segment


class Digests(NamedTuple):
    """Digests of each document's learned weights, before they scored a segment and after they learned from it.

    Those after come from the device with the next segment's nats: who asks for their names at once waits for them.
    """

    before: WeightDigests
    after: WeightDigests


@dataclass(frozen=True)
class Score:
    """What one `training_step` committed, and what it did; meters read it.

    Shapes: D documents of the segment, S columns. All is on the host, but for the segment's own tensors.
    """

    segment: Segment
    rows: list[int]  # the rows that count: those of documents that have not stopped
    nats: Tensor  # fp32 [D, S]: 0 in columns not scored; of a mixture float64
    static_nats: Tensor | None  # fp32 [D, S]
    teacher_nats: Tensor | None  # fp32 [D, S]
    sums: list[float]  # nats of each row, summed in float64
    static_sums: list[float] | None
    teacher_sums: list[float] | None
    experts: ExpertScores | None = None
    by_static: frozenset[int] = frozenset()  # rows that the initial weights have taken over
    # Made by each rule from each document, int64 [rules, D].
    updates: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    reread: range = range(0)  # the segments that were read again for a memory by the present weights
    stopped: frozenset[int] = frozenset()  # learned weights, by their place, that the backward left out
    seconds: dict[str, float] = field(default_factory=dict)  # static, teacher, scoring, learning
    digests: Digests | None = None  # where they are asked for

    @classmethod
    def of(
        cls,
        segment: Segment,
        nats: Tensor,
        static_nats: Tensor | None,
        teacher_nats: Tensor | None,
        experts: ExpertScores | None,
    ) -> Self:
        """The score of a segment, as if none of the documents had stopped."""
        of_tokens = nats, static_nats, teacher_nats
        own, static, teacher = (None if each is None else _sums_of_rows(each) for each in of_tokens)
        assert own is not None
        return cls(segment, [*range(len(segment.documents))], *of_tokens, own, static, teacher, experts)

    def updates_of(self, row: int) -> list[int]:
        """Updates that each rule made from a row."""
        updates: list[int] = self.updates[:, row].tolist()
        return [0] * len(updates) if row in self.by_static else updates


def _sums_of_rows(nats: Tensor) -> list[float]:
    sums: list[float] = nats.sum(dim=1, dtype=torch.float64).tolist()
    return sums
