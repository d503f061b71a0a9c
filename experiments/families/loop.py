"""Loop: dynamic evaluation written out, one document after another, with nothing of dynlight.

A document is read by a copy of the model. Each segment is scored, and then learned from, if there is an update.
`Windows`, `Carried` and `Trimmed` say what a forward has in view.
"""

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

PREFIX = 0  # the token before a document's first
# Layers of a cache; a dummy is of a block that has no keys of its own.
_OF_KEYS_AND_VALUES = {DummyLayer, DynamicLayer, DynamicSlidingWindowLayer}
_OF_STATES_TOO = {DummyLayer, DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}
Update = Callable[[Iterable[Tensor]], Optimizer]


class View(ABC):
    """What a forward over one segment of a document has in view; a new one for each document."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, inputs: Tensor, start: int, stop: int) -> Tensor:
        """Logits [at least stop − start, V], the last of which are those of the inputs `start` to `stop`."""


class Windows(View):
    """The inputs before the segment, read again: so many in all."""

    def __init__(self, window: int) -> None:
        self.window = window

    def logits(self, model: PreTrainedModel, inputs: Tensor, start: int, stop: int) -> Tensor:
        window = inputs[max(0, stop - self.window) : stop]
        return model(input_ids=window[None], use_cache=False).logits[0]


class Carried(View):
    """All that transformers' own cache holds of the segments before."""

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None

    def logits(self, model: PreTrainedModel, inputs: Tensor, start: int, stop: int) -> Tensor:
        self._cache = DynamicCache(config=model.config) if self._cache is None else detached(self._cache)
        return with_cache(model, inputs, start, stop, self._cache)


class Trimmed(View):
    """All states, and keys and values of the last `room` positions."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._cache: DynamicCache | None = None

    def logits(self, model: PreTrainedModel, inputs: Tensor, start: int, stop: int) -> Tensor:
        if self._cache is None:  # a layer with a sliding window of its own would count those that are cut off
            kinds = kinds_of_layers(model)
            self._cache = DynamicCache() if kinds <= _OF_KEYS_AND_VALUES else DynamicCache(config=model.config)
        logits = with_cache(model, inputs, start, stop, self._cache)
        for layer in self._cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys[:, :, -self.room :], layer.values[:, :, -self.room :]
        return logits

    @staticmethod
    def suits(model: PreTrainedModel) -> bool:
        """Whether the keys and values of a model can be cut so."""
        kinds = kinds_of_layers(model)
        return kinds <= _OF_KEYS_AND_VALUES or kinds <= _OF_STATES_TOO


def with_cache(model: PreTrainedModel, inputs: Tensor, start: int, stop: int, cache: DynamicCache) -> Tensor:
    """Logits of the inputs `start` to `stop`, before which the cache holds what went before."""
    taken = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"cache_params" if "cache_params" in taken else "past_key_values": cache}
    if "position_ids" in taken or "kwargs" in taken:  # which are handed on
        settings["position_ids"] = torch.arange(start, stop)[None]
    return model(input_ids=inputs[None, start:stop], use_cache=True, **settings).logits[0]


def detached(cache: DynamicCache) -> DynamicCache:
    """A copy of a cache, from which no gradient goes back."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(each) for key, each in value.items()}
        return value.detach().clone() if isinstance(value, Tensor) else value

    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        vars(layer).update(of(vars(layer)))
    return copied


def kinds_of_layers(model: PreTrainedModel) -> set[type]:
    """The kinds of layers that transformers' cache for a model has."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers}


def read(
    model: PreTrainedModel, tokens: Sequence[int], segment: int, view: View, update: Update | None = None
) -> Tensor:
    """Nats of each token of a document, float32 [tokens]."""
    model = copy.deepcopy(model)
    optimizer = update([weight for weight in model.parameters() if weight.requires_grad]) if update else None
    sequence = torch.tensor([PREFIX, *tokens])
    nats = []
    for start in range(0, len(tokens), segment):
        stop = min(start + segment, len(tokens))
        # transformers' cache writes states over those that it carried, which a backward needs.
        with torch.set_grad_enabled(optimizer is not None), allow_mutation_on_saved_tensors():
            logits = view.logits(model, sequence, start, stop)[start - stop :]
            of_segment = F.cross_entropy(logits.float(), sequence[start + 1 : stop + 1], reduction="none")
            nats.append(of_segment.detach())
            if optimizer is not None:
                optimizer.zero_grad()
                of_segment.mean().backward()
                optimizer.step()
    return torch.cat(nats)


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model, each weight of which is off in its last bit."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps)
    return model


def adapted(model: PreTrainedModel, rank: int, alpha: int) -> PreTrainedModel:
    """A copy of the model with PEFT's adapters, which learn alone."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    return model


def mixed(nats: Sequence[Tensor], switching: float) -> Tensor:
    """Nats of a mixture of experts: after each token Bayes' rule, then a part of all weight spread evenly."""
    chances = torch.exp(-torch.stack(list(nats)).double())
    experts = len(chances)
    weights = torch.full((experts,), 1 / experts, dtype=torch.float64)
    mixture = []
    for of_token in chances.T:
        joint = weights * of_token
        mixture.append(-joint.sum().log())
        weights = (1 - switching) * joint / joint.sum() + switching / experts
    return torch.stack(mixture)
