"""FLOPs: what a segment costs, measured.

Counted are the floating-point operations of matrix products (a multiplication and an addition are two), attention over
its whole window included, whatever kernel runs it. For N matmul parameters, L blocks of attention width d, C tokens in
view, a backward that crosses a fraction f of the depth and learns a fraction a of N, a token costs by arithmetic

    forward                        2 N + 4 L d C
    backward through activations   f (2 N + 8 L d C)
    backward to weights            2 N a

The elementwise arithmetic of the update is counted apart, one for each element that each operator writes: it costs
memory traffic rather than FLOPs, which is why wall-clock time and FLOPs differ on small segments.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynlight.choices.update import NeedsStatistics, Update
from dynlight.documents.segments import Context, Cut, Segment
from dynlight.learning.score import Score
from dynlight.learning.weights import InPlace, Memory, read, token_nats


@dataclass(frozen=True)
class Flops:
    """FLOPs of one segment of one document."""

    forward: int = 0
    activation: int = 0  # backward through activations
    weight: int = 0  # backward to weights
    update: int = 0  # elementwise operations of the optimizer, in no total
    static: int = 0  # the static reference's forward, in no total

    @property
    def total(self) -> int:
        """Forward and backward of the adapted model."""
        return self.forward + self.activation + self.weight

    def times(self, updates: int) -> "Flops":
        """The cost of so many updates from a segment; the forward of the first also gives the score."""
        return replace(
            self,
            forward=self.forward * max(1, updates),
            activation=self.activation * updates,
            weight=self.weight * updates,
        )


class FlopCounter:
    """Measures each shape once, on a copy of the model without data (torch's `meta` device).

    The copy runs the same modules in the same way, so nothing is assumed about the architecture, and measuring costs
    neither memory nor arithmetic. Attention runs as plain matrix products there, as fused kernels hide theirs, and the
    tables of rotary positions are left out. A memory between empty and full is not measured: the cost is linear in its
    length.

    Args:
        model: with `requires_grad` on the weights that learn.
        context: what a forward has in view.
        rules: those that learn from each document.
        has_reference: whether the static model scores beside them.
        has_static_expert: whether the static model is an expert of a mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        rules: Sequence[Update],
        has_reference: bool = False,
        has_static_expert: bool = False,
    ) -> None:
        self._model = _without_data(model)
        # Tokens and masks have no values here: eager attention asks a mask for none, and a model that has no padding token
        # asks no token whether it is one.
        self._model.set_attn_implementation("eager")
        self._model.config.pad_token_id = None
        self._weights = InPlace(self._model, context)
        self._rules = rules
        self._has_reference = has_reference
        self._has_static_expert = has_static_expert
        self._measure = cache(self._measure_shape)
        self._update_flops = cache(self._measure_update)
        self._count = cache(self._count_shape)

    def count(self, score: Score, row: int = 0) -> Flops:
        """The FLOPs of a scored segment for the document of one row; of a mixture, those of all experts."""
        cut = score.segment.cut
        learners = (0,) if score.experts is None else tuple(np.flatnonzero(score.experts.learners[:, row]).tolist())
        memory = min(self._weights.context.memory or 0, cut.start)
        return self._count(cut.context, cut.stop - cut.start, memory, score.updates_of(row), learners)

    def _count_shape(self, context: int, scored: int, memory: int, updates: int, learners: tuple[int, ...]) -> Flops:
        once = self._at_memory(context, scored, memory, learns=updates > 0)
        of_learner = once.times(updates)
        total = {kind: len(learners) * flops for kind, flops in asdict(of_learner).items()}
        if updates:
            total["update"] = updates * sum(self._update_flops(learner) for learner in learners)
        total["static"] = once.static
        if self._has_static_expert:
            total["forward"] += once.static
        return Flops(**total)

    def _at_memory(self, context: int, scored: int, memory: int, learns: bool) -> Flops:
        full = self._weights.context.memory
        if not full or memory in (0, full):
            return self._measure(context, scored, memory, learns)
        # The memory's length is one dimension of each product that it enters, so the cost is linear in it.
        at_none, at_full = (self._measure(context, scored, length, learns) for length in (0, full))
        kinds = {}
        for kind, most in asdict(at_full).items():
            least = getattr(at_none, kind)
            assert (most - least) * memory % full == 0, "a line through whole numbers of FLOPs a position"
            kinds[kind] = least + (most - least) * memory // full
        return Flops(**kinds)

    def _measure_shape(self, context: int, scored: int, memory: int, learns: bool) -> Flops:
        segment = _empty_segment(context, scored)
        carried = self._empty_memory(memory)
        holders = [module for module in self._model.modules() if _holds_learned(module)] if learns else []
        outputs: list[Tensor] = []
        hooks = [holder.register_forward_hook(lambda *call: outputs.append(call[-1])) for holder in holders]
        with torch.set_grad_enabled(learns), FlopCounterMode(display=False) as counter:
            logits, _ = read(self._model, segment, carried, self._weights.context)
            forward = _flops(counter)
            for hook in hooks:
                hook.remove()
            if learns:
                loss = token_nats(logits, segment.targets).mean()
                # A backward to the outputs of the modules that hold learned weights crosses activations alone; the one to
                # the weights crosses them a second time.
                torch.autograd.grad(loss, outputs, retain_graph=True)
                activation = _flops(counter) - forward
                torch.autograd.grad(loss, self._weights.learned, allow_unused=True)
                weight = _flops(counter) - forward - 2 * activation
        return Flops(
            forward=forward,
            activation=activation if learns else 0,
            weight=weight if learns else 0,
            static=self._static_flops(segment, carried) if self._has_reference else 0,
        )

    def _static_flops(self, segment: Segment, memory: Memory) -> int:
        with FlopCounterMode(display=False) as counter:
            self._weights.static_memory = memory
            self._weights.score_static(segment)
        return _flops(counter)

    def _empty_memory(self, length: int) -> Memory:
        if length == 0:
            return None
        return [(keys.expand(-1, -1, length, -1), values.expand(-1, -1, length, -1)) for keys, values in self._position]

    @cached_property
    def _position(self) -> list[tuple[Tensor, Tensor]]:
        """What one position leaves in memory: the shapes of its keys and values."""
        with torch.no_grad():
            _, memory = read(self._model, _empty_segment(context=0, scored=1), None, self._weights.context)
        assert memory, "only a context with memory carries one"
        return memory

    def _measure_update(self, rule: int) -> int:
        weights = [nn.Parameter(torch.empty_like(weight)) for weight in self._weights.learned]
        optimizer = self._rules[rule](weights)
        if isinstance(optimizer, NeedsStatistics):
            optimizer.use_statistics([torch.empty_like(weight) for weight in weights])
        for group in optimizer.param_groups:
            group.update({switch: False for switch in ("fused", "foreach") if switch in group})
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # the first makes the state; those that follow are what an update costs
        with _ElementCounter() as counter:
            optimizer.step()
        return counter.elements


def _flops(counter: FlopCounterMode) -> int:
    """What has been counted so far, without rotary tables, which transformers makes by matrix products before 5.19."""
    of_modules = counter.get_flop_counts().items()
    tables = (sum(counts.values()) for name, counts in of_modules if "rotary" in name.rpartition(".")[-1])
    return counter.get_total_flops() - sum(tables)


def _without_data(model: nn.Module) -> Any:
    """A copy of the model on the meta device; tied parameters stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta", requires_grad=False)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _empty_segment(context: int, scored: int) -> Segment:
    return Segment(
        documents=(),
        cut=Cut(0, 0, scored, context),
        inputs=torch.empty(1, context + scored, dtype=torch.int64, device="meta"),
        targets=torch.empty(1, scored, dtype=torch.int64, device="meta"),
        scored=(slice(0, scored),),
        bytes=(),
    )


def _holds_learned(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class _ElementCounter(TorchDispatchMode):
    """Counts the elements written by elementwise operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags or "_foreach_" in func.name():
            written = args[0] if output is None else output
            tensors = written if isinstance(written, list | tuple) else [written]
            self.elements += sum(tensor.numel() for tensor in tensors if tensor.device.type == "meta")
        return output
