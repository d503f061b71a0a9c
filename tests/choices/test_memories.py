"""What memories say of each token, over the static model and over what learns, against the published formulas."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from models import tiny
from running import Experts, document, random_tokens, run

from dynlight import (
    All,
    LoRA,
    NeuralCache,
    NGrams,
    OutputBias,
    Overlapping,
    Records,
    ResetWeights,
    SettingError,
    TransformerXL,
)
from dynlight.choices.memories import Base, DocumentMemory
from dynlight.documents.waves import segments
from dynlight.learning.remembering import Remembering

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 33, 1, 64, 16))]
WINDOWS, MEMORY = Overlapping(16, 40), TransformerXL(16, 24)
SGD = torch.optim.SGD
RATE = 0.05
ALL = [
    NGrams(4, 3.0),
    NGrams(2, 30.0, shortest=0, over="static"),
    NeuralCache(20, 0.3, 0.2),
    OutputBias(0.1),
    NeuralCache(1000, 0.0, 0.1, over="static"),
    OutputBias(0.3, over="static"),
]


def remembered(memories=ALL, documents=DOCUMENTS, context=WINDOWS, together=1, callbacks=(), **choices):
    """What each expert said of each document, [experts, tokens], and the run."""
    experts = Experts()
    choices = {"update": SGD, "rates": [RATE], "reference": "static"} | choices
    found = run(
        tiny(), documents, context, together=together, callbacks=[experts, *callbacks], memories=memories, **choices
    )
    return {index: np.concatenate(nats, axis=1) for index, nats in experts.nats.items()}, found


def read_by_the_loop(tokens, rate):
    """Chances of every token of the vocabulary, [S, V], and states, [S, H], of a document that is learned from as it is read."""
    model = tiny()
    weights = list(model.parameters())
    optimizer, sequence, chances, states = SGD(weights, lr=rate), torch.tensor([0, *tokens]), [], []
    for start in range(0, len(tokens), 16):
        stop = min(start + 16, len(tokens))
        inputs = sequence[None, max(0, stop - 40) : stop]
        read = model(input_ids=inputs, output_hidden_states=True, use_cache=False)
        logits = read.logits[0, start - stop :].log_softmax(-1)
        chances.append(logits.detach().exp().double().numpy())
        states.append(read.hidden_states[-1][0, start - stop :].detach().double().numpy())
        optimizer.zero_grad()
        logits.gather(1, sequence[start + 1 : stop + 1, None]).mean().neg().backward()
        optimizer.step()
    return np.concatenate(chances), np.concatenate(states)


def count_n_grams(tokens, chances, order, concentration, shortest):
    for t in range(len(tokens)):
        p = chances[t]
        for length in range(shortest, order):
            counts = np.zeros_like(p)
            for place in range(length, t):
                if length <= t and tokens[place - length : place] == tokens[t - length : t]:
                    counts[tokens[place]] += 1
            p = (counts + concentration * p) / (counts.sum() + concentration)
        yield p


def cache(tokens, chances, states, size, flatness, share):
    for t in range(len(tokens)):
        in_view = range(max(0, t - size), t)
        p = np.zeros_like(chances[t])
        for i in in_view:
            p[tokens[i]] += math.exp(flatness * states[t] @ states[i])
        yield (1 - share) * chances[t] + share * p / p.sum() if len(in_view) else chances[t]


def bias(tokens, chances, rate):
    b = np.zeros(chances.shape[1])
    for t, token in enumerate(tokens):
        p = chances[t] * np.exp(b)
        p /= p.sum()
        yield p
        b -= rate * p
        b[token] += rate


def expected(memory, tokens, chances, states):
    if isinstance(memory, NGrams):
        found = count_n_grams(tokens, chances, memory.order, memory.concentration, memory.shortest)
    elif isinstance(memory, NeuralCache):
        found = cache(tokens, chances, states, memory.size, memory.flatness, memory.share)
    else:
        found = bias(tokens, chances, memory.rate)
    found = list(found)
    assert all(p.sum() == pytest.approx(1) for p in found)
    return [-math.log(p[token]) for p, token in zip(found, tokens, strict=True)]


@pytest.mark.parametrize("together", [1, 3])
def test_a_memory_equals_the_published_formula(together):
    by_expert, _ = remembered(together=together)
    for index, nats in by_expert.items():
        tokens = DOCUMENTS[index]
        learned, static = read_by_the_loop(tokens, RATE), read_by_the_loop(tokens, 0.0)
        for memory, found in zip(ALL, nats[2:], strict=True):
            theirs = expected(memory, tokens, *(learned if memory.over == "learned" else static))
            np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [NGrams(3, 0.5, shortest=0), NeuralCache(9, 0.2, 0.3), OutputBias(0.2)], ids=str)
def test_chances_of_all_tokens_add_up_to_one(memory):
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(0, 7, (40,), generator=generator)
    logits, states = torch.randn(41, 7, generator=generator), torch.randn(41, 5, generator=generator)
    total = 0.0
    for token in range(7):
        tokens = torch.cat([before, torch.tensor([token])])
        nats = torch.nn.functional.cross_entropy(logits, tokens, reduction="none").double().numpy()
        total += math.exp(-memory.read({}, tokens, {0: Base(nats, states, logits)})[0][-1])
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("context", [WINDOWS, MEMORY], ids=str)
def test_a_memory_that_says_nothing_is_its_base_to_the_last_bit(context):
    neutral = [NGrams(5, math.inf), NeuralCache(50, 0.3, 0.0), OutputBias(0.0), OutputBias(0.0, over="static")]
    for nats in remembered(neutral, context=context)[0].values():
        static, learned, *others = nats
        for memory, found in zip(neutral, others, strict=True):
            assert found.tolist() == (static if memory.over == "static" else learned).tolist()


@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2)], ids=str)
@pytest.mark.parametrize("context", [WINDOWS, MEMORY], ids=str)
def test_a_document_has_the_same_nats_beside_others_and_whatever_else_is_an_expert(context, parameters):
    choices = {"context": context, "parameters": parameters, "rates": [0.01, RATE]}
    alone, _ = remembered(**choices)
    beside, _ = remembered(together=4, **choices)
    for index, nats in alone.items():
        np.testing.assert_allclose(beside[index], nats, rtol=1e-4, atol=1e-4)
    last, _ = remembered(ALL[2:3], **(choices | {"rates": [RATE]}))
    for index, nats in alone.items():  # two n-grams, one n-gram over static, then the cache over each rate
        np.testing.assert_allclose(last[index][2], nats[3 + 3 + 1], rtol=1e-4, atol=1e-4)


def test_without_an_update_memories_stand_over_the_static_model():
    memories = [NGrams(4, 3.0), NeuralCache(20, 0.3, 0.2, over="static")]
    by_expert, found = remembered(memories, update=None, rates=None, together=3)
    static, _ = remembered(memories, rates=[0.0])
    assert not found.module.rules
    for index, nats in by_expert.items():
        assert len(nats) == 3
        np.testing.assert_allclose(nats, static[index][[0, 2, 3]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(torch.cat(found.static[index]).numpy(), nats[0], rtol=1e-6)
    assert [expert.name for expert in found.module.experts][1:] == [
        "n-grams(3 to 4, concentration 3) over static",
        "neural cache(20, flatness 0.3, share 0.2) over static",
    ]


def test_a_rate_that_fails_takes_its_memories_along_and_no_other():
    memories = [NGrams(3, 3.0), NeuralCache(20, 0.3, 0.2), OutputBias(0.1), OutputBias(0.1, over="static")]
    by_expert, found = remembered(memories, rates=[RATE, 1e30])
    healthy, _ = remembered(memories, rates=[RATE])
    for index, nats in by_expert.items():
        np.testing.assert_allclose(nats[[0, 1, 3, 5, 7, 9]], healthy[index], rtol=1e-5)
        assert np.isnan(nats[[2, 4, 6, 8], 32:]).all()  # of the first segment learned too much, of the next NaN
    assert all(np.isfinite(torch.cat(nats).numpy()).all() for nats in found.nats if nats)


@pytest.mark.flops
def test_flops_of_memories_are_those_of_their_formulas():
    records, without = Records(), Records()
    memories = [NGrams(4, 3.0), NeuralCache(20, 0.3, 0.2), OutputBias(0.1, over="static")]
    remembered(memories, rates=[0.01, RATE], callbacks=[records], documents=DOCUMENTS[:1])
    remembered([], rates=[0.01, RATE], callbacks=[without], documents=DOCUMENTS[:1])
    more = (records.segments.flops - without.segments.flops).tolist()
    width, vocabulary = 32, 61
    of_token = [2 * 4 * 4 + 2 * 2 * width * min(place, 20) + 6 * vocabulary for place in range(70)]
    assert more == [sum(of_token[start : start + 16]) for start in range(0, 70, 16)]
    alone = Records()
    remembered(memories[:1], update=None, rates=None, callbacks=[alone], documents=DOCUMENTS[:1])
    assert (alone.segments.flops - alone.segments.static_flops).tolist() == [16 * 16] * 4 + [16 * 6]
    assert alone.segments.static_flops.tolist() == without.segments.static_flops.tolist()


@pytest.mark.parametrize("memory", ALL, ids=str)
def test_the_next_token_is_predicted_as_each_would_be_read(memory):
    """What a memory says at once of all tokens is what `read` says of each, and changes nothing."""
    generator, state = torch.Generator().manual_seed(0), {}
    for token in [0, 3, 1, 3, 1, 3, 1, 2, 3, 1]:
        logits = torch.randn(1, 6, generator=generator)
        logits[0, 4] = -math.inf
        bases = {number: Base(np.empty(0), torch.randn(1, 5, generator=generator), logits) for number in (-1, 0)}
        before = copy.deepcopy(state)
        found = memory.predict(state, bases, begins=not state)
        assert str(state) == str(before)
        asked = DocumentMemory.predict(memory, state, bases, begins=not state)
        assert str(state) == str(before)
        for number in bases:
            assert found[number] == pytest.approx(asked[number], abs=1e-6)
            assert np.exp(found[number]).sum() == pytest.approx(1, abs=1e-5)
        own = {
            number: replace(base, nats=-base.logits.log_softmax(-1)[0, [token]].double().numpy())
            for number, base in bases.items()
        }
        memory.read(state, torch.tensor([token]), own, begins=not state)


def test_large_states_and_tokens_without_a_chance_stay_a_distribution():
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(0, 7, (20,), generator=generator)
    logits, states = torch.randn(21, 7, generator=generator), 1e20 * torch.randn(21, 5, generator=generator)
    logits[:, 3] = -math.inf
    before[before == 3] = 2
    for memory in (NeuralCache(100, 0.3, 0.5), OutputBias(0.5), NGrams(2, 1.0, shortest=0)):
        total = 0.0
        for token in range(7):
            tokens = torch.cat([before, torch.tensor([token])])
            nats = torch.nn.functional.cross_entropy(logits, tokens, reduction="none").double().numpy()
            said = memory.read({}, tokens, {0: Base(nats, states, logits)})[0][-1]
            assert not math.isnan(said), (memory, token)
            total += math.exp(-said)
        assert total == pytest.approx(1, abs=1e-6), memory


def test_similarity_is_in_full_precision_whatever_the_model_is_read_in():
    memory = NeuralCache(100, 1.0, 0.5)
    remembering = Remembering([memory], 0)
    seen = []
    memory.read = lambda *read: seen.append(torch.is_autocast_enabled("cpu")) or {}
    remembering.begin(1)
    segment = next(segments((document(DOCUMENTS[0]),), WINDOWS))
    with torch.autocast("cpu", torch.bfloat16):
        remembering.read(segment, [{}])
    assert seen == [False]


def test_the_protocol_tells_memories_apart():
    _, found = remembered([OutputBias(0.1), OutputBias(0.1, over="static")], documents=DOCUMENTS[:1])
    assert "output bias(rate 0.1) over learned with output bias(rate 0.1) over static" in found.module.protocol


@pytest.mark.flops
def test_flops_go_on_where_nothing_is_forgotten():
    records = Records()
    choices = {"update": None, "rates": None, "reset": ResetWeights("never"), "callbacks": [records]}
    remembered([NeuralCache(1000, 0.3, 0.2)], documents=DOCUMENTS[:2], **choices)
    rows = records.segments
    more = (rows.flops - rows.static_flops).tolist()
    assert more == [
        sum(2 * 32 * place for place in range(begin, end))
        for begin, end in [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70), (70, 86), (86, 102), (102, 103)]
    ]


def test_tokens_behind_a_token_change_nothing():
    tokens = DOCUMENTS[0]
    changed = [*tokens[:60], *[5] * 10]
    nats, _ = remembered(documents=[tokens])
    others, _ = remembered(documents=[changed])
    np.testing.assert_allclose(nats[0][:, :60], others[0][:, :60], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(NGrams, 2, 1.0), r"memories.order must be at least 3 \(memories.shortest is 2\), got 2"),
        (partial(NGrams, 3, 0.0), "memories.concentration must be above 0, got 0.0"),
        (partial(NGrams, 3, 1.0, -1), "memories.shortest must be at least 0, got -1"),
        (partial(NeuralCache, 0, 1.0, 0.1), "memories.size must be at least 1, got 0"),
        (partial(NeuralCache, 9, -1.0, 0.1), "memories.flatness must be at least 0 and finite, got -1.0"),
        (partial(NeuralCache, 9, 1.0, 1.0), "memories.share must be at least 0 and under 1, got 1.0"),
        (partial(OutputBias, math.nan), "memories.rate must be at least 0 and finite, got nan"),
        (partial(OutputBias, 0.1, over="adapted"), "memories.over must be learned or static, got adapted"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_static_memories_need_the_static_model():
    with pytest.raises(SettingError, match="memories.over must be learned without a reference, got static"):
        remembered(reference=None)
