"""`Trainer.fit` against the reference loop, on a grid of all five choices, to the last bit."""

from functools import partial

import pytest
import reference
import torch
from models import WITH_MEMORY, tiny
from running import as_ours, random_tokens, run

from dynlight import All, LoRA, Matching, Overlapping, ResetWeights, TransformerXL, UpdateFrequency

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 0, 1, 15, 16, 17, 33))]
CONTEXTS = {
    "overlapping": (Overlapping(16, 40), {"segment": 16, "window": 40}),
    "prefixed": (Overlapping(16, 40, prefix=True), {"segment": 16, "window": 40, "prefixes": True}),
    "disjoint": (Overlapping(16, 16), {"segment": 16, "window": 16}),
    "memory": (TransformerXL(16, 24), {"segment": 16, "memory": 24}),
    "no memory": (TransformerXL(16, 0), {"segment": 16, "memory": 0}),
}
PARAMETERS = {
    "all": All(),
    "lora": LoRA(rank=3, alpha=6),
    "mlp": Matching(names="mlp|fc"),
    "last block": Matching(blocks=[-1, -1]),
}
UPDATES = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
}
SCHEDULES = {
    "every 1": (UpdateFrequency(), {}),
    "every 2": (UpdateFrequency(every=2), {"learns": lambda i: i % 2 == 1}),
    "changing": (UpdateFrequency(every={0: 1, 2: 3}), {"learns": lambda i: i in (0, 1, 2, 5)}),
    "3 passes": (UpdateFrequency(passes=3), {"passes": 3}),
}
RESETS = {"document": (ResetWeights(), {"reset": True}), "never": (ResetWeights("never"), {"reset": False})}


def check(architecture, context, parameters, update, schedule, reset, clip=None):
    ours, theirs = tiny(architecture), tiny(architecture)
    context, window = CONTEXTS[context]
    schedule, learns = SCHEDULES[schedule]
    reset, forgets = RESETS[reset]
    parameters.prepare(theirs)
    expected = reference.evaluate(
        theirs, DOCUMENTS, 0, make_optimizer=partial(as_ours, update), clip=clip, **window, **learns, **forgets
    )
    found = run(
        ours, DOCUMENTS, context, parameters=parameters, update=update, schedule=schedule, reset=reset, clip=clip
    )
    assert [len(segments) for segments in found.nats] == [5, 0, 1, 1, 1, 2, 3]
    for ours_by_segment, theirs_by_segment in zip(found.nats, expected, strict=True):
        for one, other in zip(ours_by_segment, theirs_by_segment, strict=True):
            assert torch.equal(one, other)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("context", ["overlapping", "memory"])
def test_every_choice_equals_the_reference(context, parameters, schedule, reset):
    check("llama", context, PARAMETERS[parameters], UPDATES["adamw"], schedule, reset)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_update_equals_the_reference(context, update):
    check("llama", context, All(), UPDATES[update], "every 1", "document")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3", "mistral", "opt"])
@pytest.mark.parametrize("parameters", ["all", "lora", "last block"])
@pytest.mark.parametrize("context", ["overlapping", "memory"])
def test_every_architecture_equals_the_reference(architecture, parameters, context):
    if context == "memory" and architecture not in WITH_MEMORY:
        pytest.skip("absolute positions carry no memory")
    check(architecture, context, PARAMETERS[parameters], UPDATES["sgd"], "every 1", "document")


@pytest.mark.parametrize("context", ["overlapping", "memory"])
def test_clipping_equals_the_reference(context):
    check("llama", context, All(), UPDATES["sgd"], "every 1", "document", clip=0.1)
