"""Linear maps for documents that each have their own weights: gradients that lie in memory as the weights do.

`torch.func.vmap` makes of `F.linear` a batched product x Wᵀ, whose gradient for W is (xᵀ g)ᵀ: the same numbers as gᵀ x, but
transposed in memory. Where it is stored beside the weight all of it is copied, a quarter of the time
on short segments.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynlight.learning.mapped import is_mapped


class StackedLinear(nn.Linear):
    """A linear map y = x Wᵀ + b that under vmap is one product for all documents; otherwise PyTorch's own.

    Shapes: x [..., I], W [O, I], b [O] → y [..., O].
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The same linear map, with the same weights."""
        stacked = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        stacked.weight, stacked.bias = linear.weight, linear.bias
        return stacked

    def forward(self, x: Tensor) -> Tensor:
        if not is_mapped():
            return super().forward(x)
        y: Tensor = _Mapped.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Mapped(torch.autograd.Function):
    """x Wᵀ, whose rule under vmap is `_Product`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """No tensors are saved: the vmap rule uses only differentiable operators of torch, so autograd derives the gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> Any:
        dim, weight_dim = in_dims
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        if weight_dim is None:
            return linear(x, weight), 0
        if torch.is_autocast_enabled(x.device.type):  # autocast does not reach into `_Product`
            x, weight = (each.to(torch.get_autocast_dtype(x.device.type)) for each in (x, weight))
        y: Tensor = _Product.apply(x.reshape(info.batch_size, -1, x.shape[-1]), weight.movedim(weight_dim, 0))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1), 0


class _Product(torch.autograd.Function):
    """x Wᵀ for each of R rows: x [R, N, I], W [R, O, I] → y [R, N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        (gradient,) = gradients
        return gradient @ weight if needs_x else None, gradient.mT @ x if needs_weight else None
