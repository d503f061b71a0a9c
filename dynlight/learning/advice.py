"""Advice: a line at the start of a run where it would be slow without need, or its static model would read badly."""

import os
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from dynlight.choices.context import Overlapping, TransformerXL
from dynlight.documents.document import Document
from dynlight.documents.segments import Context
from dynlight.errors import SettingError
from dynlight.learning.trial import nats_behind

_LARGE = 30_000_000  # weights, from which on more threads are worth more than they cost
_SHORT = 256  # tokens of a segment, under which a GPU waits for the host
_REREAD = 8  # times that a token is read
_PART = 64  # tokens of each of the two parts of a text that the trial of sinks reads
_SINKS = 4
_WORSE = 1.05  # times the nats, from which on a model misses its first tokens


def advise(
    model: PreTrainedModel, context: Context, documents: Sequence[Document], trainer: Trainer, compile: bool | str
) -> None:
    """Warns, in the first process, of what could be better; never ends a run.

    Args:
        model: on its device.
        context: what a forward has in view.
        documents: of the run.
        trainer: that reads them.
        compile: whether forward and backward are compiled.
    """
    on_cpu = model.device.type == "cpu"
    weights = sum(weight.numel() for weight in model.parameters())
    in_bf16 = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    if on_cpu and (in_bf16 or "bf16" in str(trainer.precision)):
        warn_of_imitated_bf16("model.dtype: bfloat16" if in_bf16 else f"trainer.precision: {trainer.precision}")
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if on_cpu and trainer.world_size == 1 and weights >= _LARGE and 2 * threads <= cores:
        rank_zero_warn(f"{cores} cores, of which this run uses {threads}; set OMP_NUM_THREADS={cores}")
    if model.device.type == "cuda" and not compile and context.segment < _SHORT:
        rank_zero_warn(
            f"a GPU waits for the host on segments of {context.segment} tokens; set model.compile: reduce-overhead, or "
            "data.together: auto"
        )
    for line in [*_rereading(model, context), *_missing_sinks(model, context, documents)]:
        rank_zero_warn(line)


def warn_of_imitated_bf16(setting: str) -> None:
    """Warns where a CPU that has no bf16 instructions is asked for bf16, by this setting."""
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if torch.backends.mkldnn.is_available() and is_supported is not None and not is_supported():
        rank_zero_warn(f"{setting}: this CPU has no bf16 instructions and imitates them, some 50 times slower")


def _rereading(model: PreTrainedModel, context: Context) -> Iterator[str]:
    if not (isinstance(context, Overlapping) and context.window >= _REREAD * context.segment):
        return
    memory = TransformerXL(context.segment, context.window - context.segment, sinks=_SINKS)
    try:
        memory.check(model.config)
    except SettingError:
        return
    times = round(context.window / context.segment)
    yield f"each token is read {times} times; {memory} has as much in view and reads it once"


def _missing_sinks(model: PreTrainedModel, context: Context, documents: Sequence[Document]) -> Iterator[str]:
    """The nats of a document's beginning, with and without its first tokens in memory, are compared."""
    room = context.memory or 0
    document = next((each for each in documents if len(each) > max(room + context.segment, 2 * _PART)), None)
    if room == 0 or context.sinks or document is None:
        return
    sequence = torch.cat([document.tokens.new_tensor([document.prefix]), document.tokens[: 2 * _PART]])
    with_all, without = (nats_behind(model, sequence, memory) for memory in (_PART, _PART - _SINKS))
    if without > _WORSE * with_all:
        yield (
            f"this model reads {without / with_all - 1:.0%} worse once the first {_SINKS} tokens of a document drop out of "
            f"memory, and learning would be credited with mending that; set context.sinks: {_SINKS}"
        )
