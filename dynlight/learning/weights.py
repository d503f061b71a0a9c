"""Where the learned weights of the documents live, and the forward that reads a segment with them.

Two ways behind one interface (`learned`, `experts`, `memory`, `narrow`, `score`, `mean`, `score_static`, `clip_gradients`,
`step`, `reset`):

- `InPlace`: the model's own parameters learn, one document at a time; works with any model and `torch.compile`. Where
  they lie in parts on several devices it is `Sharded` (`sharded.py`).
- `Stacked`: an axis of rows in front of every learned weight, for many documents at once, or one document learned from
  at many rates; frozen weights are shared.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import DynamicCache, PreTrainedModel

from dynlight.choices.context import Context
from dynlight.documents.waves import NOT_SCORED, Segment
from dynlight.learning.attention import FOLDED
from dynlight.learning.linear import StackedLinear

# Keys and values, a pair a block, detached, documents in front: [D, heads, positions, head width], or
# [R, 1, heads, positions, head width] where each row was read with weights of its own.
Memory = list[tuple[Tensor, Tensor]] | None


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The surprise at each token, −ln p(target), from an fp32 log-softmax; 0 where none is scored.

    Shapes: logits [D, S, V], targets [D, S] → nats [D, S] in fp32.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED, reduction="none")
    return nats.view_as(targets)


def memory_length(memory: Memory) -> int:
    """Positions held in memory."""
    return memory[0][0].shape[-2] if memory else 0


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
        self.experts = [self.learned]
        self.initial = [parameter.detach().clone() for parameter in self.learned]
        self.memory: Memory = None
        self.static_memory: Memory = None
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """Nothing to take out: one document is all there is."""

    def read(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits [D, S, V] and next memory of a segment under the learned weights."""
        return read(self.model, segment, memory, self.context)

    def score(self, segment: Segment) -> tuple[Tensor, Memory]:
        """Nats [1, S] of a segment under the learned weights, and the memory to go on with."""
        logits, kept = self.read(segment, self.memory)
        return token_nats(logits, segment.targets), kept

    def mean(self, nats: Tensor, segment: Segment) -> Tensor:
        """Mean nats [1] of the tokens of a segment."""
        return nats.mean(dim=1)

    @torch.no_grad()
    def read_static(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits and next memory of a segment under θ0; not to be called between a forward and its backward."""
        with self._unlearned():
            return read(self.model, segment, memory, self.context)

    def score_static(self, segment: Segment) -> Tensor:
        """Nats [1, S] of a segment under θ0, whose memory goes on by itself."""
        logits, self.static_memory = self.read_static(segment, self.static_memory)
        return token_nats(logits, segment.targets)

    def clip_gradients(self, norm: float) -> None:
        """Scales the document's gradient g to at most `norm`: g ← g · min(1, norm / ‖g‖₂)."""
        torch.nn.utils.clip_grad_norm_(self.learned, norm)

    def step(self, optimizers: Sequence[Optimizer]) -> list[bool]:
        """One update from the gradients of the last backward, which are then forgotten.

        Returns whether the gradient was finite; if not, nothing is learned from it.
        """
        sums = [weight.grad.sum() for weight in self.learned if weight.grad is not None]
        is_finite = bool(torch.stack(sums).sum().isfinite()) if sums else True  # a sum with one that isn't never is
        for optimizer in optimizers if is_finite else ():
            optimizer.step()
        for weight in self.learned:
            weight.grad = None
        return [is_finite]

    @torch.no_grad()
    def reset(self, documents: int = 1) -> None:
        """θ ← θ0."""
        if self.learned:
            torch._foreach_copy_(self.learned, self.initial)

    def progress_state(self) -> dict[str, Any]:
        """Learned weights and memory."""
        return {"learned": self.learned, "memory": self.memory, "static_memory": self.static_memory}

    @torch.no_grad()
    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` said."""
        for weight, saved in zip(self.learned, state["learned"], strict=True):
            weight.copy_(saved)
        self.memory, self.static_memory = (
            _moved(state[name], self.model.device) for name in ("memory", "static_memory")
        )

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
    """Learned weights with an axis of rows in front, [rows, *shape] each: a row for each document of a wave.

    With several experts, the same document learned from in several ways, there is one for each expert of each document.
    The forward is mapped over the rows (`torch.func.vmap` of `functional_call`); the model's own parameters stay θ0 and
    are what the static reference reads with, all documents in one batch. Rows lie expert by expert, so that each
    expert's optimizer, which must be elementwise, updates its rows of all documents in one step:

        rows of 2 experts and a wave of 3 documents     e0 d0 · e0 d1 · e0 d2 · e1 d0 · e1 d1 · e1 d2
        when document 2 has ended                       e0 d0 · e0 d1 · e1 d0 · e1 d1
        when expert 1 of document 0 has failed          e0 d0 · e0 d1 · e1 d1

    A row that is not needed any more is taken out of weights, memory and optimizer state, and costs nothing.
    """

    def __init__(self, model: PreTrainedModel, context: Context, documents: int, experts: int = 1) -> None:
        self.model = model
        self.context = context
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names = list(own)
        self.initial = [parameter.detach() for parameter in own.values()]
        rows = documents * experts
        self._storage = [initial.repeat(rows, *[1] * initial.ndim) for initial in self.initial]
        self.learned = [nn.Parameter(storage) for storage in self._storage]
        self.experts = [[nn.Parameter(weight.detach()) for weight in self.learned] for _ in range(experts)]
        self.memory: Memory = None
        self.static_memory: Memory = None
        self.owners: list[tuple[int, int]] = []  # of each row, its expert and its document's place in the wave
        self._spans: list[slice] = []  # of each expert, its rows
        self._running = documents  # of the wave, always its first ones
        self._begin(documents)
        self._adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        model.set_attn_implementation(FOLDED)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                _hold_padding_still(module, module.padding_idx)
            if type(module) is nn.Linear:
                module.__class__ = StackedLinear

    def narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """Takes the documents that have ended out of weights, memory and optimizer state: all but the wave's first ones."""
        if documents < self._running:
            self._running = documents
            self.static_memory = _rows_of(self.static_memory, slice(documents))
            self._take([row for row, (_, document) in enumerate(self.owners) if document < documents], optimizers)

    def drop(self, rows: Collection[int], optimizers: Sequence[Optimizer]) -> None:
        """Takes rows out for good: those of experts that have failed."""
        self._take([row for row in range(len(self.owners)) if row not in rows], optimizers)

    def read(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits [R, S, V] and next memory (an axis of rows in front), each row under its own weights."""
        if not self.learned:
            return read(self.model, segment, memory, self.context)

        def one(weights: dict[str, Tensor], inputs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
            alone = replace(segment, inputs=inputs[None], targets=segment.targets[:1])
            logits, kept = read(_WithWeights(self.model, weights), alone, memory, self.context)
            return logits, kept or []  # vmap takes no None

        weights = dict(zip(self._names, self.learned, strict=True))
        mapped = (0, 0, None) if memory is None else (0, 0, 0)
        logits, kept = vmap(one, in_dims=mapped)(weights, self._spread(segment.inputs), memory)
        return logits.squeeze(1), kept or None

    def score(self, segment: Segment) -> tuple[Tensor, Memory]:
        """Nats [R, S] of a segment, each row under its own weights, and the memory to go on with."""
        if not self.owners:
            return segment.inputs.new_empty((0, segment.targets.shape[1]), dtype=torch.float32), None
        logits, kept = self.read(segment, self.memory)
        return token_nats(logits, self._spread(segment.targets)), kept

    def mean(self, nats: Tensor, segment: Segment) -> Tensor:
        """Mean nats [R] of the tokens of a segment that are each row's own."""
        return nats.sum(dim=1) / self._spread((segment.targets != NOT_SCORED).sum(dim=1))

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

    def score_static(self, segment: Segment) -> Tensor:
        """Nats [D, S] of a segment under θ0, whose memory goes on by itself."""
        logits, self.static_memory = self.read_static(segment, self.static_memory)
        return token_nats(logits, segment.targets)

    def clip_gradients(self, norm: float) -> None:
        """Scales each row's gradient g to at most `norm`: g ← g · min(1, norm / ‖g‖₂)."""
        gradients = [weight.grad for weight in self.learned if weight.grad is not None]
        squares = torch.stack([gradient.flatten(1).pow(2).sum(dim=1) for gradient in gradients])
        scale = (norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    def step(self, optimizers: Sequence[Optimizer]) -> list[bool]:
        """One update of each expert from the gradients of the last backward, which are then forgotten.

        Returns whether each row's gradient was finite; one that wasn't spoils no other row.
        """
        finite = _finite_rows([stack.grad for stack in self.learned if stack.grad is not None])
        for rows, own, optimizer in self._each(optimizers):
            if rows.start == rows.stop:
                continue
            for weight, stack in zip(own, self.learned, strict=True):
                weight.grad = None if stack.grad is None else stack.grad[rows]
            optimizer.step()
            for weight in own:
                weight.grad = None
        for stack in self.learned:
            stack.grad = None
        return finite

    @torch.no_grad()
    def reset(self, documents: int) -> None:
        """θ ← θ0 for the documents of a new wave."""
        rows = documents * len(self.experts)
        for weight, storage, initial in zip(self.learned, self._storage, self.initial, strict=True):
            weight.data = storage[:rows].copy_(initial)
        self._begin(documents)

    def progress_state(self) -> dict[str, Any]:
        """Learned weights and memory, and whose rows they are."""
        return {
            "learned": [weight.data for weight in self.learned],
            "memory": self.memory,
            "static_memory": self.static_memory,
            "owners": self.owners,
            "running": self._running,
        }

    @torch.no_grad()
    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` said."""
        for weight, storage, saved in zip(self.learned, self._storage, state["learned"], strict=True):
            weight.data = storage[: len(saved)].copy_(saved)
        self.memory, self.static_memory = (
            _moved(state[name], self.model.device) for name in ("memory", "static_memory")
        )
        self._begin(state["running"])
        self.owners = state["owners"]
        self._bind()

    def _begin(self, documents: int) -> None:
        self._running = documents
        self.owners = [(expert, document) for expert in range(len(self.experts)) for document in range(documents)]
        self._bind()

    def _bind(self) -> None:
        """Points each expert's weights at its rows."""
        counts = Counter(expert for expert, _ in self.owners)
        stops = list(accumulate(counts[expert] for expert in range(len(self.experts))))
        self._spans = [slice(stop - counts[expert], stop) for expert, stop in enumerate(stops)]
        for own, rows in zip(self.experts, self._spans, strict=True):
            for weight, stack in zip(own, self.learned, strict=True):
                weight.data = stack.data[rows]

    @torch.no_grad()
    def _take(self, keep: list[int], optimizers: Sequence[Optimizer]) -> None:
        """Narrows everything that has rows to some of them."""
        for rows, own, optimizer in self._each(optimizers):
            its = as_index([row - rows.start for row in keep if row in _range(rows)])
            for weight in own:
                state = optimizer.state[weight]
                optimizer.state[weight] = {key: _narrow(value, weight, its) for key, value in state.items()}
        index = as_index(keep)
        for weight, storage in zip(self.learned, self._storage, strict=True):
            taken = weight.data[index]
            # A copy goes to where the rows were at first, so that the memory of those taken out is not held twice.
            weight.data = storage[: len(keep)].copy_(taken) if isinstance(index, Tensor) else taken
        self.memory = _rows_of(self.memory, index)
        self.owners = [self.owners[row] for row in keep]
        self._bind()

    def _each(self, optimizers: Sequence[Optimizer]) -> list[tuple[slice, list[nn.Parameter], Optimizer]]:
        """Each expert's rows and weights with its optimizer; nothing in static evaluation, which has none."""
        return list(zip(self._spans, self.experts, optimizers, strict=True)) if optimizers else []

    def _spread(self, values: Tensor) -> Tensor:
        """What the documents of a segment have, [D, …], for each of their rows, [R, …]."""
        if len(self.experts) == 1 and len(self.owners) == len(values):
            return values
        return values[[document for _, document in self.owners]]


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


def _finite_rows(gradients: list[Tensor]) -> list[bool]:
    """Whether all of each row's gradients are finite: a sum with one that isn't never is."""
    sums = [gradient.flatten(1).sum(dim=1) for gradient in gradients]
    return torch.stack(sums).isfinite().all(dim=0).tolist() if sums else []


def _moved(memory: Memory, device: torch.device) -> Memory:
    return [(keys.to(device), values.to(device)) for keys, values in memory] if memory else memory


def _rows_of(memory: Memory, rows: slice | Tensor) -> Memory:
    """The memory of some of the rows."""
    return [(keys[rows], values[rows]) for keys, values in memory] if memory else memory


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)


def as_index(rows: Sequence[int]) -> slice | Tensor:
    """Row numbers as an index: as a slice where they are neighbours, which needs no copy."""
    if not rows:
        return slice(0, 0)
    neighbours = range(rows[0], rows[0] + len(rows))
    return slice(neighbours.start, neighbours.stop) if list(rows) == list(neighbours) else torch.tensor(rows)


def _narrow(value: Any, weight: Tensor, rows: slice | Tensor) -> Any:
    """The rows of one entry of an optimizer's state; what all rows share (a step count, statistics) is no row's own."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0:
        return value.clone()  # a step count goes on by itself
    return value[rows] if value.shape == weight.shape else value
