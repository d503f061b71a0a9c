"""Forward: how a model reads a segment, and the nats of its tokens."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from dynlight.choices.context import has_cache, has_states
from dynlight.documents.segments import NOT_SCORED, Context, Cut, Segment
from dynlight.learning.carried import Memory, behind, each_of, new_cache, remembered, together


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The nats of each token, −ln p(target), from an fp32 log-softmax; 0 where no token is scored.

    Shapes: logits [D, S, V], targets [D, S] → nats [D, S] in fp32.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED, reduction="none")
    return nats.view_as(targets)


class Guide(NamedTuple):
    """The prediction that others are compared with: its logits [D, S, V], all divided by a temperature."""

    logits: Tensor
    temperature: float = 1.0


def divergences(logits: Tensor, guide: Guide) -> Tensor:
    """KL(guide ‖ model) of each token, in nats: Σ_w p(w) ln (p(w) / q(w)), softmaxes of logits / temperature, in fp32.

    Shapes: logits [D, S, V] → [D, S].
    """
    p, q = ((each.float() / guide.temperature).log_softmax(dim=-1) for each in (guide.logits, logits))
    shares = p.exp()
    return torch.where(shares > 0, shares * (p - q), 0.0).sum(dim=-1)  # 0 · ln 0 = 0


class Reading(NamedTuple):
    """What a forward over a segment leaves.

    Shapes: D documents, or rows; S columns; a vocabulary of V; H wide.
    """

    nats: Tensor  # fp32 [D, S]
    memory: Memory  # for the next segment
    divergences: Tensor | None = None  # from a guide, [D, S]
    logits: Tensor | None = None  # [D, S, V], constants, where they are kept
    states: Tensor | None = None  # of the last layer, from which logits are made, [D, S, H], likewise

    def kept_of(self, row: int, columns: slice) -> dict[str, Tensor | None]:
        """Logits and states of these columns of a row, where they are kept."""
        kept = {"logits": self.logits, "states": self.states}
        return {name: None if each is None else each[row, columns] for name, each in kept.items()}


Keeps = Collection[Literal["logits", "states"]]  # what a reading is asked to keep


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
    logits, memory, _ = _forward_of(model, call or Call.of(model), segment, memory, context)
    return logits, memory


def _forward_of(
    model: Any, call: Call, segment: Segment, memory: Memory, context: Context, keeps_states: bool = False
) -> "_Outputs":
    settings, room = call.settings(segment, context), context.kept(segment.cut.stop)
    memory = _behind_sinks(model, call, segment, memory, context)
    return _forward(model, call, segment.inputs, segment.targets.shape[1], settings, memory, room, keeps_states)


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
    guide: Guide | None = None,
    keeps: Keeps = (),
) -> Reading:
    """The rows of a segment, read one after another.

    Args:
        model: that reads.
        names: of the learned weights.
        stacks: of each, [R, *shape]; none: all rows are read with the model's own.
        segment: with a row of inputs and targets for each row.
        memory: of all rows.
        context: what a forward has in view.
        guide: what each row is compared with, of logits [R, S, V].
        keeps: what is returned besides nats and memory.
    """
    call, found = Call.of(model), list[Reading]()
    for row in range(len(segment.inputs)):
        reader = WithWeights(model, {name: stack[row] for name, stack in zip(names, stacks, strict=True)})
        own = itemgetter(slice(row, row + 1))
        alone = segment.changed(own)
        read = _forward_of(reader, call, alone, each_of(memory, own), context, "states" in keeps)
        beside = None if guide is None else guide._replace(logits=own(guide.logits))
        found.append(_reading(read, alone.targets, beside, keeps))
    nats, memories, *others = zip(*found, strict=True)
    kept = [None if of_rows[0] is None else torch.cat(of_rows) for of_rows in others]
    return Reading(torch.cat(nats), together(memories), *kept)


def nats_function(model: Any, compile: bool | str) -> Callable[..., Reading]:
    """What reads a segment as `read` does, and may compare it with a guide, or keep more of it.

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
        segment: Segment, memory: Memory, context: Context, guide: Guide | None = None, keeps: Keeps = ()
    ) -> Reading:
        # Positions are made here: as numbers they would be new to a graph in each segment.
        settings, room = call.settings(segment, context), context.kept(segment.cut.stop)
        memory = _behind_sinks(model, call, segment, memory, context)
        if isinstance(compile, str):
            torch.compiler.cudagraph_mark_step_begin()
        inputs, targets = segment.inputs, segment.targets
        reading: Reading = forward(model, call, inputs, targets, settings, memory, room, guide, keeps)
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
    guide: Guide | None,
    keeps: Keeps,
) -> Reading:
    read = _forward(model, call, inputs, targets.shape[1], settings, memory, room, "states" in keeps)
    return _reading(read, targets, guide, keeps)


def _reading(read: "_Outputs", targets: Tensor, guide: Guide | None, keeps: Keeps) -> Reading:
    apart = None if guide is None else divergences(read.logits, guide)
    logits = read.logits.detach() if "logits" in keeps else None
    return Reading(token_nats(read.logits, targets), read.memory, apart, logits, read.states)


class _Outputs(NamedTuple):
    """What a forward gives of the scored tokens, and the next memory."""

    logits: Tensor  # [D, S, V]
    memory: Memory
    states: Tensor | None  # [D, S, H], where they are asked for


def _forward(
    model: Any,
    call: Call,
    inputs: Tensor,
    scored: int,
    settings: dict[str, Any],
    memory: Memory,
    room: int | None,
    keeps_states: bool = False,
) -> _Outputs:
    """A forward that scores the last `scored` tokens; the next memory has at most `room` positions; None: none is kept."""
    cache = new_cache(model.config, call.has_states, memory) if settings["use_cache"] else None
    if cache is not None:
        settings = settings | {str(call.cache): cache}
    is_single = call.has_states and bool(memory) and inputs.shape[1] == 1
    if is_single:
        # transformers reads a single token behind a state by a way of its own, which writes over that state before the
        # backward; so another token is read behind it. A segment of one token ends a document: nobody reads the state.
        inputs = inputs.expand(-1, 2)
        settings = settings | {name: _longer(name, value) for name, value in settings.items()}
    if keeps_states:
        settings = settings | {"output_hidden_states": True}
    outputs = model(input_ids=inputs, **settings)
    logits = outputs.logits[:, -scored - is_single :][:, :scored]
    states = outputs.hidden_states[-1].detach()[:, -scored - is_single :][:, :scored] if keeps_states else None
    return _Outputs(logits, None if room is None or cache is None else remembered(cache, room), states)


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
    return behind(_forward(model, call, inputs, 1, call.settings(first, context), None, count).memory, memory)
