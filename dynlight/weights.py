"""Where the learned weights of the documents live, and the forward that reads a segment with them.

Two ways behind one interface (`read`, `read_static`, `clip_gradients`, `reset`, `learned`):

- `InPlace`: the model's own parameters learn, one document at a time; works with any model, `torch.compile` and
  sharding.
- a document axis in front of every learned weight, for many documents at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from dynlight.context import Context
from dynlight.waves import Segment

# Keys and values of one document, a pair a block, each [1, heads, positions, head width], detached.
Memory = list[tuple[Tensor, Tensor]] | None


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The surprise at each token, −ln p(target), from an fp32 log-softmax.

    Shapes: logits [D, S, V], targets [D, S] → nats [D, S] in fp32.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def memory_length(memory: Memory) -> int:
    """Positions held in memory."""
    return memory[0][0].shape[-2] if memory else 0


def read(model: PreTrainedModel, segment: Segment, memory: Memory, context: Context) -> tuple[Tensor, Memory]:
    """One forward over a segment with what the context has in view.

    Returns the logits of the scored tokens [D, S, V] and the memory for the next segment. Gradients reach the keys and
    values of this segment; what is carried over is detached.
    """
    scored = segment.targets.shape[1]
    carries = context.memory is not None
    # Without memory, too, a cache is passed: transformers would else search the positions for packed documents, which
    # costs time and a wait for the device.
    cache = DynamicCache(memory)
    logits = model(
        input_ids=segment.inputs,
        position_ids=_positions(segment) if carries else None,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=scored,
    ).logits
    if not carries:
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
    def reset(self) -> None:
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
