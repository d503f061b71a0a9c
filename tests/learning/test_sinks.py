"""Sinks: a document's first tokens, which are read anew in front of a memory that they have dropped out of."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import WITH_MEMORY, tiny
from reference import evaluate
from running import random_tokens, run

from dynlight import DynamicEvaluation, LoRA, Overlapping, TransformerXL, UpdateFrequency
from dynlight.documents.segments import Cut
from dynlight.errors import SettingError

CONTEXT = TransformerXL(segment=16, memory=40, sinks=3)
TOKENS = [random_tokens(length, seed=length) for length in (130, 90, 21)]
SGD = partial(torch.optim.SGD, lr=0.05)
LORA = {"parameters": LoRA(rank=2), "update": partial(torch.optim.AdamW, lr=0.003)}


@pytest.mark.parametrize("architecture", WITH_MEMORY)
@pytest.mark.parametrize("update", [None, SGD])
def test_they_are_read_as_by_the_loop(architecture, update):
    found = run(tiny(architecture), TOKENS, CONTEXT, update=update).nats
    expected = evaluate(tiny(architecture), TOKENS, 0, segment=16, memory=40, sinks=3, make_optimizer=update)
    for mine, loop in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(loop), rtol=2e-5, atol=2e-5)


def test_each_pass_reads_them_by_the_weights_of_then():
    found = run(tiny("llama"), TOKENS, CONTEXT, update=SGD, schedule=UpdateFrequency(1, passes=2)).nats
    expected = evaluate(tiny("llama"), TOKENS, 0, segment=16, memory=40, sinks=3, make_optimizer=SGD, passes=2)
    for mine, loop in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(loop), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("learning", [{"update": SGD}, LORA, {"update": SGD, "rates": [0.01, 0.05]}])
def test_documents_together_have_the_scores_of_each_alone(learning):
    learning = {"reference": "static"} | learning
    alone = run(tiny("llama"), TOKENS, CONTEXT, **learning)
    together = run(tiny("llama"), TOKENS, CONTEXT, together=3, **learning)
    for one, other in zip([*alone.nats, *alone.static], [*together.nats, *together.static], strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=1e-5, atol=1e-5)


def test_nothing_changes_before_they_drop_out():
    short = [tokens[:40] for tokens in TOKENS]
    found, plain = (run(tiny("llama"), short, context, update=SGD).nats for context in (CONTEXT, TransformerXL(16, 40)))
    for mine, other in zip(found, plain, strict=True):
        assert torch.equal(torch.cat(mine), torch.cat(other))


def test_a_segment_sees_what_it_would_in_a_window_that_begins_with_them():
    model, (tokens, *_), stop = tiny("llama"), TOKENS, 96
    del model.model.layers[1:]  # of one block what is remembered of a position depends on its token alone
    nats = torch.cat(run(model, [tokens], CONTEXT).nats[0])[stop - 16 : stop]
    sequence = torch.tensor([0, *tokens])
    window = torch.cat([sequence[:3], sequence[stop - 16 - 37 : stop]])
    logits = model(input_ids=window[None], use_cache=False).logits[0, -16:]
    expected = torch.nn.functional.cross_entropy(logits, sequence[stop - 15 : stop + 1], reduction="none")
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.flops
def test_their_flops_are_those_of_reading_them():
    def flops(context, start, stop):
        module = DynamicEvaluation(tiny("llama"), None, context=context, update=SGD)
        segment = SimpleNamespace(cut=Cut(0, start, stop, context.context(start, stop)))
        return module.flop_counter.count(
            SimpleNamespace(
                segment=segment, updates_of=lambda row: [1], experts=None, reread=range(0), stopped=frozenset()
            )
        )

    with_sinks, without = (flops(context, 48, 64) for context in (CONTEXT, TransformerXL(16, 40)))
    alone = flops(Overlapping(1, 3), 2, 3)
    assert with_sinks.forward - without.forward == alone.forward
    assert with_sinks.static - without.static == alone.static
    assert (with_sinks.activation, with_sinks.weight) == (without.activation, without.weight)
    assert flops(CONTEXT, 32, 48) == flops(TransformerXL(16, 40), 32, 48)


@pytest.mark.parametrize(
    ("sinks", "must"), [(-1, "at least 0"), (1.5, "at least 0"), (40, "fewer than the 40 positions")]
)
def test_bad_numbers_are_refused(sinks, must):
    with pytest.raises(SettingError, match=f"context.sinks must be {must}"):
        TransformerXL(16, 40, sinks=sinks)
