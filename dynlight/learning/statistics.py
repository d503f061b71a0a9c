"""Statistics: how large each weight's gradient usually is, measured on a corpus, for a rule that needs to know it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.choices.update import GradientStatistics
from dynlight.documents.document import Document
from dynlight.documents.segments import Context
from dynlight.documents.waves import segments, waves
from dynlight.durable import draft_of
from dynlight.errors import SettingError, require_at_least
from dynlight.learning.forward import read, token_nats
from dynlight.learning.stream import DocumentStream


def check_statistics(settings: GradientStatistics, model: nn.Module, setting: str = "update.statistics") -> None:
    """Raises SettingError where there are neither statistics of this model nor settings to collect them by."""
    require_at_least(f"{setting}.segments", 1, settings.segments)
    if settings.file is not None and Path(settings.file).exists():
        _check_file(settings.file, _learned(model), setting)
    elif settings.data is None:
        file = f"{settings.file}, which is not there" if settings.file else "null"
        raise SettingError(
            f"{setting}.data",
            f"name a corpus to collect gradient statistics from where {setting}.file is {file}",
            got="null",
        )
    else:
        _stream(settings, setting)


def load_or_collect(
    settings: GradientStatistics,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    setting: str = "update.statistics",
) -> list[Tensor]:
    """MS of each learned weight, from `settings.file` if that exists, else from `settings.data`, and saved.

    Raises:
        SettingError: if there is neither.
    """
    check_statistics(settings, model, setting)
    learned = _learned(model)
    if settings.file is not None and Path(settings.file).exists():
        saved = load_file(settings.file)
        return [saved[name].to(weight.device) for name, weight in learned.items()]
    try:
        documents = _stream(settings, setting).load(tokenizer)
    except SettingError as error:
        raise error.under(setting) from error
    mean_squares = _collect(model, documents, context, settings.segments)
    if settings.file is not None:
        Path(settings.file).parent.mkdir(parents=True, exist_ok=True)
        with draft_of(Path(settings.file), is_shared=True) as draft:
            save_file({name: value.cpu() for name, value in zip(learned, mean_squares, strict=True)}, draft)
    return mean_squares


def _collect(model: PreTrainedModel, documents: Sequence[Document], context: Context, at_most: int) -> list[Tensor]:
    """MS of each learned weight over these documents, read one at a time even where the run reads several together."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    sums = [torch.zeros_like(weight) for weight in learned]
    count = 0
    for wave in waves(documents, context):
        memory = None
        for segment in segments(wave, context):
            segment = segment.to(model.device)
            logits, memory = read(model, segment, memory, context)
            gradients = torch.autograd.grad(token_nats(logits, segment.targets).mean(), learned, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
            count += 1
            if count == at_most:
                return [(total / count).sqrt_() for total in sums]
    if count == 0:
        raise SettingError("update.statistics.data", "hold at least one token", got="none")
    return [(total / count).sqrt_() for total in sums]


def _stream(settings: GradientStatistics, setting: str = "update.statistics") -> DocumentStream:
    try:
        return DocumentStream(**(settings.data or {}))
    except TypeError as error:
        reason = str(error).partition("() ")[2]
        raise SettingError(f"{setting}.data", "hold settings as data does", got=f"{settings.data}: {reason}") from error
    except SettingError as error:
        raise error.under(setting) from error


def _learned(model: nn.Module) -> dict[str, Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _check_file(file: str, learned: dict[str, Parameter], setting: str) -> None:
    try:
        with safe_open(file, "pt") as saved:
            shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SettingError(f"{setting}.file", "be gradient statistics", got=f"{file} ({error})") from error
    if shapes != {name: list(weight.shape) for name, weight in learned.items()}:
        raise SettingError(
            f"{setting}.file",
            f"hold the statistics of the {len(learned)} learned weights of this model",
            got=f"{file} with others",
            advice="delete it to collect them anew",
        )
