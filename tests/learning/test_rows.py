"""Modules that hold learned weights read each row of a batch as the module itself does with the row's weights."""

import copy
from functools import partial

import pytest
import torch
from models import CONFIGS, EXPERTS, tiny
from running import random_tokens, run
from torch import nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from dynlight import All, LoRA, Overlapping, TransformerXL, UpdateFrequency
from dynlight.choices.parameters import NarrowLinear
from dynlight.learning.rows import Batch, InRows, RowsBroadcast, RowsOneByOne, kinds_one_by_one, put_in_rows
from dynlight.learning.trial import reason_against_rows

ROWS, COLUMNS, WIDTH = 3, 4, 6


class Gated(nn.Module):
    """A module of a kind that nobody knows: a matrix and a vector, two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, gate=None):
        y = x @ self.map
        return y if gate is None else y * gate.sigmoid(), self.scale.expand_as(x) + x


MODULES = {
    "linear": lambda: nn.Linear(WIDTH, 5),
    "no bias": lambda: nn.Linear(WIDTH, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, WIDTH),
    "adapter": lambda: NarrowLinear(nn.Linear(WIDTH, 2, bias=False)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "RMS norm": lambda: LlamaRMSNorm(WIDTH),
    "unknown": Gated,
}
SHAPES = {"batch": (ROWS, COLUMNS, WIDTH), "heads": (ROWS, COLUMNS, 2, WIDTH), "flattened": (ROWS * COLUMNS, WIDTH)}


def in_rows(module, learned):
    """The module in rows; its batch; the stack of each weight that learns, by name."""
    stacks = {name: torch.randn(ROWS, *module.get_parameter(name).shape, requires_grad=True) for name in learned}
    batch = Batch([*stacks.values()])
    put_in_rows(model := copy.deepcopy(module), [model.get_parameter(name) for name in learned], batch)
    return model, batch, stacks


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def assert_rows_are_those_of_each_alone(module, learned, inputs, by_row, **named):
    stacked, batch, stacks = in_rows(module, learned)
    with batch.of(torch.empty(ROWS, COLUMNS)):
        together = outputs(stacked(inputs, **named))
    gradients = torch.autograd.grad(sum((y**2).sum() for y in together), [*stacks.values()])
    for row in range(ROWS):
        own = {name: stack[row] for name, stack in stacks.items()}
        alone = outputs(
            functional_call(module, own, (by_row(inputs, row),), {k: by_row(v, row) for k, v in named.items()})
        )
        for found, wanted in zip(together, alone, strict=True):
            torch.testing.assert_close(by_row(found, row), wanted)
        of_row = torch.autograd.grad(sum((y**2).sum() for y in alone), [*stacks.values()])
        for found, wanted in zip(gradients, of_row, strict=True):
            torch.testing.assert_close(found[row], wanted[row])
    if not isinstance(module, NarrowLinear):
        assert all(gradient.is_contiguous() for gradient in gradients), "as the weights are, so that none is copied"
    for found, wanted in zip(outputs(stacked(inputs, **named)), outputs(module(inputs, **named)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)  # without a batch: the module as it was


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_in_rows_is_that_of_each_row_alone(kind, shape):
    torch.manual_seed(0)
    module, x = MODULES[kind](), torch.randn(SHAPES[shape], requires_grad=True)
    names = [name for name, _ in module.named_parameters()]
    for learned in ([name] for name in names):
        assert_rows_are_those_of_each_alone(module, learned, x, lambda x, row: x.chunk(ROWS)[row])
    assert_rows_are_those_of_each_alone(module, names, x, lambda x, row: x.chunk(ROWS)[row])


def test_a_module_of_unknown_kind_shares_out_each_of_its_arguments():
    torch.manual_seed(0)
    x, gate = torch.randn(2, ROWS, COLUMNS, WIDTH)
    assert_rows_are_those_of_each_alone(Gated(), ["map", "scale"], x, lambda x, row: x[row : row + 1], gate=gate)


@pytest.mark.parametrize("ids", ["batch", "shared", "plain"])
@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_in_rows_is_that_of_each_row_alone(ids, padding):
    torch.manual_seed(0)
    module = nn.Embedding(9, WIDTH, padding_idx=padding)
    shape = {"batch": (ROWS, COLUMNS), "shared": (1, COLUMNS), "plain": (COLUMNS,)}[ids]
    tokens = torch.randint(9, shape)
    tokens.view(-1)[1] = 2
    stacked, batch, stacks = in_rows(module, ["weight"])
    with batch.of(torch.empty(ROWS, COLUMNS)):
        together = stacked(tokens)
    (gradient,) = torch.autograd.grad((together**2).sum(), stacks["weight"])
    for row in range(ROWS):
        weight = stacks["weight"][row].detach().requires_grad_()
        alone = functional_call(module, {"weight": weight}, (tokens[row] if ids == "batch" else tokens.view(-1),))
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0)
        torch.testing.assert_close(gradient[row], torch.autograd.grad((alone**2).sum(), weight)[0])


def test_a_class_that_builds_on_a_known_one_keeps_what_it_adds():
    positions = OPTLearnedPositionalEmbedding(8, WIDTH)
    stacked, batch, stacks = in_rows(positions, ["weight"])
    with batch.of(torch.empty(ROWS, COLUMNS)):
        found = stacked(None, position_ids=torch.arange(COLUMNS)[None])
    torch.testing.assert_close(
        found, stacks["weight"][:, positions.offset : positions.offset + COLUMNS], rtol=0, atol=0
    )


@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2)], ids=str)
@pytest.mark.parametrize("architecture", [*CONFIGS, *EXPERTS])
def test_what_is_read_one_row_after_another_is_named(architecture, parameters):
    model = tiny(architecture)
    parameters.prepare(model)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    stacks = [weight.detach().repeat(3, *[1] * weight.ndim).requires_grad_() for weight in learned]
    put_in_rows(model, learned, batch := Batch(stacks))
    assert reason_against_rows(model, Overlapping(8, 8), learned, batch) is None
    one_by_one = {
        ("mixtral", "All"): ["MixtralExperts", "MixtralTopKRouter"],
        ("qwen3_moe", "All"): ["Qwen3MoeExperts", "Qwen3MoeTopKRouter"],
        ("mixtral", "LoRA"): ["ParamWrapper"],
        ("qwen3_moe", "LoRA"): ["ParamWrapper"],
    }
    assert kinds_one_by_one(model) == one_by_one.get((architecture, type(parameters).__name__), [])
    norms = [
        module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and isinstance(module, InRows)
    ]
    assert all(isinstance(norm, RowsBroadcast) for norm in norms)
    assert not any(type(module).__bases__[0] is RowsOneByOne for module in norms)


class PastItsModule(nn.Linear):
    """Reads its weight by itself."""

    def forward(self, x):
        return x @ self._parameters["weight"].mT


class OfNeighbours(nn.Linear):
    """Mixes the rows of a batch."""

    def forward(self, x):
        return super().forward(x) + x.mean(dim=0, keepdim=True).sum()


def of_kind(kind):
    model = tiny()
    model.model.layers[0].mlp.down_proj.__class__ = kind
    return model


@pytest.mark.parametrize(("kind", "rows"), [(PastItsModule, 3), (PastItsModule, 1), (OfNeighbours, 3)])
def test_a_model_that_does_not_read_each_row_as_alone_is_found_out(kind, rows):
    model = of_kind(kind)
    down = model.model.layers[0].mlp.down_proj
    learned = [down.weight]
    stacks = [down.weight.detach().repeat(rows, 1, 1).requires_grad_()]
    before = [tensor.clone() for tensor in (*learned, model.lm_head.weight)]
    put_in_rows(model, learned, batch := Batch(stacks))
    reason = reason_against_rows(model, Overlapping(8, 8), learned, batch)
    assert "apart from the row alone" in reason
    assert all(map(torch.equal, (*learned, model.lm_head.weight), before)), "the model is left as it was"


@pytest.mark.parametrize("context", [Overlapping(16, 32), TransformerXL(16, 32, sinks=2)], ids=str)
@pytest.mark.parametrize(
    "choices",
    [
        {"update": partial(torch.optim.SGD, lr=0.05), "reference": "static"},
        {
            "update": partial(torch.optim.SGD, lr=0.05),
            "reference": "static",
            "clip": 0.5,
            "schedule": UpdateFrequency(2),
        },
    ],
)
def test_such_a_model_reads_its_rows_one_after_another(context, choices):
    tokens = [random_tokens(length, seed=length) for length in (90, 50, 5)]
    alone = [run(of_kind(PastItsModule), [document], context, **choices) for document in tokens]
    with pytest.warns(
        UserWarning, match="read one row after another, which takes longer: llama, whose logits of a row are"
    ):
        together = run(of_kind(PastItsModule), tokens, context, together=3, **choices)
    for number, found in enumerate(alone):
        for mine, other in ((found.nats, together.nats), (found.static, together.static)):
            torch.testing.assert_close(torch.cat(mine[0]), torch.cat(other[number]), rtol=1e-5, atol=1e-5)


def test_a_mixture_of_one_rule_is_right_for_such_a_model():
    tokens, context = [random_tokens(90, seed=1)], Overlapping(16, 32)
    with pytest.warns(UserWarning, match="one row after another"):
        found = run(of_kind(PastItsModule), tokens, context, rates=[0.05], update=torch.optim.SGD).nats[0]
    expected = run(of_kind(PastItsModule), tokens, context, update=partial(torch.optim.SGD, lr=0.05)).nats[0]
    torch.testing.assert_close(torch.cat(found).float(), torch.cat(expected), rtol=1e-5, atol=1e-5)
