"""Ranks and rates that differ from module to module, against a loop with torch's parameter groups and PEFT's own layers."""

from functools import partial

import pytest
import reference
import torch
from models import tiny
from peft import LoraConfig, inject_adapter_in_model
from running import as_ours, random_tokens, run

from dynlight import All, GradientStatistics, LoRA, Matching, RMSDynamic, TransformerXL, UpdateFrequency

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((50, 33, 16))]
CONTEXT, WINDOW = TransformerXL(16, 24), {"segment": 16, "memory": 24}
FACTORS = {"down_proj": 0.5, "mlp": 0.0, "embed_tokens": 3.0}


def grouped(update, model, factors, lr, learned):
    """An optimizer with a parameter group for each learned weight, at the factor of the first pattern found in its name."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = []
    for weight in learned:
        factor = next((own for pattern, own in factors.items() if pattern in names[id(weight)]), 1.0)
        groups.append({"params": [weight], "lr": lr * factor})
    return as_ours(update, groups)


@pytest.mark.parametrize("update", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("parameters", [All(), Matching(names="mlp|embed")], ids=str)
def test_rates_of_modules_equal_those_of_parameter_groups(update, parameters):
    ours, theirs = tiny(), tiny()
    parameters.prepare(theirs)
    optimizer = partial(grouped, update, theirs, FACTORS, 0.01)
    expected = reference.evaluate(theirs, DOCUMENTS, 0, make_optimizer=optimizer, **WINDOW)
    choices = {"parameters": parameters, "update": partial(update, lr=0.01), "rate_factors": FACTORS}
    found = run(ours, DOCUMENTS, CONTEXT, **choices)
    for one, other in zip(sum(found.nats, []), sum(expected, []), strict=True):  # noqa: RUF017
        assert torch.equal(one, other)
    for beside in ({}, {"schedule": UpdateFrequency(above=-1.0)}):
        together = run(tiny(), DOCUMENTS, CONTEXT, together=3, **choices, **beside)
        for one, other in zip(together.nats, expected, strict=True):
            assert float(torch.cat(one).sum()) == pytest.approx(float(torch.cat(other).sum()), rel=1e-5)


def test_factors_of_one_change_no_bit_and_statistics_stay_with_their_weights(monkeypatch):
    monkeypatch.setattr(
        "dynlight.learning.module.load_or_collect",
        lambda *_, model, **__: [torch.full_like(each, 0.01 + i) for i, each in enumerate(model.parameters())],
    )
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    for update in (partial(torch.optim.AdamW, lr=1e-3), partial(RMSDynamic, lr=0.05, statistics=statistics)):
        plain, scaled = (
            run(tiny(), DOCUMENTS, CONTEXT, update=update, together=2, rate_factors=factors)
            for factors in (None, {"mlp": 1.0, "embed": 1.0})
        )
        for one, other in zip(plain.nats, scaled.nats, strict=True):
            assert torch.equal(torch.cat(one), torch.cat(other))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_ranks_of_modules_are_pefts():
    ranks = {"q_proj": 2, "lm_head": 1, "layers.1.mlp.down_proj": 5}
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    ours, theirs = tiny(), tiny()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, rank_pattern=ranks)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, theirs)
    shapes = {name: weight.shape for name, weight in theirs.named_parameters() if "lora_" in name}
    update = partial(torch.optim.SGD, lr=0.1)
    expected = reference.evaluate(theirs, DOCUMENTS, 0, make_optimizer=partial(as_ours, update), **WINDOW)
    parameters = LoRA(rank=3, alpha=6, targets=targets, ranks=ranks)
    found = run(ours, DOCUMENTS, CONTEXT, parameters=parameters, update=update)
    assert {name: weight.shape for name, weight in ours.named_parameters() if "lora_" in name} == shapes
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {1, 2, 3, 5}
    together = run(tiny(), DOCUMENTS, CONTEXT, parameters=parameters, update=update, together=3)
    for one, other, beside in zip(found.nats, expected, together.nats, strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat(beside), torch.cat(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"rate_factors": {"lm_hed": 0.1}},
            "rate_factors.lm_hed must be found in the name of a learned weight, got none",
        ),
        (
            {"rate_factors": {"mlp": 1, "up_proj": 2}},
            "rate_factors.up_proj must .*, got those alone that earlier patterns",
        ),
        ({"rate_factors": {99: 0.5}}, "rate_factors.99 must be found in the name of a learned weight, got none"),
        (
            {"parameters": lambda: LoRA(ranks={".*_proj": 2, "q_proj": 4})},
            "parameters.ranks.q_proj must match the end of",
        ),
        ({"rate_factors": {"mlp": -1.0}}, "rate_factors.mlp must be at least 0 and finite, got -1.0"),
        ({"rate_factors": {"[": 1.0}}, r"rate_factors must have regular expressions as keys, got \[ "),
        ({"parameters": lambda: LoRA(ranks={"lm_hed": 2})}, "parameters.ranks.lm_hed must match the end of the name"),
        ({"parameters": lambda: LoRA(ranks={"q_proj": 0})}, "parameters.ranks.q_proj must be at least 1, got 0"),
        (
            {"parameters": lambda: LoRA(ranks={"[": 2})},
            r"parameters.ranks must have regular expressions as keys, got \[",
        ),
    ],
)
def test_what_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        choices = {name: value() if callable(value) else value for name, value in choices.items()}
        run(tiny(), [[1]], CONTEXT, update=partial(torch.optim.SGD, lr=0.1), **choices)
