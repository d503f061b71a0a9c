"""Objective: what is learned from a segment. A new choice is a class with `losses`.

The score of a segment is always the nats of its tokens; the objective is what the gradient is taken of. Each row (one
rule's learning from one document) has a loss of its own, made of that row alone.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

from dynlight.errors import require, require_at_least


@dataclass(frozen=True)
class Forward:
    """What the rows make of a segment, in one forward with a graph.

    Shapes: R rows, S columns.
    """

    nats: Tensor  # of each token, fp32 [R, S]; 0 in columns not scored
    scored: Tensor  # which columns each row scores, bool [R, S]
    surprise: Tensor  # at which each token was scored, constants; in the first pass the numbers of `nats`
    divergences: Tensor | None = None  # KL(guide ‖ row) of each token, fp32 [R, S]; of no meaning in columns not scored

    def mean(self, of_tokens: Tensor) -> Tensor:
        """The mean of a number of each token over those that a row scores, [R, S] → [R]."""
        return of_tokens.sum(dim=1) / self.scored.sum(dim=1)


class Objective(ABC):
    """Says what the gradient of a segment is taken of."""

    guide: Literal["initial", "teacher"] | None = None  # whose prediction of each token `divergences` are from
    temperature = 1.0  # by which the logits of both are divided for these
    replayed_share = 0.0  # of the loss, that segments of the document read again have

    def replayed(self, index: int) -> list[int]:
        """Which earlier segments of the document are learned from again, beside the segment of this index."""
        return []

    @abstractmethod
    def losses(self, read: Forward) -> Tensor:
        """The loss of each row, [R], of which the gradient is taken."""

    def learns(self, nats: Tensor) -> bool:
        """Whether a row learns from a segment at all, from the nats of its scored tokens, [S]."""
        return True


class NextToken(Objective):
    """The mean nats of the segment's tokens.

    Formula: loss = Σ_t −ln p(x_t) / S.
    """

    def losses(self, read: Forward) -> Tensor:
        return read.mean(read.nats)

    def __str__(self) -> str:
        return "every token"


class Anchored(Objective):
    """The mean nats of the segment's tokens, and how far the model's predictions have gone from those of the initial weights.

    Formula: loss = Σ_t (−ln p(x_t) + weight · KL(p0 ‖ p)) / S, with p0 what θ0 predicts behind the same window. A guard against
    learning too much from one segment; θ0 has read the segment anyway, as the reference. Source: Li & Hoiem 2016
    (arXiv 1606.09282).

    Args:
        weight: of the divergence, at least 0.

    Raises:
        SettingError: if it is negative or not finite.
    """

    guide = "initial"

    def __init__(self, weight: float) -> None:
        require(0 <= weight < math.inf, "objective.weight", "be at least 0 and finite", got=weight)
        self.weight = weight

    def losses(self, read: Forward) -> Tensor:
        assert read.divergences is not None, "it has a guide"
        return read.mean(read.nats + self.weight * torch.where(read.scored, read.divergences, 0.0))

    def __str__(self) -> str:
        return f"every token, anchored to the initial weights by {self.weight:g}"


class Distilled(Objective):
    """The mean nats of the segment's tokens, and how far the model's predictions are from a teacher's.

    Formula: loss = Σ_t ((1 − share) · −ln p(x_t) + share · T² · KL(q_T ‖ p_T)) / S, with q what the `teacher` predicts behind the
    same window, and both softmaxes of logits divided by T. Sources: Hinton et al. 2015 (arXiv 1503.02531); online, on the text
    that comes in: Liu et al. 2024 (arXiv 2310.07177).

    Args:
        share: of the divergence, from 0 to 1.
        temperature: T, above 0.

    Raises:
        SettingError: if a number is out of range.
    """

    guide = "teacher"

    def __init__(self, share: float = 0.5, temperature: float = 1.0) -> None:
        require(0 <= share <= 1, "objective.share", "be from 0 to 1", got=share)
        require(0 < temperature < math.inf, "objective.temperature", "be above 0 and finite", got=temperature)
        self.share = share
        self.temperature = temperature

    def losses(self, read: Forward) -> Tensor:
        assert read.divergences is not None, "it has a guide"
        apart = self.temperature**2 * torch.where(read.scored, read.divergences, 0.0)
        return read.mean((1 - self.share) * read.nats + self.share * apart)

    def __str__(self) -> str:
        temperature = "" if self.temperature == 1 else f" at temperature {self.temperature:g}"
        return f"every token, {100 * self.share:g}% from the teacher{temperature}"


class Replayed(Objective):
    """The mean nats of the segment's tokens, and of some earlier segments of the document that are read again.

    Formula: loss = (1 − share) · L_i + share · mean_j L_j, with L the mean nats of a segment under the present weights and j drawn
    evenly from the segments before i, anew for each i. They are read without a memory, as they would be at the beginning of
    one, and are not scored again. The draw depends on `seed` and i alone, so it is the same for every document. Source: Robins
    1995, "Catastrophic forgetting, rehearsal and pseudorehearsal".

    Args:
        segments: how many are read again; while there are fewer, all of them.
        share: of the loss that they have, at least 0 and under 1.
        seed: of the draw.

    Raises:
        SettingError: if a number is out of range.
    """

    def __init__(self, segments: int = 1, share: float = 0.5, seed: int = 0) -> None:
        require_at_least("objective.segments", 1, segments)
        require(0 <= share < 1, "objective.share", "be at least 0 and under 1", got=share)
        self.segments = segments
        self.replayed_share = share
        self.seed = seed

    def replayed(self, index: int) -> list[int]:
        if self.replayed_share == 0:
            return []
        return Random(f"{self.seed} {index}").sample(range(index), min(self.segments, index))

    def losses(self, read: Forward) -> Tensor:
        return read.mean(read.nats)

    def __str__(self) -> str:
        return f"every token, {100 * self.replayed_share:g}% from {self.segments} earlier segments"


class Surprising(Objective):
    """The nats of what surprises: of tokens, or of segments, above a threshold; the more the further they are above.

    Formula: loss = Σ_t w_t · nats_t / n over the n tokens with nats_t > threshold, w_t = weight · exp(nats_t − threshold);
    of segments the same with the mean nats of the segment in the place of a token's. Weights are constants of the gradient.
    Where nothing is above the threshold there is no update. What is above it, and its weight, is known by the score: further passes
    learn from the same. Source: TLM, Hu et al. 2025 (arXiv 2505.20633).

    Args:
        threshold: in nats per token.
        weight: λ, above 0; null: all that is above the threshold weighs 1.
        of: `segments` as in the source, or `tokens`.

    Raises:
        SettingError: if a number is out of range.
    """

    def __init__(
        self, threshold: float, weight: float | None = None, of: Literal["segments", "tokens"] = "segments"
    ) -> None:
        require(not math.isnan(threshold), "objective.threshold", "be a number", got=threshold)
        require(weight is None or 0 < weight < math.inf, "objective.weight", "be above 0", got=weight,
                advice="choose null to weigh all alike")  # fmt: skip
        is_finite = weight is None or threshold > -math.inf
        require(is_finite, "objective.weight", "be null where objective.threshold is -.inf", got=weight)
        require(of in ("segments", "tokens"), "objective.of", "be segments or tokens", got=of)
        self.threshold = threshold
        self.weight = weight
        self.of = of

    def losses(self, read: Forward) -> Tensor:
        if self.of == "segments":
            return read.mean(read.nats) * self._weights(read.mean(read.surprise))
        above = read.scored & (read.surprise > self.threshold)
        weights = torch.where(above, self._weights(read.surprise), 0.0)
        return (weights * read.nats).sum(dim=1) / above.sum(dim=1)

    def _weights(self, surprise: Tensor) -> Tensor:
        """Of all that surprises so much, [R] or [R, S]."""
        if self.weight is None:
            return torch.ones_like(surprise)
        return self.weight * (surprise - self.threshold).exp()

    def learns(self, nats: Tensor) -> bool:
        surprise = nats.double().mean() if self.of == "segments" else nats.max()
        return bool(surprise > self.threshold)

    def __str__(self) -> str:
        weight = "" if self.weight is None else f", weight {self.weight:g}"
        return f"{self.of} above {self.threshold:g} nats a token{weight}"
