"""Gradient: what becomes of the gradient before the update. A new choice is a class with `change`.

Each row (one rule's learning from one document) has a gradient of its own, and what becomes of it depends on that row
alone. Changes are made one after another, in the order of the list.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dynlight.choices.update import GradientStatistics
from dynlight.errors import require


@dataclass(frozen=True)
class RowGradients:
    """The gradients of all rows, to be changed in place.

    Shapes: R rows; of each learned weight [R, *shape].
    """

    of_weights: dict[int, Tensor]  # by the weight's place among those that learn; only those that have a gradient
    norms: Callable[[], Tensor]  # ‖g‖₂ over all weights, [R]
    errors: list[Tensor] = field(default_factory=list)  # of each learned weight, where the change keeps errors
    absent: int = 0  # numbers of weights that have stopped learning, and have no gradient here


class Gradient(ABC):
    """Changes the gradient before the update."""

    keeps_errors = False  # whether it carries on, from update to update, what it has left out
    needs_whole_weights = True  # whether it must see a weight's whole gradient, not the shard of a device
    statistics: GradientStatistics | None = None  # what it must know before the first update

    def use_statistics(self, mean_squares: Sequence[Tensor]) -> None:  # noqa: B027 - most ask for nothing
        """Takes what `statistics` asks for: MS of each learned weight, in their order."""

    @abstractmethod
    def change(self, gradients: RowGradients) -> None:
        """Changes the gradients in place, each row by itself."""


class Clip(Gradient):
    """Scales a gradient that is too large.

    Formula: g ← g · min(1, norm / ‖g‖₂), over all weights of a row. Source: Pascanu et al. 2013 (arXiv 1211.5063).

    Args:
        norm: the largest norm, above 0.

    Raises:
        SettingError: if it is not above 0.
    """

    needs_whole_weights = False

    def __init__(self, norm: float) -> None:
        require(norm > 0, "gradient.norm", "be above 0", got=norm, advice="leave Clip out for no bound")
        self.norm = norm

    def change(self, gradients: RowGradients) -> None:
        scale = (self.norm / (gradients.norms() + 1e-6)).clamp(max=1.0)
        for gradient in gradients.of_weights.values():
            gradient.mul_(_beside(scale, gradient))

    def __str__(self) -> str:
        return f"clipped to {self.norm:g}"


class Sparse(Gradient):
    """Keeps the gradient of the most important weights alone; the others are not learned.

    Formula: g ← m ∘ g, with m = 1 for the round(share · N) of a row's N weights that are greatest by |g| (chosen anew for each
    update) or by F = mean g² over a corpus (chosen once). Source of the latter: FISH, Sung et al. 2021 (arXiv 2111.09839).
    An update with momentum moves a weight for some time after it was chosen, and weight decay moves all.

    Args:
        share: of the weights, above 0 and at most 1.
        by: `gradient`, or `fisher`, which needs statistics.
        statistics: the corpus of which √F is taken, as for `RMSDynamic`.

    Raises:
        SettingError: if `share` is out of range, or statistics are given that nothing reads.
    """

    def __init__(
        self,
        share: float,
        by: Literal["gradient", "fisher"] = "gradient",
        statistics: GradientStatistics | None = None,
    ) -> None:
        require(0 < share <= 1, "gradient.share", "be above 0 and at most 1", got=share)
        require(by in ("gradient", "fisher"), "gradient.by", "be gradient or fisher", got=by)
        is_read = by == "fisher" or statistics is None
        require(is_read, "gradient.statistics", "be null where gradient.by is gradient", got="settings")
        self.share = share
        self.by = by
        self.statistics = (statistics or GradientStatistics()) if by == "fisher" else None
        self._masks: list[Tensor] = []  # of each learned weight, [*shape]

    def use_statistics(self, mean_squares: Sequence[Tensor]) -> None:
        self._masks = [mask[0] for mask in _greatest([each[None] for each in mean_squares], self.share)]

    def change(self, gradients: RowGradients) -> None:
        if self.share == 1:
            return
        places, values = zip(*gradients.of_weights.items(), strict=True)
        masks = (
            [self._masks[place] for place in places] if self._masks else _greatest(values, self.share, gradients.absent)
        )
        for gradient, mask in zip(values, masks, strict=True):
            gradient.mul_(mask)  # NaN stays NaN, so that a row that failed is noticed

    def __str__(self) -> str:
        return f"sparse to {100 * self.share:g}% by {self.by}"


class Compressed(Gradient):
    """Compresses the gradient as if it were to be sent, and adds what was lost to the next one.

    Formula: u = e + g; g ← C(u); e ← u − g, with e = 0 at first and, without feedback, always. Of each weight tensor, C keeps
    the round(share · n) of n numbers that are greatest by size; or rounds to `bits`: of 1 to sign(u) · mean|u|, of more to
    2^bits − 1 even levels from −max|u| to max|u|. In several processes (`ddp`) it is the average that is compressed, which
    saves nothing: for that there is the hook `compressed_hook`. Source: Stich et al. 2018 (arXiv 1809.07599), Karimireddy et al. 2019 (arXiv
    1901.09847).

    Args:
        share: of the numbers that are kept, above 0 and at most 1; null where `bits` is given.
        bits: of each number, 1 to 16; null where `share` is given.
        feedback: whether what was lost is added to the next gradient.

    Raises:
        SettingError: unless one of `share` and `bits` is given, and in range.
    """

    def __init__(self, share: float | None = None, bits: int | None = None, feedback: bool = True) -> None:
        both = f"share {share} and bits {bits}"
        require(
            (share is None) != (bits is None), "gradient.share", "be given, or gradient.bits, but not both", got=both
        )
        require(share is None or 0 < share <= 1, "gradient.share", "be above 0 and at most 1", got=share)
        require(isinstance(feedback, bool), "gradient.feedback", "be true or false", got="null")
        require(bits is None or 1 <= bits <= 16, "gradient.bits", "be from 1 to 16", got=bits)
        self.share = share
        self.bits = bits
        self.keeps_errors = feedback

    def change(self, gradients: RowGradients) -> None:
        for place, gradient in gradients.of_weights.items():
            wanted = gradient + gradients.errors[place] if self.keeps_errors else gradient
            gradient.copy_(self._compressed(wanted))
            if self.keeps_errors:
                torch.sub(wanted, gradient, out=gradients.errors[place])

    def _compressed(self, values: Tensor) -> Tensor:
        if self.share is not None:
            return values if self.share == 1 else values * _greatest([values], self.share)[0]
        assert self.bits is not None, "one of the two is given"
        sizes = values.abs().flatten(1)
        if self.bits == 1:
            return values.sign() * _beside(sizes.mean(dim=1), values)
        steps = 2 ** (self.bits - 1) - 1  # on either side of 0
        step = _beside(sizes.amax(dim=1), values) / steps
        return (values / step.clamp(min=torch.finfo(step.dtype).tiny)).round() * step

    def __str__(self) -> str:
        to = f"{100 * self.share:g}% of its numbers" if self.share is not None else f"{self.bits} bits"
        return f"compressed to {to}{' with feedback' if self.keeps_errors else ''}"


def _greatest(values: Sequence[Tensor], share: float, absent: int = 0) -> list[Tensor]:
    """Whether each number is among a share of its row's that are greatest by size, bool [R, *shape]; equal ones all are, 0 never.

    The share is of these and of `absent` zeros. Shapes: of each weight, values [R, *shape].
    """
    sizes = [each.abs() for each in values]
    flat = torch.cat([each.flatten(1) for each in sizes], dim=1)
    kept = min(flat.shape[1], max(1, round(share * (flat.shape[1] + absent))))
    least = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values
    return [(each >= _beside(least, each)) & ~(each == 0) for each in sizes]  # NaN is among them


def _beside(of_rows: Tensor, values: Tensor) -> Tensor:
    """A number of each row, [R], shaped so that it goes with values [R, *shape]."""
    return of_rows.view(-1, *[1] * (values.ndim - 1))
