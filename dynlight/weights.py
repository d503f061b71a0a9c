"""Where the learned weights of the documents live, and the forward that reads a segment with them.

Two ways behind one interface (`learned`, `rows`, `read`, `read_static`, `clip_gradients`, `clear_gradients`, `reset`):

- `InPlace`: the model's own parameters learn, one document at a time; works with any model, `torch.compile` and
  sharding.
- `Stacked`: a document axis in front of every learned weight, for many documents at once; frozen weights are shared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import DynamicCache, PreTrainedModel

from dynlight.attention import FOLDED
from dynlight.context import Context
from dynlight.waves import Segment

# Keys and values, a pair a block, detached, documents in front: [D, heads, positions, head width], or
# [D, 1, heads, positions, head width] where each document was read with weights of its own.
Memory = list[tuple[Tensor, Tensor]] | None


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The surprise at each token, −ln p(target), from an fp32 log-softmax.

    Shapes: logits [D, S, V], targets [D, S] → nats [D, S] in fp32.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def memory_length(memory: Memory) -> int:
    """Positions held in memory."""
    return memory[0][0].shape[-2] if memory else 0


def rows_of(memory: Memory, rows: slice) -> Memory:
    """The memory of some of the documents."""
    if not memory or (rows.start == 0 and rows.stop == len(memory[0][0])):
        return memory
    return [(keys[rows], values[rows]) for keys, values in memory]


def read(model: PreTrainedModel, segment: Segment, memory: Memory, context: Context) -> tuple[Tensor, Memory]:
    """One forward over a segment with what the context has in view.

    Returns the logits of the scored tokens [D, S, V] and the memory for the next segment. Gradients reach the keys and
    values of this segment; what is carried over is detached.
    """
    scored = segment.targets.shape[1]
    # Without memory, too, a cache is passed: transformers would else search the positions for packed documents, which
    # costs time and a wait for the device.
    cache = DynamicCache(memory)
    logits = model(
        input_ids=segment.inputs,
        position_ids=None if context.memory is None else _positions(segment),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=scored,
    ).logits
    if context.memory is None:
        return logits, None
    drop = max(0, memory_length(memory) + scored - context.memory)
    return logits, [(layer.keys[:, :, drop:].detach(), layer.values[:, :, drop:].detach()) for layer in cache.layers]


def _positions(segment: Segment) -> Tensor:
    """Positions counted through the document, [1, S]."""
    return torch.arange(segment.cut.start, segment.cut.stop, device=segment.inputs.device).unsqueeze(0)


class InPlace:
    """Learned weights in the model itself, for one document at a time.

    θ0, the weights before anything was learned, is kept beside them: reset copies it back, and the static reference
    reads with it. Adapters need no θ0 for the latter: they are switched off.
    """

    def __init__(self, model: PreTrainedModel, context: Context) -> None:
        self.model = model
        self.context = context
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.initial = [parameter.detach().clone() for parameter in self.learned]
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def rows(self, segment: Segment, optimizer: Optimizer | None) -> Iterator[None]:
        """Nothing to choose: one document is all there is."""
        yield

    def read(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits [D, S, V] and next memory of a segment under the learned weights."""
        return read(self.model, segment, memory, self.context)

    @torch.no_grad()
    def read_static(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits and next memory of a segment under θ0; not to be called between a forward and its backward."""
        with self._unlearned():
            return read(self.model, segment, memory, self.context)

    def clear_gradients(self) -> None:
        """Forgets the gradients of the last backward."""
        for weight in self.learned:
            weight.grad = None

    def clip_gradients(self, norm: float) -> None:
        """Scales the document's gradient g to at most `norm`: g ← g · min(1, norm / ‖g‖₂)."""
        torch.nn.utils.clip_grad_norm_(self.learned, norm)

    @torch.no_grad()
    def reset(self, documents: int = 1) -> None:
        """θ ← θ0."""
        if self.learned:
            torch._foreach_copy_(self.learned, self.initial)

    @contextmanager
    def _unlearned(self) -> Iterator[None]:
        switch = self._switch_adapters if self._adapters else self._exchange
        switch()
        try:
            yield
        finally:
            switch()

    def _switch_adapters(self) -> None:
        # Not PEFT's enable_adapters: it walks all parameters to set requires_grad, which nothing here reads.
        for adapter in self._adapters:
            adapter._disable_adapters = not adapter._disable_adapters

    def _exchange(self) -> None:
        # Exchanging storages copies nothing and leaves the parameters' identity, which optimizers rely on.
        for parameter, initial in zip(self.learned, self.initial, strict=True):
            parameter.data, initial.data = initial.data, parameter.data


class Stacked:
    """Learned weights with a document axis in front: [documents, *shape] each.

    The forward is mapped over that axis (`torch.func.vmap` of `functional_call`); the model's own parameters stay θ0
    and are what the static reference reads with, all documents in one batch. An elementwise optimizer updates all
    documents in one step. Of the documents of a wave those still running are a prefix: `rows` narrows weights and
    optimizer state to it, so a finished document costs nothing.
    """

    def __init__(self, model: PreTrainedModel, context: Context, documents: int) -> None:
        self.model = model
        self.context = context
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names = list(own)
        self._initial = [parameter.detach() for parameter in own.values()]
        self._storage = [parameter.detach().repeat(documents, *[1] * parameter.ndim) for parameter in own.values()]
        self.learned = [nn.Parameter(storage) for storage in self._storage]
        self._running: int | None = None  # rows that weights and optimizer state are narrowed to, where that is known
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        model.set_attn_implementation(FOLDED)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                _hold_padding_still(module, module.padding_idx)

    @contextmanager
    def rows(self, segment: Segment, optimizer: Optimizer | None) -> Iterator[None]:
        """Weights and optimizer state of the segment's documents only.

        A group that ends here is put back behind, so that the others find everything as it was; the group that comes
        last at a position (from row 0 on) is the one that goes on, and stays.
        """
        goes_on = segment.rows.start == 0
        if goes_on and self._running == segment.rows.stop:
            yield
            return
        self._running = segment.rows.stop if goes_on else None
        weights = [weight.data for weight in self.learned]
        states = [dict(optimizer.state[weight]) if optimizer else {} for weight in self.learned]
        for weight, all_rows, state in zip(self.learned, weights, states, strict=True):
            weight.data = all_rows[segment.rows]
            if optimizer:
                optimizer.state[weight] = {key: _narrow(value, all_rows, segment.rows) for key, value in state.items()}
        yield
        if goes_on:
            return
        for weight, all_rows, state in zip(self.learned, weights, states, strict=True):
            weight.data = all_rows
            if optimizer:
                optimizer.state[weight] = state

    def read(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits [D, S, V] and next memory (a document axis in front) under each document's own weights."""
        if not self.learned:
            return read(self.model, segment, memory, self.context)

        def one(weights: dict[str, Tensor], inputs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
            alone = replace(segment, inputs=inputs[None], targets=segment.targets[:1])
            logits, kept = read(_WithWeights(self.model, weights), alone, memory, self.context)
            return logits, kept or []  # vmap takes no None

        weights = dict(zip(self._names, self.learned, strict=True))
        mapped = (0, 0, None) if memory is None else (0, 0, 0)
        logits, kept = vmap(one, in_dims=mapped)(weights, segment.inputs, memory)
        return logits.squeeze(1), kept or None

    @torch.no_grad()
    def read_static(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits and next memory under θ0, all documents in one batch."""
        for adapter in self._adapters:
            adapter._disable_adapters = True
        try:
            return read(self.model, segment, memory, self.context)
        finally:
            for adapter in self._adapters:
                adapter._disable_adapters = False

    def clear_gradients(self) -> None:
        """Forgets the gradients of the last backward."""
        for weight in self.learned:
            weight.grad = None

    def clip_gradients(self, norm: float) -> None:
        """Scales each document's gradient g to at most `norm`: g ← g · min(1, norm / ‖g‖₂)."""
        gradients = [weight.grad for weight in self.learned if weight.grad is not None]
        squares = torch.stack([gradient.flatten(1).pow(2).sum(dim=1) for gradient in gradients])
        scale = (norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    @torch.no_grad()
    def reset(self, documents: int) -> None:
        """θ ← θ0 for the documents of a new wave."""
        for weight, storage, initial in zip(self.learned, self._storage, self._initial, strict=True):
            weight.data = storage[:documents].copy_(initial)
        self._running = None


class _WithWeights:
    """A model called with other weights in the place of some of its own."""

    def __init__(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
        self._model = model
        self._weights = weights

    def __call__(self, **inputs: Any) -> Any:
        return functional_call(self._model, self._weights, kwargs=inputs)


def _hold_padding_still(embedding: nn.Embedding, padding: int) -> None:
    """Keeps a token's vector from learning as `padding_idx` does, which is without effect under vmap."""
    embedding.padding_idx = None
    embedding.register_forward_hook(
        lambda _, inputs, output: torch.where((inputs[0] == padding).unsqueeze(-1), output.detach(), output)
    )


def _narrow(value: Any, all_rows: Tensor, rows: slice) -> Any:
    """The rows of one entry of an optimizer's state; what documents share (a step count, statistics) is copied whole."""
    if not isinstance(value, Tensor):
        return value
    has_rows = value.ndim == all_rows.ndim and value.shape[1:] == all_rows.shape[1:]
    return value[rows] if has_rows else value.clone()
