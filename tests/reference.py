"""The method as one slow, obvious loop: no Lightning, nothing of dynlight, one document after another."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import DynamicCache, PreTrainedModel


def evaluate(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    prefix: int,
    *,
    segment: int,
    window: int | None = None,
    memory: int | None = None,
    make_optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    learns: Callable[[int], bool] = lambda i: True,
    passes: int = 1,
    reset: bool = True,
    clip: float | None = None,
    make_change: Callable[[], Callable[[list[Tensor]], None]] = lambda: lambda gradients: None,
    make_loss: Callable[[], Callable[[Tensor, bool], Tensor | None]] = lambda: lambda nats, is_due: nats.mean(),
    prefixes: bool = False,
    sinks: int = 0,
    refresh: int | None = None,
) -> list[list[Tensor]]:
    """Nats of each token, by document and segment. With `window` contexts overlap; with `memory` keys are kept.

    With `refresh` the keys of the last segments that fill the memory are made anew after so many updates.

    `make_change` makes what changes a document's gradients in place, before each update; `make_loss` makes what gives the
    loss of a document's segments, None where there is no update (it is asked about those, too, in which none is due).
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unlearned = [parameter.detach().clone() for parameter in learned]
    optimizer = make_optimizer(learned) if make_optimizer else None
    results: list[list[Tensor]] = []
    for tokens in documents:
        if reset and make_optimizer:
            with torch.no_grad():
                for parameter, initial in zip(learned, unlearned, strict=True):
                    parameter.copy_(initial)
            optimizer = make_optimizer(learned)
        change, loss_of = make_change(), make_loss()
        sequence = torch.tensor([prefix, *tokens])
        results.append([])
        keys_and_values: list[tuple[Tensor, Tensor]] = []
        before, updates = [], 0
        for i in range((len(tokens) + segment - 1) // segment):
            start, stop = i * segment, min((i + 1) * segment, len(tokens))
            learn = optimizer is not None and learns(i)
            with torch.set_grad_enabled(learn):
                if window is not None:
                    nats = nats_in_window(model, sequence, start, stop, window, prefixes)
                else:
                    behind = keys_behind_sinks(model, sequence[:sinks], start, memory, keys_and_values)
                    nats, cache = nats_with_memory(model, sequence, start, stop, behind)
            results[-1].append(nats.detach())
            loss = loss_of(nats, learn)
            for repeat in range(passes if learn and loss is not None else 0):
                if repeat > 0 and window is not None:
                    nats = nats_in_window(model, sequence, start, stop, window, prefixes)
                elif repeat > 0:
                    behind = keys_behind_sinks(model, sequence[:sinks], start, memory, keys_and_values)
                    nats, _ = nats_with_memory(model, sequence, start, stop, behind)
                for parameter in learned:
                    parameter.grad = None
                (loss if repeat == 0 else loss_of(nats, learn)).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(learned, clip)
                change([parameter.grad for parameter in learned])
                optimizer.step()
                updates += 1
            if memory is not None:
                before.append(keys_and_values)
                keys_and_values = last(cache, memory)
            if refresh is not None and updates >= refresh:
                updates, first = 0, max(0, i + 1 - (memory + segment - 1) // segment)
                keys_and_values = before[first]
                for j in range(first, i + 1):
                    before[j] = keys_and_values
                    start, stop = j * segment, min((j + 1) * segment, len(tokens))
                    behind = keys_behind_sinks(model, sequence[:sinks], start, memory, before[j])
                    with torch.no_grad():
                        keys_and_values = last(nats_with_memory(model, sequence, start, stop, behind)[1], memory)
    return results


def last(keys_and_values: list[tuple[Tensor, Tensor]], positions: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(each[:, :, max(0, each.shape[2] - positions) :] for each in layer) for layer in keys_and_values]


def nats_in_window(
    model: PreTrainedModel, sequence: Tensor, start: int, stop: int, window: int, prefixes: bool
) -> Tensor:
    inputs = sequence[max(0, stop - window) : stop]
    if prefixes:
        inputs = torch.cat([sequence[:1], inputs[1:]])
    # Only the scored tokens get logits: with those of the context too, sums in the backward would round differently.
    logits = model(input_ids=inputs[None], use_cache=False, logits_to_keep=stop - start).logits[0]
    return nats(logits, sequence[start + 1 : stop + 1])


def nats_with_memory(
    model: PreTrainedModel, sequence: Tensor, start: int, stop: int, kept: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    logits = model(
        input_ids=sequence[None, start:stop],
        position_ids=torch.arange(start, stop)[None],
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    states = [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]
    return nats(logits, sequence[start + 1 : stop + 1]), states


@torch.no_grad()
def keys_behind_sinks(
    model: PreTrainedModel, sinks: Tensor, start: int, memory: int, kept: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Once the first tokens have dropped out, they take the place of the oldest positions, read by the present weights."""
    if len(sinks) == 0 or start <= memory:
        return kept
    cache, positions = DynamicCache(), torch.arange(start - memory, start - memory + len(sinks))
    model(input_ids=sinks[None], position_ids=positions[None], past_key_values=cache, use_cache=True)
    return [
        (torch.cat([layer.keys, keys[:, :, len(sinks) :]], 2), torch.cat([layer.values, values[:, :, len(sinks) :]], 2))
        for layer, (keys, values) in zip(cache.layers, kept, strict=True)
    ]


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[:, None]).squeeze(-1)
