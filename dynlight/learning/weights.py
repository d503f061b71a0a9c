"""Weights: where the learned weights of the documents live, and the forward that reads a segment with them.

`Weights` is what learning asks for. Behind it are

- `InPlace`: the model's own parameters learn, one document at a time; works with any model and `torch.compile`;
- `Sharded` (`sharded.py`): the same, where each of several devices holds a shard of every weight;
- `Stacked` (`stacked.py`): an axis of rows in front of every learned weight, for many documents at once, or one document
  learned from at many rates; frozen weights are shared.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dynlight.choices.context import has_cache, has_states
from dynlight.choices.gradient import Gradient, RowGradients
from dynlight.choices.parameters import adapters_of
from dynlight.documents.segments import NOT_SCORED, Context, Cut, Segment
from dynlight.learning.carried import Memory, behind, each_of, new_cache, remembered, restored, together
from dynlight.learning.digests import WeightDigests, sums_of_bits
from dynlight.learning.fetch import Fetch, Later


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The nats of each token, −ln p(target), from an fp32 log-softmax; 0 where no token is scored.

    Shapes: logits [D, S, V], targets [D, S] → nats [D, S] in fp32.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED, reduction="none")
    return nats.view_as(targets)


def divergences(logits: Tensor, guide: Tensor) -> Tensor:
    """KL(guide ‖ model) of each token, in nats: Σ_w p(w) ln (p(w) / q(w)), both softmaxes of logits, in fp32.

    Shapes: logits and guide [D, S, V] → [D, S].
    """
    p, q = (each.float().log_softmax(dim=-1) for each in (guide, logits))
    shares = p.exp()
    return torch.where(shares > 0, shares * (p - q), 0.0).sum(dim=-1)  # 0 · ln 0 = 0


class Reading(NamedTuple):
    """What a forward over a segment leaves.

    Shapes: D documents, or rows; S columns; a vocabulary of V.
    """

    nats: Tensor  # fp32 [D, S]
    memory: Memory  # for the next segment
    divergences: Tensor | None = None  # from a guide, [D, S]
    logits: Tensor | None = None  # [D, S, V], where they are kept


@dataclass(frozen=True)
class Call:
    """How a model is called: with what its forward takes."""

    cache: str | None  # the argument that takes a cache
    has_states: bool  # whether it holds more than keys and values
    takes_positions: bool
    keeps_logits: bool  # of the last tokens alone

    @classmethod
    def of(cls, model: Any) -> Self:
        taken, carries_states = inspect.signature(model.forward).parameters, has_states(model.config)
        names = ("past_key_values", "cache_params") if carries_states else ("past_key_values",)
        cache = next((name for name in names if name in taken), None)
        # Models without attention have no positions; what takes any arguments hands them on.
        takes_positions = "position_ids" in taken or any(each.kind == each.VAR_KEYWORD for each in taken.values())
        cache = cache if has_cache(model.config) else None
        return cls(cache, carries_states, takes_positions, "logits_to_keep" in taken)

    def settings(self, segment: Segment, context: Context) -> dict[str, Any]:
        """What a forward over a segment is called with besides the inputs and the memory.

        Positions are counted through the document, [1, S], where a memory goes before; else they are the model's own, from
        0. A cache of keys and values is used even where nothing is remembered: transformers would else look for packed
        documents in the positions, which takes time and a wait for the device.
        """
        is_carried = context.memory is not None
        settings: dict[str, Any] = {"use_cache": self.cache is not None and (is_carried or not self.has_states)}
        if is_carried and self.takes_positions:
            start, stop = segment.cut.start, segment.cut.stop
            settings["position_ids"] = torch.arange(start, stop, device=segment.inputs.device).unsqueeze(0)
        if self.keeps_logits:
            settings["logits_to_keep"] = segment.targets.shape[1]
        return settings


def read(
    model: Any, segment: Segment, memory: Memory, context: Context, call: Call | None = None
) -> tuple[Tensor, Memory]:
    """One forward over a segment with what the context has in view; `call`: how, if that is known.

    Returns the logits of the scored tokens [D, S, V] and the memory for the next segment. Gradients reach the keys and
    values of this segment; the memory is detached.
    """
    call = call or Call.of(model)
    settings, room = call.settings(segment, context), context.kept(segment.cut.stop)
    memory = _behind_sinks(model, call, segment, memory, context)
    return _forward(model, call, segment.inputs, segment.targets.shape[1], settings, memory, room)


class WithWeights:
    """A model that reads with other tensors in the place of its own weights.

    Args:
        model: that reads.
        weights: by name.
    """

    def __init__(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        self.config = model.config
        self._model = model
        self._weights = dict(weights)

    def __call__(self, **settings: Any) -> Any:
        return functional_call(self._model, self._weights, (), settings)


def read_alone(
    model: Any,
    names: Sequence[str],
    stacks: Sequence[Tensor],
    segment: Segment,
    memory: Memory,
    context: Context,
    guide: Tensor | None = None,
    keeps_logits: bool = False,
) -> Reading:
    """The rows of a segment, read one after another.

    Args:
        model: that reads.
        names: of the learned weights.
        stacks: of each, [R, *shape]; none: all rows are read with the model's own.
        segment: with a row of inputs and targets for each row.
        memory: of all rows.
        context: what a forward has in view.
        guide: logits [R, S, V] that each row is compared with.
        keeps_logits: whether they are returned.
    """
    call, found = Call.of(model), list[Reading]()
    for row in range(len(segment.inputs)):
        reader = WithWeights(model, {name: stack[row] for name, stack in zip(names, stacks, strict=True)})
        own = itemgetter(slice(row, row + 1))
        alone = segment.changed(own)
        logits, remembers = read(reader, alone, each_of(memory, own), context, call)
        beside = None if guide is None else own(guide)
        found.append(_reading(logits, alone.targets, remembers, beside, keeps_logits))
    nats, memories, apart, kept = zip(*found, strict=True)
    return Reading(
        torch.cat(nats),
        together(memories),
        None if guide is None else torch.cat(apart),
        torch.cat(kept) if keeps_logits else None,
    )


def nats_function(model: Any, compile: bool | str) -> Callable[..., Reading]:
    """What reads a segment as `read` does, and may compare it with a guide, or keep its logits.

    Args:
        model: that reads.
        compile: whether forward and backward run through `torch.compile`, at the first call; or its mode.
    """
    if compile:
        # Static and learning; without memory, while it grows and full; one row and many: up to twenty graphs a run. Beyond
        # its own limit of 8 torch would run what is new uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    forward = torch.compile(_nats, mode=None if compile is True else str(compile)) if compile else _nats

    call = Call.of(model)

    def nats_of(
        segment: Segment, memory: Memory, context: Context, guide: Tensor | None = None, keeps_logits: bool = False
    ) -> Reading:
        # Positions are made here: as numbers they would be new to a graph in each segment.
        settings, room = call.settings(segment, context), context.kept(segment.cut.stop)
        memory = _behind_sinks(model, call, segment, memory, context)
        if isinstance(compile, str):
            torch.compiler.cudagraph_mark_step_begin()
        inputs, targets = segment.inputs, segment.targets
        reading: Reading = forward(model, call, inputs, targets, settings, memory, room, guide, keeps_logits)
        if isinstance(compile, str):  # the next replay of a CUDA graph writes over what this one has returned
            nats, next_memory, *others = reading
            cloned = [None if other is None else other.clone() for other in others]
            return Reading(nats.clone(), each_of(next_memory, torch.clone), *cloned)
        return reading

    return nats_of


def _nats(
    model: Any,
    call: Call,
    inputs: Tensor,
    targets: Tensor,
    settings: dict[str, Any],
    memory: Memory,
    room: int | None,
    guide: Tensor | None,
    keeps_logits: bool,
) -> Reading:
    logits, memory = _forward(model, call, inputs, targets.shape[1], settings, memory, room)
    return _reading(logits, targets, memory, guide, keeps_logits)


def _reading(logits: Tensor, targets: Tensor, memory: Memory, guide: Tensor | None, keeps_logits: bool) -> Reading:
    apart = None if guide is None else divergences(logits, guide)
    return Reading(token_nats(logits, targets), memory, apart, logits if keeps_logits else None)


def _forward(
    model: Any, call: Call, inputs: Tensor, scored: int, settings: dict[str, Any], memory: Memory, room: int | None
) -> tuple[Tensor, Memory]:
    """Logits of the last `scored` tokens, and the next memory of at most `room` positions; None: none is kept."""
    cache = new_cache(model.config, call.has_states, memory) if settings["use_cache"] else None
    if cache is not None:
        settings = settings | {str(call.cache): cache}
    is_single = call.has_states and bool(memory) and inputs.shape[1] == 1
    if is_single:
        # transformers reads a single token behind a state by a way of its own, which writes over that state before the
        # backward; so another token is read behind it. A segment of one token ends a document: nobody reads the state.
        inputs = inputs.expand(-1, 2)
        settings = settings | {name: _longer(name, value) for name, value in settings.items()}
    logits = model(input_ids=inputs, **settings).logits[:, -scored - is_single :][:, :scored]
    return logits, None if room is None or cache is None else remembered(cache, room)


def _longer(name: str, value: Any) -> Any:
    """A setting of a forward over a single token as it is of two."""
    if name == "position_ids":
        return torch.cat([value, value + 1], dim=1)
    return 2 if name == "logits_to_keep" else value


@torch.no_grad()
def _behind_sinks(model: Any, call: Call, segment: Segment, memory: Memory, context: Context) -> Memory:
    """The memory with the document's first tokens in front, if they have dropped out of it and are to stay in view.

    They are read anew, as the weights are now, at the positions right before the memory: a model knows them there however
    long the document is.
    """
    if segment.sinks is None:
        return memory
    inputs, start = segment.sinks, segment.cut.start - (context.memory or 0)
    count = inputs.shape[1]
    first = replace(segment, cut=Cut(0, start, start + count, 0), inputs=inputs, targets=inputs[:, :1])
    return behind(_forward(model, call, inputs, 1, call.settings(first, context), None, count)[1], memory)


def all_finite(sums: list[Tensor], rows: int, device: torch.device) -> Tensor:
    """Whether all of each row's gradients are finite, bool [rows], from sums of them: one is finite only if all terms are.

    Shapes: of each weight that has a gradient, sums [rows], or a number where there is one row.
    """
    if not sums:
        return torch.ones(rows, dtype=torch.bool, device=device)
    return torch.stack(sums).view(len(sums), rows).isfinite().all(dim=0)


class Weights(ABC):
    """The learned weights of the documents that are being read, the initial weights θ0, and the memory.

    Shapes: D documents, S columns of a segment, R rows: one for each rule's learning from each document.
    """

    learned: list[Any]  # the tensors by which gradients are taken
    initial: list[Tensor]  # θ0 of each
    of_rules: list[list[nn.Parameter]]  # of each rule, the tensors that its optimizer changes
    owners: list[tuple[int, int]]  # of each row, its rule and its document's place in the wave
    # Of each change of the gradient what it has left out so far, of each learned weight; none where it keeps no errors.
    errors: list[list[Tensor]]  # [R, *shape]

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        self.model = model
        self.context = context
        self._nats_of = nats_function(model, compile)
        self.memory: Memory = None
        self.static_memory: Memory = None
        self.errors = []
        self._adapters = adapters_of(model)
        self._sums: Later | None = None  # of the bits of the present weights; None: not taken since they changed

    def enter(self, segment: Segment, optimizers: Sequence[Optimizer]) -> None:
        """Prepares for a segment: a new wave begins without memory, and documents that have ended are dropped."""
        if segment.is_first:
            self.memory = self.static_memory = None
        self._narrow(len(segment.documents), optimizers)

    def keep(self, memory: Memory) -> None:
        """Sets the memory that the next segment is read with."""
        self.memory = memory

    @abstractmethod
    def _narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """Drops all but the first `documents` documents of a wave from weights, memory and optimizer state."""

    @abstractmethod
    def score(self, segment: Segment, guide: Tensor | None = None, plain: bool = False) -> Reading:
        """Reads a segment, each row under its own weights; `guide`: logits [D, S, V] to compare with; `plain`: not compiled."""

    def read_again(self, segment: Segment) -> Tensor:
        """Nats [R, S] of an earlier segment of the documents, each row under its own weights, without a memory."""
        memory, self.memory = self.memory, None
        try:
            return self.score(segment).nats
        finally:
            self.memory = memory

    @abstractmethod
    def score_static(self, segment: Segment, keeps_logits: bool = False) -> Reading:
        """Reads a segment under θ0, which has a memory of its own.

        Not to be called between a forward and its backward, as θ0 may take the place of the learned weights.
        """

    @abstractmethod
    def scored(self, segment: Segment) -> Tensor:
        """The columns of a segment that each row scores, bool [R, S]."""

    @abstractmethod
    def gradients(self) -> dict[int, Tensor]:
        """The rows' gradients [R, *shape], in place, by the weight's place in `learned`, of those that have one."""

    @abstractmethod
    def norms(self) -> Tensor:
        """The norm of each row's gradient over all weights, ‖g‖₂, [R]."""

    @torch.no_grad()
    def change_gradients(self, changes: Sequence[Gradient], learners: Sequence[bool]) -> None:
        """Makes each of these changes of the rows' gradients, in their order; a row that doesn't learn keeps its errors."""
        others = [row for row, learns in enumerate(learners) if not learns]
        for change, errors in zip(changes, self.errors, strict=True):
            before = [error[others] for error in errors]
            change.change(RowGradients(self.gradients(), self.norms, errors))
            for error, kept in zip(errors, before, strict=True):
                error[others] = kept

    @abstractmethod
    def keep_errors(self, changes: Sequence[Gradient]) -> None:
        """Makes room for what each of these changes of the gradient will leave out."""

    @abstractmethod
    def finite(self) -> Tensor:
        """Whether all of each row's gradients are finite, bool [R], on the device."""

    @abstractmethod
    def step(self, optimizers: Sequence[Optimizer], finite: Sequence[bool], learners: Sequence[bool]) -> None:
        """Makes one update by each rule from the gradients of the last backward, which are then dropped.

        A row that is not among the `learners` stays as it was. Where gradients are not `finite`, weights of a single row stay
        as they were; one of several rows, from whose document nothing more is learned, is spoiled and changes no other.
        """

    def drop_gradients(self) -> None:
        """Forgets the gradients of the last backward."""
        for weight in self.learned:
            weight.grad = None

    @abstractmethod
    def reset(self, documents: int, keep: float = 0.0) -> None:
        """θ ← θ0 + keep · (θ − θ0) for the documents of a new wave, which is a single one if anything is kept."""

    @abstractmethod
    def digests(self, documents: int, fetch: Fetch) -> WeightDigests:
        """Digests of the learned weights of each of a wave's first documents."""

    @abstractmethod
    def progress_state(self) -> dict[str, Any]:
        """Learned weights and memory, and which row is whose: tensors and plain data."""

    @abstractmethod
    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` gave."""

    def _read(
        self,
        segment: Segment,
        memory: Memory,
        guide: Tensor | None = None,
        keeps_logits: bool = False,
        plain: bool = False,
    ) -> Reading:
        """Reads a segment by the model as it is now; `plain`: not compiled."""
        nats_of = nats_function(self.model, False) if plain else self._nats_of
        return nats_of(segment, memory, self.context, guide, keeps_logits)

    def _switch_adapters(self, on: bool) -> None:
        for adapter in self._adapters:
            adapter.enable_adapters(on)


class InPlace(Weights):
    """Learned weights in the model itself, for one document at a time.

    θ0 is kept beside them: reset copies it back, and the static reference reads with it. Where adapters learn, they are
    switched off for the reference instead.
    """

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        super().__init__(model, context, compile)
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.of_rules = [self.learned]
        self.owners = [(0, 0)]
        self.initial = [parameter.detach().clone() for parameter in self.learned]
        self._summed: list[tuple[int, int]] = []  # address and version of each weight, when `_sums` were taken

    def _narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """One document at a time: there is none to drop."""

    def score(self, segment: Segment, guide: Tensor | None = None, plain: bool = False) -> Reading:
        return self._read(segment, self.memory, guide, plain=plain)

    @torch.no_grad()
    def score_static(self, segment: Segment, keeps_logits: bool = False) -> Reading:
        with self._under_initial():
            reading = self._read(segment, self.static_memory, keeps_logits=keeps_logits)
        self.static_memory = reading.memory
        return reading

    def scored(self, segment: Segment) -> Tensor:
        return segment.targets != NOT_SCORED

    def gradients(self) -> dict[int, Tensor]:
        return {place: weight.grad[None] for place, weight in enumerate(self.learned) if weight.grad is not None}

    def norms(self) -> Tensor:
        return torch.nn.utils.get_total_norm([weight.grad for weight in self.learned if weight.grad is not None])[None]

    def keep_errors(self, changes: Sequence[Gradient]) -> None:
        kept = [self.learned if change.keeps_errors else [] for change in changes]
        self.errors = [[torch.zeros_like(weight.detach())[None] for weight in weights] for weights in kept]

    def finite(self) -> Tensor:
        sums = [weight.grad.sum() for weight in self.learned if weight.grad is not None]
        return all_finite(sums, 1, self.model.device)

    def step(self, optimizers: Sequence[Optimizer], finite: Sequence[bool], learners: Sequence[bool]) -> None:
        for optimizer in optimizers if finite[0] and learners[0] else ():
            optimizer.step()
        for error in () if finite[0] else chain(*self.errors):  # what is left out of NaN is NaN
            error.zero_()
        self.drop_gradients()
        self._sums = None

    @torch.no_grad()
    def reset(self, documents: int = 1, keep: float = 0.0) -> None:
        if keep:
            for weight, initial in zip(self.learned, self.initial, strict=True):
                weight.copy_(torch.add(initial, weight - initial, alpha=keep))
        elif self.learned:
            torch._foreach_copy_(self.learned, self.initial)
        for error in chain(*self.errors):
            error.zero_()

    def digests(self, documents: int, fetch: Fetch) -> WeightDigests:
        # To avoid a second pass over all weights, the digest is taken again only if torch's count of changes to a tensor
        # has moved. Writes through `.data` go round that count; they still change the digest after the next update.
        version = [(weight.data_ptr(), weight._version) for weight in self.learned]
        if self._sums is None or version != self._summed:
            self._sums, self._summed = fetch.later(self._sums_of_bits()[None]), version
        return WeightDigests(self._sums, [[0]] * documents)

    def _sums_of_bits(self) -> Tensor:
        """Σ of the bits of each weight, int64 [weights]."""
        sums = [sums_of_bits(weight.detach().reshape(1, -1)) for weight in self.learned]
        return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=self.model.device)

    def progress_state(self) -> dict[str, Any]:
        memories = {"memory": self.memory, "static_memory": self.static_memory}
        return {"learned": self.learned, "errors": self.errors, **memories}

    @torch.no_grad()
    def load_progress_state(self, state: dict[str, Any]) -> None:
        for weight, saved in zip(self.learned, state["learned"], strict=True):
            weight.copy_(saved)
        for error, saved in zip(chain(*self.errors), chain(*state.get("errors", ())), strict=True):
            error.copy_(saved)
        self.memory, self.static_memory = (
            restored(state[name], self.model.device) for name in ("memory", "static_memory")
        )

    @contextmanager
    def _under_initial(self) -> Iterator[None]:
        if self._adapters:
            self._switch_adapters(False)
        else:
            self._exchange()
        try:
            yield
        finally:
            if self._adapters:
                self._switch_adapters(True)
            else:
                self._exchange()

    def _exchange(self) -> None:
        # Exchanging storages copies nothing, and parameters stay the same objects, on which optimizers rely.
        for parameter, initial in zip(self.learned, self.initial, strict=True):
            parameter.data, initial.data = initial.data, parameter.data
