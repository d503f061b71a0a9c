"""The loops that one would write by hand, beside which dynlight is measured: no tables, no audit, one kind of model."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from dynlight import LoRA
from dynlight.choices.parameters import AdaptedLinear

MEMORY = 256
RATE = 0.01
WARM_UP = 10  # segments of a document before the clock starts
Result = tuple[float, float]  # nats, seconds a token after the warm-up
SGD = partial(torch.optim.SGD, lr=RATE, fused=True)


def tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Tokens with something to learn: a random walk through the vocabulary."""
    steps = torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(1))
    return steps.cumsum(0) % model.config.vocab_size


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score(
    model: PreTrainedModel, inputs: Tensor, targets: Tensor, positions: Tensor, memory: Any, room: int
) -> tuple[Tensor, Any]:
    """Nats [D, S] and the next memory of a segment, from one forward."""
    cache = DynamicCache(memory)
    logits = model(input_ids=inputs, position_ids=positions, past_key_values=cache, use_cache=True).logits
    nats = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return nats, [(x.keys[:, :, -room:].detach(), x.values[:, :, -room:].detach()) for x in cache.layers]


class BatchedLoRA(nn.Module):
    """A linear map with a low-rank adapter of its own for each document, as two batched matrix products."""

    def __init__(self, base: nn.Linear, a: Tensor, documents: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.detach().repeat(documents, 1, 1))
        self.b = nn.Parameter(torch.zeros(documents, base.out_features, a.shape[0], device=a.device))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.bmm(torch.bmm(x, self.a.mT), self.b.mT) * self.scale


def with_batched_lora(model: PreTrainedModel, documents: int) -> PreTrainedModel:
    """The model with an adapter for each document on each linear map of its blocks."""
    LoRA(rank=8).prepare(model)
    for name, adapted in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        parent, _, last = name.rpartition(".")
        batched = BatchedLoRA(adapted.base_layer, adapted.lora_A["default"].weight, documents, adapted.scale)
        setattr(model.get_submodule(parent), last, batched)
    return model


def adapt_by_hand(
    make: Callable[[], PreTrainedModel],
    count: int,
    segment: int,
    documents: int = 1,
    adapters: bool = False,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = SGD,
    compile: bool | str = False,
    two_forwards: bool = False,
    memory: int = MEMORY,
    warm_up: int = WARM_UP,
    autocast: bool = False,
) -> Result:
    """Equal documents of `count` tokens: all weights of one, or an adapter for each; what dynlight is to keep up with.

    Args:
        make: gives a new model.
        count: tokens of a document.
        segment: tokens of a segment.
        documents: how many, all of the same tokens.
        adapters: whether adapters learn, or all weights.
        optimizer: the rule.
        compile: whether `torch.compile` makes one graph of the model and its nats, or its mode.
        two_forwards: a forward to score and a second one to learn.
        memory: positions that are kept.
        warm_up: segments before the clock starts.
        autocast: whether products are in bf16.
    """
    model = make()
    device = model.device
    model = with_batched_lora(model, documents) if adapters else model
    rule = optimizer([weight for weight in model.parameters() if weight.requires_grad])
    forward = torch.compile(score, mode=None if compile is True else str(compile)) if compile else score
    sequence = torch.cat([torch.zeros(1, dtype=torch.int64), tokens(model, count)]).expand(documents, -1).to(device)
    kept, total = None, 0.0
    for number, start in enumerate(range(0, count, segment)):
        if number == warm_up:
            began = now(device)
        stop = min(start + segment, count)
        if compile:
            torch.compiler.cudagraph_mark_step_begin()
        positions = torch.arange(start, stop, device=device)[None]
        given = sequence[:, start:stop], sequence[:, start + 1 : stop + 1], positions, kept, memory
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            if two_forwards:
                with torch.no_grad():
                    scored, _ = forward(model, *given)
            nats, kept = forward(model, *given)
        total += (scored if two_forwards else nats.detach()).sum(dtype=torch.float64).item()
        nats.mean(dim=1).sum().backward()
        rule.step()
        rule.zero_grad()
        if isinstance(compile, str):  # the next replay writes over what this one has returned
            kept = [(keys.clone(), values.clone()) for keys, values in kept]
    return total, (now(device) - began) / (documents * (count - warm_up * segment))
