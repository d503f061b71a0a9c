"""Attention for documents that each have their own weights: the document axis goes where the batch axis is.

`torch.func.vmap` has no rule for the fused attention kernels on CPU and would run them one document after another.
Attention itself holds no weights, so documents can be folded into the batch for it and unfolded after it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from dynlight.learning.mapped import is_mapped

FOLDED = "dynlight_folded"


class _Folded(torch.autograd.Function):
    """softmax(q kᵀ · scale + mask) v, whose rule under vmap is one call for all documents.

    Shapes: q [B, H, T, E], k and v [B, H, C, E], mask None or [1, 1, T, C].
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """No tensors are saved: the vmap rule uses only differentiable operators of torch, so autograd derives the gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float) -> Any:
        assert in_dims[3] is None, "documents that are read together share their positions, and so the mask"
        q, k, v = (
            (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip((q, k, v), in_dims, strict=False)
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        return out.unflatten(0, (info.batch_size, -1)), 0


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, E], key and value [B, H / groups, C, E] → [B, T, H, E]."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = attention_mask is None and query.shape[2] > 1 and (is_causal is None or is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _Folded.apply if is_mapped() else _Folded.forward
    return attend(query, key, value, attention_mask, causal, scale).transpose(1, 2), None


AttentionInterface.register(FOLDED, folded_attention)
AttentionMaskInterface.register(FOLDED, sdpa_mask)
