"""What makes a score valid: no peeking, nothing left out, static is static, nothing survives a reset."""

import weakref
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from models import CONFIGS, WITH_MEMORY, tiny
from running import document, random_tokens, run, stopped

from dynlight import All, LoRA, Matching, Overlapping, Records, ResetWeights, TransformerXL, UpdateFrequency
from dynlight.documents.segments import NOT_SCORED
from dynlight.documents.waves import SegmentStream, waves

SEGMENT = 16
CONTEXTS = [Overlapping(SEGMENT, 40), TransformerXL(SEGMENT, 24)]
LEARN = {"update": partial(torch.optim.AdamW, lr=3e-3)}
named = partial(pytest.mark.parametrize, ids=str)


@named("context", CONTEXTS)
@named("parameters", [All(), LoRA(rank=2), Matching(blocks=[-1, -1])])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("changed", [SEGMENT * 2, SEGMENT * 2 + 5])
def test_later_tokens_change_no_earlier_score(context, parameters, passes, changed):
    tokens = random_tokens(5 * SEGMENT, 1)
    other = tokens[:changed] + [(token + 7) % 61 for token in tokens[changed:]]
    results = [
        torch.cat(
            run(tiny(), [each], context, parameters=parameters, schedule=UpdateFrequency(passes=passes), **LEARN).nats[
                0
            ]
        )
        for each in (tokens, other)
    ]
    assert torch.equal(results[0][:changed], results[1][:changed])
    assert not torch.equal(results[0][changed : changed + SEGMENT], results[1][changed : changed + SEGMENT])


@named("context", CONTEXTS)
@pytest.mark.parametrize("length", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 10 * SEGMENT + 1])
def test_each_token_is_scored_once(context, length):
    tokens = random_tokens(length, 2)
    found = run(tiny(), [tokens, random_tokens(3, 3)], context, **LEARN)
    assert sum(len(nats) for nats in found.nats[0]) == length
    assert int(found.module.totals.read.tokens) == length + 3
    assert int(found.module.totals.read.bytes) == length + 3
    segments = list(SegmentStream(waves([document(tokens)], context), context))
    assert torch.cat([torch.empty(0, dtype=torch.int64), *(s.targets[0] for s in segments)]).tolist() == tokens
    for segment in segments:
        cut = segment.cut
        assert segment.inputs[0].tolist() == [0, *tokens][cut.start - cut.context : cut.stop]
        assert segment.bytes == (cut.stop - cut.start,) == tuple(segment.tokens)


@named("context", CONTEXTS)
@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_waves_score_each_token_of_each_document_once(context, together):
    lengths = [40, 7, 16, 33, 1, 40, 0, 57, 79]
    documents = [document(random_tokens(length, i), i) for i, length in enumerate(lengths)]
    scored = {i: [] for i in range(len(lengths))}
    for segment in SegmentStream(waves(documents, context, together), context, fills=together > 1):
        assert len(segment.documents) <= together
        assert segment.targets.shape == (len(segment.documents), segment.cut.stop - segment.cut.start)
        assert segment.inputs.shape[1] == segment.cut.context + segment.targets.shape[1]
        for row, each in enumerate(segment.documents):
            before, columns = len(scored[each.index]), segment.scored[row]
            assert segment.cut.start == before
            scored[each.index] += segment.targets[row, columns].tolist()
            after = len(scored[each.index])
            assert segment.bytes[row] == segment.tokens[row] == after - before
            assert (segment.targets[row] != NOT_SCORED).sum() == after - before
            # What is read up to the last token scored is what is read of the document alone.
            read = segment.inputs[row, : segment.cut.context + columns.stop].tolist()
            alone = context.context(before, after) + after - before
            assert read == [0, *each.tokens.tolist()][after - alone : after]
            assert (each in segment.finished) == (after == len(each))
    assert scored == {each.index: each.tokens.tolist() for each in documents}


@named("context", CONTEXTS)
@named("parameters", [All(), LoRA(rank=2)])
def test_static_by_three_ways_and_as_reference(context, parameters):
    documents = [random_tokens(70, 4), random_tokens(20, 5)]
    evaluate = partial(run, documents=documents, context=context, parameters=parameters)
    static = evaluate(tiny(), update=None)
    rate_0 = evaluate(tiny(), update=partial(torch.optim.AdamW, lr=0.0))
    never = evaluate(tiny(), update=partial(torch.optim.SGD, lr=1.0), schedule=UpdateFrequency(every="never"))
    beside = evaluate(tiny(), update=partial(torch.optim.AdamW, lr=1e-2), reference="static")
    for i in range(len(documents)):
        expected = torch.cat(static.nats[i])
        assert torch.equal(torch.cat(rate_0.nats[i]), expected)
        assert torch.equal(torch.cat(never.nats[i]), expected)
        assert torch.equal(torch.cat(beside.static[i]), expected)
        assert not torch.equal(torch.cat(beside.nats[i]), expected)


@named("context", CONTEXTS)
@named("parameters", [All(), LoRA(rank=2)])
@pytest.mark.parametrize(
    "update", [partial(torch.optim.AdamW, lr=3e-3), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_permuted_documents_give_permuted_rows(context, parameters, update):
    documents = [random_tokens(length, length) for length in (50, 17, 33, 16)]
    order = [2, 0, 3, 1]
    straight = run(tiny(), documents, context, parameters=parameters, update=update)
    permuted = run(tiny(), [documents[i] for i in order], context, parameters=parameters, update=update)
    for place, i in enumerate(order):
        assert torch.equal(torch.cat(permuted.nats[place]), torch.cat(straight.nats[i]))


def test_without_reset_learning_carries_on():
    documents = [random_tokens(64, 6), random_tokens(64, 6)]
    kept = run(tiny(), documents, TransformerXL(SEGMENT, 24), reset=ResetWeights("never"), **LEARN)
    assert torch.cat(kept.nats[1]).sum() < torch.cat(kept.nats[0]).sum()


def test_a_softer_reset_keeps_a_share_of_what_was_learned():
    """As a difference from a loop over two documents, and the neutral settings to the last bit."""
    documents, context = [random_tokens(64, 6), random_tokens(50, 7)], TransformerXL(SEGMENT, 24)
    model, initial = tiny(), tiny()
    first = run(model, documents[:1], context, **LEARN)
    with torch.no_grad():
        for weight, theta in zip(model.parameters(), initial.parameters(), strict=True):
            weight.copy_(theta + 0.3 * (weight - theta))
    second = run(model, documents[1:], context, **LEARN)
    kept = run(tiny(), documents, context, reset=ResetWeights(keep=0.3), **LEARN)
    torch.testing.assert_close(torch.cat(kept.nats[0]), torch.cat(first.nats[0]), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(kept.nats[1]), torch.cat(second.nats[0]))
    rates = {"update": torch.optim.AdamW, "rates": [3e-3]}  # a mixture of a single rule
    mixed = run(tiny(), documents, context, reset=ResetWeights(keep=0.3), **rates)
    torch.testing.assert_close(torch.cat(mixed.nats[1]).float(), torch.cat(kept.nats[1]), rtol=1e-4, atol=1e-4)
    forgotten = run(tiny(), documents, context, reset=ResetWeights(keep=0.0), **LEARN)
    plain = run(tiny(), documents, context, **LEARN)
    for one, other in zip(forgotten.nats, plain.nats, strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))


def test_of_a_document_that_failed_nothing_stays():
    documents = [random_tokens(64, 6), random_tokens(50, 7)]
    choices = {"update": partial(torch.optim.SGD, lr=1e30)}
    kept = run(tiny(), documents, TransformerXL(SEGMENT, 24), reset=ResetWeights(keep=0.5), **choices)
    plain = run(tiny(), documents, TransformerXL(SEGMENT, 24), **choices)
    assert kept.nats[1]
    assert all(torch.equal(one, other) for one, other in zip(kept.nats[1], plain.nats[1], strict=True))


def test_reset_restores_weights_optimizer_and_random_state():
    model = tiny()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = run(model, [random_tokens(40, 7)], TransformerXL(SEGMENT, 24), **LEARN)
    optimizer = found.module.optimizers(use_pl_optimizer=False)
    assert optimizer.state
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    torch.rand(3)
    found.module.reset()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), found.module._random_state["cpu"])


@pytest.mark.parametrize("architecture", WITH_MEMORY)
def test_memory_longer_than_the_document_equals_one_forward(architecture):
    tokens = random_tokens(90, 8)
    model = tiny(architecture)
    found = torch.cat(run(model, [tokens], TransformerXL(SEGMENT, 100)).nats[0])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0, *tokens[:-1]]])).logits[0]
    expected = -torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    # Other shapes, other kernels: not to the last bit.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", WITH_MEMORY)
def test_gradients_reach_the_current_segments_keys_and_values_only(architecture):
    """As a difference: the gradient through a cache equals the one of a forward without any, where nothing is carried."""
    from dynlight.learning.forward import read, token_nats

    context = TransformerXL(SEGMENT, 24)
    model = tiny(architecture)
    segment = next(iter(SegmentStream(waves([document(random_tokens(SEGMENT, 9))], context), context)))
    logits, memory = read(model, segment, None, context)
    through_cache = torch.autograd.grad(token_nats(logits, segment.targets).mean(), list(model.parameters()))
    logits = model(input_ids=segment.inputs, use_cache=False).logits
    plain = torch.autograd.grad(token_nats(logits, segment.targets).mean(), list(model.parameters()))
    for one, other in zip(through_cache, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not any(state.requires_grad for block in memory for state in block.values())


def test_memory_keeps_the_last_positions_only():
    from dynlight.learning.forward import read

    context = TransformerXL(SEGMENT, 24)
    model, memory, lengths = tiny(), None, []
    for segment in SegmentStream(waves([document(random_tokens(70, 10))], context), context):
        _, memory = read(model, segment, memory, context)
        lengths.append(memory[0]["keys"].shape[2])
    assert lengths == [16, 24, 24, 24, 24]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("segment", "window", "length"), [(16, 16, 50), (16, 48, 100), (16, 16, 16), (8, 32, 70)])
def test_static_equals_the_rolling_log_likelihood_of_lm_eval(architecture, segment, window, length):
    rolling = pytest.importorskip("lm_eval.utils", reason="lm-eval is in the extra `test`").get_rolling_token_windows
    tokens = random_tokens(length, 11)
    model = tiny(architecture)
    found = torch.cat(run(model, [tokens], Overlapping(segment, window)).nats[0])
    expected = []
    for inputs, scored in rolling(tokens, 0, max_seq_len=window, context_len=window - segment + 1):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([inputs])).logits[0, -len(scored) :]
        expected.append(-torch.log_softmax(logits, -1).gather(-1, torch.tensor(scored)[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_lora_forward_is_pefts_own():
    from peft import LoraConfig, get_peft_model

    tokens = random_tokens(48, 12)
    ours, theirs = tiny(), tiny()
    found = run(ours, [tokens], Overlapping(SEGMENT, 48), parameters=LoRA(rank=3, alpha=12), **LEARN)
    wrapped = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    adapters = {name: weight for name, weight in ours.state_dict().items() if "lora_" in name}
    missing = wrapped.base_model.model.load_state_dict(adapters, strict=False)
    assert adapters
    assert not missing.unexpected_keys
    with torch.no_grad():
        inputs = torch.tensor([[0, *tokens[:-1]]])
        assert torch.equal(ours(input_ids=inputs).logits, wrapped(input_ids=inputs).logits)
        with wrapped.disable_adapter():
            static = wrapped(input_ids=inputs).logits
        with found.module.weights.under_initial():
            assert torch.equal(ours(input_ids=inputs).logits, static)


@named("context", CONTEXTS)
def test_a_document_whose_nats_are_not_finite_stops_alone(context):
    documents = [random_tokens(64, 13), random_tokens(64, 14)]
    model = tiny()
    alone = run(tiny(), documents[1:], context, **LEARN)
    found = run(model, documents, context, callbacks=[PoisonAtSegment(0, 1)], **LEARN)
    assert stopped(found.module) == {0: 2}
    assert len(found.nats[0]) == 2
    assert torch.equal(torch.cat(found.nats[1]), torch.cat(alone.nats[0]))
    assert found.module.totals.read.tokens == 64, "nothing of the document that failed"


class Watch(Callback):
    """Notes how many scores there are after each segment."""

    def __init__(self):
        self.scores, self.counts = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scores.append(weakref.ref(pl_module.score))
        self.counts.append(sum(score() is not None for score in self.scores))


@pytest.mark.parametrize("choices", [{}, {"update": torch.optim.SGD, "rates": [0.01, 0.1]}], ids=["plain", "rates"])
def test_no_score_is_held_longer_than_its_segment(choices):
    watch = Watch()
    run(tiny(), [random_tokens(160, 15)], TransformerXL(SEGMENT, 24), [Records(), watch], **(LEARN | choices))
    assert watch.counts == [1] * 10


class PoisonAtSegment(Callback):
    """Makes one weight NaN after a segment of a document was learned from."""

    def __init__(self, index, segment):
        self.place = (index, segment)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch.documents[0].index, batch.cut.index) == self.place:
            with torch.no_grad():
                pl_module.weights.learned[0].fill_(float("nan"))
