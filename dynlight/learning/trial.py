"""Trial: does a model read each row of a batch as it reads the row alone, and with a memory as without one?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlight.choices.context import Overlapping, TransformerXL, position_limit, refused_memory
from dynlight.choices.memories import DocumentMemory
from dynlight.choices.parameters import AdaptedLinear
from dynlight.documents.segments import Context, Cut, Segment
from dynlight.errors import require
from dynlight.learning.forward import read, read_alone, token_nats
from dynlight.learning.rows import Batch, kinds_one_by_one

_COLUMNS = 7  # no multiple of the rows, so that axes in another order are found out
_PART = 16  # tokens of each part of a text that is read with a memory
# How far the logits of a row may be apart, as a share of their size; experts, say, are chosen anew by the last bit.
_TOLERANCE, _BF16_TOLERANCE = 1e-3, 0.1


def check_model(
    model: PreTrainedModel, context: Context, parameters: object, memories: Sequence[DocumentMemory], is_whole: bool
) -> None:
    """Raises SettingError where a model cannot be read as it was prepared, or not with a memory as without one.

    Args:
        model: that reads.
        context: what a forward has in view.
        parameters: which weights of it learn.
        memories: that are to be experts.
        is_whole: whether it lies on one device.
    """
    kind = model.config.model_type
    if any("states" in memory.needs for memory in memories):
        reason = reason_against_states(model)
        require(reason is None, "memories", f"need no hidden states for {kind}, {reason}", got="NeuralCache",
                advice="choose NGrams or OutputBias")  # fmt: skip
    if is_whole:
        _check_reading(model, Overlapping(context.segment, context.segment), parameters)
    if context.memory:  # behind, so that each trial can fail for one reason alone
        if (reason := reason_against_memory(model)) is not None:
            raise refused_memory(model.config, reason, got=type(context).__name__)
        if is_whole:
            _check_reading(model, context, parameters)


def _check_reading(model: PreTrainedModel, context: Context, parameters: object) -> None:
    reason = reason_against_reading(model, context)
    must = f"suit {model.config.model_type}, {reason}"
    require(reason is None, "parameters", must, got=parameters, advice="choose others")


@torch.no_grad()
def reason_against_rows(
    model: PreTrainedModel, context: Context, weights: Sequence[nn.Parameter], batch: Batch
) -> str | None:
    """Why a model cannot read rows that each have weights of their own; None: it can.

    Up to three rows of different weights and tokens are read together, then each alone by the model with the row's weights,
    and gradients taken. So a model that mixes rows, that reads a weight past the module which holds it, or that asks for
    something no row has, is found out before a run. The stacks are left changed.

    Args:
        model: whose modules are in rows.
        context: what a forward has in view.
        weights: θ0 of the learned weights, in the model.
        batch: what holds their stacks.
    """
    rows = min(3, len(batch.stacks[0])) if weights else 3
    inputs = _tokens(model, rows, _COLUMNS)
    initial, whole = [weight.data for weight in weights], list(batch.stacks)
    batch.stacks[:] = [stack[:rows] for stack in whole]
    for stack, theta in zip(batch.stacks, initial, strict=True):
        for row, weight in enumerate(stack):
            weight.copy_(theta * (1.05 + 0.05 * row) + 0.01 * (row + 1))  # the first isn't θ0 either
    try:
        with batch.of(inputs):
            together = _logits(model, inputs, context)
        alone = []
        for row in range(rows):
            for weight, stack in zip(weights, batch.stacks, strict=True):
                weight.data = stack[row]
            alone.append(_logits(model, inputs[row : row + 1], context))
        batch.stacks[:] = [stack.detach().requires_grad_() for stack in batch.stacks]
        with batch.of(inputs):
            _learn_twice(lambda: _logits(model, inputs, context), batch.stacks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that is not made for rows
        modules = ", ".join(kinds_one_by_one(model)) or "forward"
        return f"whose {modules} cannot be read row by row ({_first_line(error)})"
    finally:
        batch.stacks[:] = whole
        for weight, theta in zip(weights, initial, strict=True):
            weight.data = theta
    expected = torch.cat(alone)
    apart = _apart(together, expected)
    return f"whose logits of a row are {apart} apart from the row alone" if apart else None


@torch.enable_grad()
def _learn_twice(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> None:
    """Takes gradients in two forwards, one after the other: a module that keeps something of the first fails in the second."""
    for _ in range(2):
        loss = forward().float().logsumexp(-1).sum()
        if weights:
            torch.autograd.grad(loss, list(weights), allow_unused=True)


def reason_against_rows_alone(
    model: PreTrainedModel, context: Context, names: Sequence[str], stacks: Sequence[Tensor]
) -> str | None:
    """Why a model cannot read rows one after another, and be learned from again and again; None: it can.

    Args:
        model: that reads.
        context: what a forward has in view.
        names: of the learned weights.
        stacks: of each, [R, *shape].
    """
    inputs = _tokens(model, min(2, len(stacks[0])) if stacks else 1, _COLUMNS)
    try:
        _learn_twice(lambda: read_alone(model, names, stacks, _segment(inputs), None, context).nats, stacks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises
        return f"which cannot be read so ({_first_line(error)})"
    return None


@torch.no_grad()
def nats_behind(model: PreTrainedModel, sequence: Tensor, memory: int) -> float:
    """Mean nats of the second half of a text, with so many positions of the first half in memory.

    Args:
        model: that reads.
        sequence: an even number of inputs, and behind them the last target, int64.
        memory: positions.
    """
    half = len(sequence) // 2
    context, carried, nats = TransformerXL(half, memory), None, torch.empty(0)
    for start in (0, half):
        inputs, targets = (sequence[start + by : start + by + half][None].to(model.device) for by in (0, 1))
        logits, carried = read(model, _segment(inputs, start), carried, context)
        nats = token_nats(logits, targets)
    return nats.mean().item()


@torch.no_grad()
def reason_against_memory(model: PreTrainedModel) -> str | None:
    """Why a model cannot read a text in parts, with keys and values of the earlier ones in memory; None: it can.

    A text is read in three parts, and in one forward without a memory: the logits must be the same, and what is carried at
    the end. So a model that remembers something else, or looks at what its cache holds, is found out before a run.
    """
    length = 3 * min(_PART, (position_limit(model.config) or 3 * _PART) // 3)
    if length == 0:
        return None
    inputs = _tokens(model, 1, length)
    parts, memory = [], None
    try:
        for start in range(0, length, length // 3):
            part = _segment(inputs[:, start : start + length // 3], start)
            logits, memory = read(model, part, memory, TransformerXL(length, memory=length))
            parts.append(logits)
        whole, _ = read(model, _segment(inputs), None, Overlapping(length, window=length))
        _, at_once = read(model, _segment(inputs), None, TransformerXL(length, memory=length))
    except Exception as error:  # whatever a model raises that is not made for it
        return f"which cannot be read with a memory ({_first_line(error)})"
    if apart := _apart(torch.cat(parts, dim=1), whole):
        return f"whose logits with a memory are {apart} apart from those in one forward"
    # A state that begins anew in each part may show in it alone, where the model has made little of it yet.
    for mine, expected in zip(memory or (), at_once or (), strict=True):
        for name, tensor in mine.items():
            if apart := _apart(tensor, expected[name]):
                return f"whose {name.partition(' ')[0]} states are {apart} apart from those of one forward"
    return None


def reason_against_reading(model: PreTrainedModel, context: Context) -> str | None:
    """Why a model cannot be read and learned from as it was prepared; None: it can.

    A few tokens are read, and gradients taken. So a model that reads a weight past the adapter in its place, say, is found
    out before a run.
    """
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        logits = _logits(model, _tokens(model, 1, _COLUMNS), context)
        if learned:
            torch.autograd.grad(logits.float().logsumexp(-1).sum(), learned, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises
        return f"which cannot be read so ({_passed_by(model, error) or _first_line(error)})"
    return None


@torch.no_grad()
def reason_against_states(model: PreTrainedModel) -> str | None:
    """Why the states of a model's last layer cannot be had; None: they can."""
    inputs = _tokens(model, 1, _COLUMNS)
    try:
        context = Overlapping(_COLUMNS, window=_COLUMNS)
        states = read_alone(model, [], [], _segment(inputs), None, context, keeps={"states"}).states
        assert states is not None
        if states.shape[:2] == inputs.shape and states.ndim == 3:
            return None
        return f"whose hidden states are of shape {list(states.shape)}"
    except Exception as error:  # whatever a model raises
        return f"whose hidden states cannot be had ({_first_line(error)})"


def _passed_by(model: PreTrainedModel, error: Exception) -> str | None:
    """Which adapter a model passes by, where it reads the weight of the layer itself; None: something else went wrong."""
    adapted = getattr(error, "obj", None)  # of an AttributeError, what has no such attribute
    if not isinstance(adapted, AdaptedLinear):
        return None
    name = next(name for name, module in model.named_modules() if module is adapted)
    return f"its forward reads the weight of {name.rpartition('.')[2]} past the adapter there"


def _apart(found: Tensor, expected: Tensor) -> str | None:
    """How far logits are apart, as a share of the largest; None: no further than by another order of sums."""
    if found.shape != expected.shape:
        return f"of shape {list(found.shape)}, not {list(expected.shape)}, and so wholly"
    finite = found.isfinite() & expected.isfinite()  # of what is not, the run itself will say so
    if not finite.any():
        return None
    found, expected = found[finite], expected[finite]
    apart = (found - expected).abs().max() / expected.abs().max()
    in_bf16 = found.dtype == torch.bfloat16 or torch.is_autocast_enabled(found.device.type)
    return None if apart <= (_BF16_TOLERANCE if in_bf16 else _TOLERANCE) else f"{apart:.2g}"


def _logits(model: PreTrainedModel, inputs: Tensor, context: Context) -> Tensor:
    """Logits of a segment, and behind them of another one that is read with its memory."""
    logits, memory = read(model, _segment(inputs), None, context)
    if not memory:
        return logits
    behind, _ = read(model, _segment(inputs, start=inputs.shape[1]), memory, context)
    return torch.cat([logits, behind], dim=1)


def _segment(inputs: Tensor, start: int = 0) -> Segment:
    return Segment((), Cut(0, start, start + inputs.shape[1], 0), inputs, targets=inputs, scored=(), bytes=())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _tokens(model: PreTrainedModel, rows: int, columns: int) -> Tensor:
    vocabulary = len(model.get_input_embeddings().weight)
    return (torch.arange(rows * columns, device=model.device) * 13 + 5).view(rows, columns) % vocabulary
