"""FLOPs as measured against FLOPs by arithmetic, on every architecture."""

import math
from dataclasses import astuple, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import CONFIGS, EXPERTS, WITH_MEMORY, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynlight import All, DynamicEvaluation, LoRA, Matching, Overlapping, RMSDynamic, TransformerXL
from dynlight.documents.segments import Cut
from dynlight.learning.flops import EmptyModel, Flops

pytestmark = pytest.mark.flops

BLOCKS = 4
FIRST_MAPS = {  # of a block, those that read its input
    "llama": ("q_proj", "k_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),  # attention and MLP side by side
    "qwen3": ("q_proj", "k_proj", "v_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj"),
    "opt": ("q_proj", "k_proj", "v_proj"),
    "gemma3": ("q_proj", "k_proj", "v_proj"),
}


def counter(model, parameters=None, context=None, update=None, reference="static"):
    module = DynamicEvaluation(
        tiny(model) if isinstance(model, str) else model,
        None,
        context=context or Overlapping(16, 64),
        parameters=parameters or All(),
        update=update or partial(torch.optim.SGD, lr=0.1),
        reference=reference,
    )
    return module.flop_counter, module


def measure(counter, context=0, scored=16, memory=0, updates=1):
    cut = Cut(0, memory, memory + scored, context)
    score = SimpleNamespace(
        segment=SimpleNamespace(cut=cut),
        updates_of=lambda row: [updates],
        experts=None,
        reread=range(0),
        stopped=frozenset(),
    )
    return counter.count(score)


def matrices(model, block=None):
    """Weights of the linear maps in each block (or of one), and of the output layer."""
    config = model.config
    inside = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and "lora_" not in name
        and any(part.isdigit() for part in name.split("."))
        and (block is None or str(block) in name.split("."))
    )
    return inside, config.vocab_size * config.hidden_size


def attention_width(model):
    config = model.config
    return config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("context", "scored"), [(0, 16), (48, 16), (0, 64), (7, 1)])
def test_full_adaptation_equals_arithmetic_overlapping(architecture, context, scored):
    counts, module = counter(architecture)
    found = measure(counts, context, scored)
    inside, output = matrices(module.model)
    read, width = context + scored, attention_width(module.model)
    attention = 4 * BLOCKS * width * read * read
    assert found.forward == 2 * inside * read + 2 * output * scored + attention
    # The embedding learns, so the gradient crosses the whole depth.
    assert found.activation == 2 * inside * read + 2 * output * scored + 2 * attention
    assert found.weight == 2 * inside * read + 2 * output * scored
    assert found.static == found.forward
    assert found.total == found.forward + found.activation + found.weight


@pytest.mark.parametrize("architecture", WITH_MEMORY)
@pytest.mark.parametrize(("scored", "memory"), [(16, 0), (16, 16), (16, 48), (5, 48), (5, 31)])
def test_full_adaptation_equals_arithmetic_with_memory(architecture, scored, memory):
    counts, module = counter(architecture, context=TransformerXL(16, 48))
    found = measure(counts, 0, scored, memory)
    inside, output = matrices(module.model)
    attention = 4 * BLOCKS * attention_width(module.model) * scored * (memory + scored)
    assert found.forward == 2 * (inside + output) * scored + attention
    assert found.activation == 2 * (inside + output) * scored + 2 * attention
    assert found.weight == 2 * (inside + output) * scored


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("first", [0, 2, 3])
def test_backward_stops_at_the_first_learned_block(architecture, first):
    counts, module = counter(architecture, Matching(blocks=[first, -1]))
    found = measure(counts, scored=32)
    inside, output = matrices(module.model)
    learned = BLOCKS - first
    per_block = inside // BLOCKS
    attention = 4 * attention_width(module.model) * 32 * 32
    assert found.forward == 2 * (inside + output) * 32 + BLOCKS * attention
    assert found.weight == 2 * learned * per_block * 32
    # In all of these a norm that learns stands before a block's first maps, so these too pass gradients down to it.
    assert found.activation == 2 * (learned * per_block + output) * 32 + 2 * learned * attention


@pytest.mark.parametrize("architecture", CONFIGS)
def test_lora_learns_its_own_small_matrices(architecture):
    rank = 4
    counts, module = counter(architecture, LoRA(rank=rank))
    found = measure(counts, scored=32)
    inside, output = matrices(module.model)
    adapters = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    attention = 4 * BLOCKS * attention_width(module.model) * 32 * 32
    assert found.forward == 2 * (inside + output + adapters) * 32 + attention
    assert found.static == 2 * (inside + output) * 32 + attention
    assert found.weight == 2 * adapters * 32
    # The first block's first maps read what no learned weight has touched, so they and their A pass nothing down.
    first = [
        (name, parameter)
        for name, parameter in module.model.named_parameters()
        if "0" in name.split(".")[:4] and any(part in name for part in FIRST_MAPS[architecture]) and parameter.ndim == 2
    ]
    stop = sum(parameter.numel() for name, parameter in first if "lora_B" not in name)
    assert stop > 0
    assert found.activation == 2 * (inside + output + adapters - stop) * 32 + 2 * attention


def test_a_segment_not_learned_from_costs_its_forward_only():
    counts, _ = counter("llama")
    found = measure(counts, updates=0)
    assert found == Flops(forward=found.forward, static=found.forward)


def test_passes_repeat_forward_and_backward():
    counts, _ = counter("llama")
    one, three = measure(counts, updates=1), measure(counts, updates=3)
    assert (three.forward, three.activation, three.weight) == (3 * one.forward, 3 * one.activation, 3 * one.weight)
    assert three.update == 3 * one.update
    assert three.static == one.static


def test_a_model_with_a_padding_token_costs_the_same():
    model = tiny("gpt2")
    model.config.pad_token_id = 0
    assert measure(counter(model)[0]) == measure(counter("gpt2")[0])
    assert model.config.pad_token_id == 0, "the model itself is as it was"


def test_tables_of_rotary_positions_are_left_out():
    class Products(nn.Module):
        """Tables that cost matrix products, as those of transformers before 5.19 do."""

        def __init__(self, tables):
            super().__init__()
            self.tables = tables

        def forward(self, hidden, *arguments, **settings):
            _ = hidden @ hidden.mT
            return self.tables(hidden, *arguments, **settings)

    model = tiny("llama")
    model.model.rotary_emb = Products(model.model.rotary_emb)
    assert measure(counter(model)[0]) == measure(counter("llama")[0])


def test_no_reference_costs_nothing():
    assert measure(counter("llama", reference=None)[0]).static == 0


@pytest.mark.parametrize(
    ("update", "operations"),
    [
        (partial(torch.optim.SGD, lr=0.1), 1),  # θ ← θ − η g
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 3),  # v · μ, v + g, θ − η v
        (partial(RMSDynamic, lr=0.1), 4),  # MS + ε, g / ·, · (−η), θ + ·
        (partial(RMSDynamic, lr=0.1, decay=0.1), 8),  # and λ · MS / mean, min, θ0 − θ, their product
    ],
)
def test_update_counts_elements_written(update, operations):
    counts, module = counter("llama", update=update)
    learned = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    assert measure(counts).update == operations * learned


@pytest.mark.parametrize("architecture", [*CONFIGS, *EXPERTS])
@pytest.mark.parametrize("context", [Overlapping(16, 48), Overlapping(16, 16), TransformerXL(16, 48)], ids=str)
def test_any_shape_costs_what_is_solved_from_few(architecture, context):
    if context.memory and architecture in ("gpt2", "opt"):
        pytest.skip("its positions are no rotations")
    counts, module = counter(architecture, LoRA(rank=2), context)
    copied = EmptyModel(module.model, context, learns=True, has_reference=True)
    with_memory = [(0, 1, 0), (0, 9, 0), (0, 7, 16), (0, 16, 31), (0, 16, 48)]
    for again, scored, memory in with_memory if context.memory else [(0, 1, 0), (31, 9, 0), (32, 16, 0), (9, 7, 0)]:
        found = measure(counts, again, scored, memory)
        assert replace(found, update=0) == copied.measure(again, scored, memory)
    assert counts.failure is None


@pytest.mark.parametrize("architecture", EXPERTS)
def test_each_token_costs_as_many_experts_as_read_it(architecture):
    counts, module = counter(architecture)
    found = measure(counts, 48, 16)
    config = module.model.config
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = BLOCKS * config.num_experts_per_tok * 3 * config.hidden_size * width
    router = BLOCKS * config.num_local_experts * config.hidden_size
    inside, output = matrices(module.model)
    inside += experts + router
    attention = 4 * BLOCKS * attention_width(module.model) * 64 * 64
    assert found.forward == 2 * inside * 64 + 2 * output * 16 + attention
    assert found.weight == 2 * inside * 64 + 2 * output * 16


class Around(nn.Module):
    """A module, and what is done around it."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


def test_a_module_with_a_weight_may_return_a_tuple():
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.inner(x) * self.scale, None

    model = tiny("llama")
    model.model.layers[1].mlp = Around(Twice(model.model.layers[1].mlp), lambda pair, x: pair(x)[0])
    counts, _ = counter(model)
    assert measure(counts) == replace(measure(counter("llama")[0]), update=measure(counts).update)


def test_what_fills_up_its_segments_is_measured_shape_by_shape():
    def padded(inner, x):
        """Reads a whole number of chunks of 8 positions, as layers with a state do."""
        return inner(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 8)))[:, : x.shape[1]]

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Around(layer.mlp, padded)
    counts, _ = counter(model)
    assert measure(counts, 0, 9).forward - measure(counts, 0, 8).forward > measure(counts, 0, 16).forward // 4
    assert measure(counts, 0, 9) != measure(counts, 0, 16)


def test_a_cost_that_cannot_be_measured_is_unknown_and_says_why():
    model = tiny("llama")
    asks = lambda inner, x: inner(x) * (1 if x.sum().item() else 2)  # noqa: E731
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, asks)
    with pytest.warns(UserWarning, match="FLOPs are not counted.*item"):
        counts, _ = counter(model)
    assert all(math.isnan(value) for value in (measure(counts).total, *astuple(measure(counts))))
    assert "item" in counts.failure


def test_an_optimizer_that_cannot_be_measured_leaves_the_rest_known():
    with pytest.warns(UserWarning, match="FLOPs of updates are not counted"):
        counts, _ = counter("llama", update=partial(torch.optim.ASGD, lr=0.1))
    assert math.isnan(measure(counts).update)
    assert replace(measure(counts), update=0) == replace(measure(counter("llama")[0]), update=0)
