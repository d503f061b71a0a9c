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
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from textwrap import shorten
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynlight.choices.memories import STATIC, DocumentMemory
from dynlight.choices.parameters import block_of_each_weight
from dynlight.choices.update import NeedsStatistics, Update
from dynlight.documents.segments import Context, Cut, Segment
from dynlight.learning.carried import Memory, lengthened
from dynlight.learning.forward import read, token_nats
from dynlight.learning.score import Score
from dynlight.learning.weights import InPlace


@dataclass(frozen=True)
class Flops:
    """FLOPs of one segment of one document: whole numbers; NaN where they are not known."""

    forward: float = 0
    activation: float = 0  # backward through activations
    weight: float = 0  # backward to weights
    update: float = 0  # elementwise operations of the optimizer, in no total
    static: float = 0  # the static reference's forward, in no total

    @property
    def total(self) -> float:
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

    def plus(self, again: "Flops", times: int) -> "Flops":
        """With so many times the forward and backward of another segment, whose updates are counted already."""
        return replace(
            self,
            forward=self.forward + times * again.forward,
            activation=self.activation + times * again.activation,
            weight=self.weight + times * again.weight,
        )


UNKNOWN = Flops(*[math.nan] * 5)


class FlopCounter:
    """What a segment of any shape costs, measured on a copy of the model without data before the run.

    Every product that a forward makes has as its sides widths of the model, the r tokens that are read, the scored ones,
    and the positions in view. So with c tokens read again and m positions of memory each kind of FLOPs is

        constant + line · r + again · c + square · r (r + m)

    whose coefficients are solved from the smallest shapes. What they give is measured at a whole segment and at one of one
    token, too: where it isn't so, as in a model that fills up its segments to a fixed length, each shape is measured by itself.

    A model or an optimizer that does something which needs data cannot be measured: its FLOPs are NaN, and `failure` says
    why. No score depends on them.

    Args:
        model: with `requires_grad` on the weights that learn.
        context: what a forward has in view.
        rules: those that learn from each document.
        has_reference: whether the static model scores beside them.
        has_static_expert: whether the static model is an expert of a mixture.
        is_guided: whether what it predicts is learned from, so that its forward is a cost of learning.
        is_own_reference: whether what reads is the static model, beside which memories are experts.
        replayed: which earlier segments are learned from again beside the one of an index, without a memory.
        memories: of a mixture, each with the rule that it is over, or STATIC.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        rules: Sequence[Update],
        has_reference: bool = False,
        has_static_expert: bool = False,
        is_guided: bool = False,
        is_own_reference: bool = False,
        replayed: Callable[[int], list[int]] = lambda index: [],
        memories: Sequence[tuple[DocumentMemory, int]] = (),
    ) -> None:
        self._config: Any = model.config
        self._is_own_reference = is_own_reference
        self._memories = memories
        self._replayed = replayed
        self._context = context
        self._memory = context.memory or 0
        # FLOPs of the model, and of the static one, for what they read anew in front of a full memory.
        self._sinks: tuple[float, float] = (0, 0)
        self._has_reference = has_reference
        self._learning_needs_static = has_static_expert or is_guided
        self._count = cache(self._count_shape)
        self.failure: str | None = None
        self._cost: Cost = lambda *shape: UNKNOWN
        self._update_flops = [math.nan for _ in rules]
        with self._noting_failure():
            copied = EmptyModel(model, context, learns=bool(rules), has_reference=has_reference or is_guided)
            above = cache(partial(_cost_of, copied, context))
            self._cost = above(frozenset())
            self._cost_without = cache(partial(_cost_without, copied, context, above))
            self._elements = [weight.numel() for weight in copied.learned]
            if context.sinks:
                first = copied.measure(context.sinks - 1, 1, 0)
                self._sinks = first.forward, first.static
            with self._noting_failure("FLOPs of updates"):
                for number, rule in enumerate(rules):
                    self._update_flops[number] = copied.measure_update(rule)

    def count(self, score: Score, row: int = 0) -> Flops:
        """The FLOPs of a scored segment for the document of one row; of a mixture, those of all experts but the teacher."""
        cut = score.segment.cut
        learners: tuple[int, ...] = (0,)
        if score.experts is not None and self._update_flops:
            learners = tuple(np.flatnonzero(score.experts.learners[:, row]).tolist())
        by_rule = score.updates_of(row)
        updates = tuple((learner, by_rule[learner] if by_rule else 0) for learner in learners)
        flops = self._of(cut, updates, score.stopped)
        if made := sum(each for _, each in updates):
            for index in self._replayed(cut.index):
                flops = flops.plus(self._count_again(index * self._context.segment, score.stopped), made)
        if score.reread and score.segment.documents[row] not in score.segment.finished:
            flops = replace(flops, forward=flops.forward + len(learners) * sum(map(self._to_refresh, score.reread)))
        if self._is_own_reference:
            flops = replace(flops, static=flops.forward)
        return replace(flops, forward=flops.forward + self._to_remember(score, row, learners))

    def _to_remember(self, score: Score, row: int, learners: Sequence[int]) -> int:
        """What memories cost over the bases that have not failed."""
        if score.experts is None or not self._memories:
            return 0
        known, text = score.experts.remembered[row], self._config.get_text_config()
        memories = [memory for memory, base in self._memories if base == STATIC or base in learners]
        return sum(
            memory.flops(place, text.hidden_size, text.vocab_size)
            for memory in memories
            for place in range(known, known + score.segment.tokens[row])
        )

    def _to_refresh(self, index: int) -> float:
        """The forward of a whole segment that is read again behind what was in memory before it."""
        start = index * self._context.segment
        forward = self._cost(0, self._context.segment, min(self._memory, start)).forward
        return forward + (self._sinks[0] if start > self._memory else 0)

    def forward(self, cut: Cut) -> float:
        """The FLOPs of a segment's forward alone."""
        return self._of(cut, ((0, 0),)).forward

    def _of(self, cut: Cut, updates: tuple[tuple[int, int], ...], stopped: frozenset[int] = frozenset()) -> Flops:
        memory, is_full = min(self._memory, cut.start), cut.start > self._memory
        return self._count(cut.context, cut.stop - cut.start, memory, is_full, updates, stopped)

    def _count_again(self, start: int, stopped: frozenset[int]) -> Flops:
        stop, cost = start + self._context.segment, self._cost_without(stopped) if stopped else self._cost
        return cost(self._context.context(start, stop), stop - start, 0)

    def _count_shape(
        self,
        context: int,
        scored: int,
        memory: int,
        is_full: bool,
        updates: tuple[tuple[int, int], ...],
        stopped: frozenset[int],
    ) -> Flops:
        once, share = UNKNOWN, 1.0
        with self._noting_failure():
            cost = self._cost_without(stopped) if stopped else self._cost
            once = cost(context, scored, memory)
            share = 1 - sum(self._elements[place] for place in stopped) / max(1, sum(self._elements))
        if is_full:
            forward, static = self._sinks
            once = replace(once, forward=once.forward + forward, static=once.static + static)
        of_learners = [asdict(once.times(made)) for _, made in updates]
        total = {kind: sum(of_learner[kind] for of_learner in of_learners) for kind in asdict(once)}
        if any(made for _, made in updates):
            of_updates = sum(made * self._update_flops[learner] for learner, made in updates if made)
            total["update"] = round(share * of_updates) if stopped else of_updates
        total["static"] = once.static if self._has_reference else 0
        if self._learning_needs_static:  # which is one forward, whatever it is for
            total["forward"] += once.static
        return Flops(**total)

    @contextmanager
    def _noting_failure(self, what: str = "FLOPs") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the code of a model or an optimizer raises where there is no data
            if self.failure is None:
                self.failure = shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
                rank_zero_warn(f"{what} are not counted, as that needs code to run without data: {self.failure}")


class EmptyModel:
    """A copy of the model without data (torch's `meta` device), on which a shape costs neither memory nor arithmetic.

    The copy runs the same modules in the same way, so nothing is assumed about the architecture. Attention runs as plain
    matrix products there, as fused kernels hide theirs; each token is read by as many experts as in the model, though not
    by which; and the tables of rotary positions are left out.
    """

    def __init__(self, model: nn.Module, context: Context, learns: bool, has_reference: bool) -> None:
        self._model = _without_data(model)
        # Tokens and masks have no values here: eager attention asks a mask for none, and a model that has no padding token
        # asks no token whether it is one. Experts that are chosen by tokens would be counted by the values, too.
        self._model.set_attn_implementation("eager")
        self._model.set_experts_implementation("batched_mm")
        self._model.config.pad_token_id = None
        self._weights = InPlace(self._model, context)
        self._learns = learns
        self._has_reference = has_reference
        of_names = block_of_each_weight(self._model)
        learned = [name for name, weight in self._model.named_parameters() if weight.requires_grad]
        self.blocks = [of_names.get(name) for name in learned]  # of each weight that learns; None: it is in none

    @property
    def learned(self) -> list[Tensor]:
        """The weights that learn."""
        return self._weights.learned

    # Adapters of experts switch autocast off, which `meta` doesn't know.
    @patch.object(torch, "autocast", lambda *device, **settings: nullcontext())
    def measure(self, context: int, scored: int, memory: int, stopped: frozenset[int] = frozenset()) -> Flops:
        """The FLOPs of one forward and backward over a segment, and of the static reference's forward.

        The learned weights at the places `stopped` learn no more.
        """
        self._weights.stop({(0, 0): stopped})
        segment = _empty_segment(context, scored)
        carried = self._empty_memory(memory)
        outputs: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda *call: outputs.extend(_learned_tensors(call[-1])))
            for module in self._model.modules()
            if self._learns and _holds_learned(module)
        ]
        with torch.set_grad_enabled(self._learns), FlopCounterMode(display=False) as counter:
            logits, _ = read(self._model, segment, carried, self._weights.context)
            forward, activation, weight = _flops(counter), 0, 0
            for hook in hooks:
                hook.remove()
            if self._learns:
                loss = token_nats(logits, segment.targets).mean()
                # A backward to the outputs of the modules that hold learned weights crosses activations alone; the one to
                # the weights crosses them a second time.
                if outputs:  # none, say, where only an embedding learns
                    torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
                activation = _flops(counter) - forward
                learned = [weight for weight in self._weights.learned if weight.requires_grad]
                torch.autograd.grad(loss, learned, allow_unused=True)
                weight = _flops(counter) - forward - 2 * activation
        static = self._measure_static(segment, carried) if self._has_reference else 0
        return Flops(forward=forward, activation=activation, weight=weight, static=static)

    def _measure_static(self, segment: Segment, memory: Memory) -> int:
        with FlopCounterMode(display=False) as counter:
            self._weights.static_memory = memory
            self._weights.score_static(segment)
        return _flops(counter)

    def _empty_memory(self, length: int) -> Memory:
        if length == 0:
            return None
        return lengthened(self._position, length)

    @cached_property
    def _position(self) -> Memory:
        """What one position leaves in memory: the shapes of its keys and values."""
        with torch.no_grad():
            _, memory = read(self._model, _empty_segment(context=0, scored=1), None, self._weights.context)
        assert memory, "only a context with memory carries one"
        return memory

    def measure_update(self, rule: Update) -> int:
        """The elements that an update by a rule writes."""
        weights = [nn.Parameter(torch.empty_like(weight)) for weight in self._weights.learned]
        optimizer = rule(weights)
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


Cost = Callable[[int, int, int], Flops]  # of context, scored tokens and memory


def _cost_of(copied: EmptyModel, context: Context, stopped: frozenset[int] = frozenset()) -> Cost:
    """The FLOPs of any shape, solved from those of few (see `FlopCounter`)."""

    @cache
    def measure(context: int, scored: int, memory: int) -> Flops:
        return copied.measure(context, scored, memory, stopped)

    of_two, of_three, of_four = (_row(measure(0, scored, 0)) for scored in (2, 3, 4))
    square = (of_four - 2 * of_three + of_two) // 2
    line = of_three - of_two - 5 * square
    constant = of_two - 2 * line - 4 * square
    far = 1_000_000_000  # tokens into a document, where all that a context can have in view is there
    shapes = [(context.context(far, far + scored), scored, context.memory or 0) for scored in (context.segment, 1)]
    # Whether there is context at all a short last segment shows: a window of one segment has room beside it.
    again = _row(measure(1, 2, 0)) - of_three if any(shape[0] for shape in shapes) else 0

    def solved(context: int, scored: int, memory: int) -> Flops:
        read = context + scored
        forward, activation, weight, static = (
            constant + line * read + again * context + square * read * (read + memory)
        ).tolist()
        return Flops(forward, activation, weight, static=static)

    return solved if all(solved(*shape) == measure(*shape) for shape in shapes) else measure


def _cost_without(
    copied: EmptyModel, context: Context, above: Callable[[frozenset[int]], Cost], stopped: frozenset[int]
) -> Cost:
    """The FLOPs of any shape where some of the learned weights learn no more.

    The backward through activations depends on what learns in the lowest block where anything does, so it is measured once for
    each such set. To a weight that is multiplied, a backward costs 2 for each of its numbers and tokens; where that is not all,
    every set is measured.
    """
    lowest = next(place for place in range(len(copied.learned)) if place not in stopped)
    own = copied.blocks[lowest]
    below = frozenset(place for place in stopped if place < lowest or (own is not None and copied.blocks[place] == own))
    far = 1_000_000_000
    shape = context.context(far, far + context.segment), context.segment, context.memory or 0
    of_weights = [2 * weight.numel() if weight.ndim == 2 else 0 for weight in copied.learned]
    if copied.measure(*shape).weight != sum(of_weights) * sum(shape[:2]):
        return cache(lambda context, scored, memory: copied.measure(context, scored, memory, stopped))
    cost, apart = above(below), sum(of_weights[place] for place in stopped - below)

    def without(context: int, scored: int, memory: int) -> Flops:
        once = cost(context, scored, memory)
        return replace(once, weight=once.weight - apart * (context + scored))

    return without


def _row(flops: Flops) -> np.ndarray:
    return np.array([flops.forward, flops.activation, flops.weight, flops.static], dtype=np.int64)


def _learned_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output through which gradients go."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _learned_tensors(each)


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
