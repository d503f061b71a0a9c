"""Carried: what a model remembers of the segments before, in transformers' cache and between two of its forwards.

A memory is a dictionary of tensors for each layer, detached, [D, …] of D documents or [R, …] of R rows:

| name | of | shape | how much is carried |
|---|---|---|---|
| `keys`, `values` | attention | [D, heads, positions, head width] | the last positions that the context has room for |
| `indexer` | attention that chooses among its keys | [D, positions, width] | the same |
| `conv 0`, `recurrent 0`, … | convolutions and recurrences | [D, …] | their state, in which all is that went before |
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

Memory = list[dict[str, Tensor]] | None
_AXES = {"keys": 2, "values": 2, "indexer": 1}  # that of the positions


def each_of(memory: Memory, change: Callable[[Tensor], Tensor]) -> Memory:
    """The memory with each of its tensors changed."""
    return [{name: change(tensor) for name, tensor in layer.items()} for layer in memory] if memory else memory


def lengthened(memory: Memory, length: int) -> Memory:
    """A memory of one position as if it had been read `length` times: the shapes of one so long."""
    return [
        {
            name: tensor.repeat_interleave(length, _AXES[name]) if name in _AXES else tensor
            for name, tensor in layer.items()
        }
        for layer in memory or ()
    ]


def restored(saved: Any, device: torch.device) -> Memory:
    """A memory from a checkpoint, on a device; of earlier versions it has pairs, in which each row was a batch of one."""
    if saved and isinstance(saved[0], tuple):
        rows = [[tensor.squeeze(1) if tensor.ndim > 4 else tensor for tensor in pair] for pair in saved]
        saved = [dict(zip(("keys", "values"), pair, strict=True)) for pair in rows]
    return each_of(saved, lambda tensor: tensor.to(device))


def new_cache(config: PretrainedConfig, has_states: bool, memory: Memory) -> DynamicCache:
    """A cache that holds a memory.

    Args:
        config: of the model.
        has_states: whether the model carries more than keys and values.
        memory: of the segments before; None: none.
    """
    # Layers are filled here: transformers' own way copies a memory, though nothing ever writes over it.
    cache = DynamicCache(config=config) if has_states else DynamicCache()
    cache.layers = (
        [_new_layer(layer) for layer in cache.layers] if has_states else [DynamicLayer() for _ in memory or ()]
    )
    for layer, remembered in zip(cache.layers, memory or (), strict=memory is not None):
        _fill(layer, remembered)
    return cache


def remembered(cache: DynamicCache, room: int) -> Memory:
    """What a cache holds after a forward, with keys and values of the last `room` positions; nothing if that is 0."""
    return [_remembered(layer, room) for layer in cache.layers]


def behind(first: Memory, memory: Memory) -> Memory:
    """A memory with the keys and values of another one in front of its own."""
    if not (first and memory):
        return memory
    return [
        {
            name: torch.cat([front[name], tensor], _AXES[name]) if name in _AXES else tensor
            for name, tensor in layer.items()
        }
        for front, layer in zip(first, memory, strict=True)
    ]


def together(memories: Sequence[Memory]) -> Memory:
    """The memory of rows that were read one after another."""
    layers = [list(layer) for layer in zip(*(memory or [] for memory in memories), strict=True)]
    return [{name: torch.cat([row[name] for row in layer]) for name in layer[0]} for layer in layers] or None


class _States(LinearAttentionLayer):  # type: ignore[misc] # of no type
    """A state for each segment: transformers' own layer writes over the one that was carried, which the backward needs."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **settings: Any) -> Tensor:
        if (before := self.conv_states[state_idx]) is not None:
            self.conv_states[state_idx] = before.clone()
        return super().update_conv_state(conv_states, state_idx, **settings)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **settings: Any) -> Tensor:
        if (before := self.recurrent_states[state_idx]) is not None:
            self.recurrent_states[state_idx] = torch.empty_like(before)
        return super().update_recurrent_state(recurrent_states, state_idx, **settings)


class _StatesBesideKeys(_States, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """The same, of a layer that attends as well."""


def _new_layer(layer: Any) -> Any:
    """A layer of the same kind as transformers' own; one with a sliding window holds what the mask hides, too."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        kind = _StatesBesideKeys if isinstance(layer, DynamicLayer) else _States
        return kind(number_of_states=layer.number_of_states)
    if isinstance(layer, DynamicIndexedLayer):
        return DynamicIndexedLayer()
    return DynamicLayer() if isinstance(layer, DynamicLayer) else layer


def _fill(layer: Any, memory: dict[str, Tensor]) -> None:
    for name, tensor in memory.items():
        kind, _, number = name.partition(" ")
        if kind == "keys":
            layer.lazy_initialization(tensor, memory["values"])
            layer.keys, layer.values = tensor, memory["values"]
        elif kind == "indexer":
            layer.update_indexer(tensor)
        elif kind == "conv":
            layer.conv_states[int(number)] = tensor
            layer.conv_kernel_size[int(number)] = tensor.shape[-1]
            layer.is_conv_states_initialized[int(number)] = layer.has_previous_state[int(number)] = True
            layer.dtype, layer.device = tensor.dtype, tensor.device
        elif kind == "recurrent":
            layer.recurrent_states[int(number)] = tensor
            layer.is_recurrent_states_initialized[int(number)] = True


def _remembered(layer: Any, room: int) -> dict[str, Tensor]:
    memory: dict[str, Tensor] = {}
    if getattr(layer, "keys", None) is not None:
        positions = {"keys": layer.keys, "values": layer.values, "indexer": getattr(layer, "indexer_keys", None)}
        drop = max(0, layer.keys.shape[2] - room)
        for name, tensor in positions.items():
            if tensor is not None:
                memory[name] = tensor.detach().narrow(_AXES[name], drop, tensor.shape[_AXES[name]] - drop)
    if room > 0:
        for kind in ("conv", "recurrent"):
            states = getattr(layer, f"{kind}_states", {})
            memory |= {f"{kind} {i}": state.detach() for i, state in states.items() if state is not None}
    return memory
