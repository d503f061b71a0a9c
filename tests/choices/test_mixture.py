"""Many learning rates in one pass, and the mixture that predicts with all of them."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import tiny
from running import Experts, random_tokens, run, stopped
from scipy.special import logsumexp

from dynlight import (
    All,
    LoRA,
    Mixture,
    NeuralCache,
    NGrams,
    OutputBias,
    Overlapping,
    Records,
    ResetWeights,
    RMSDynamic,
    TransformerXL,
    UpdateFrequency,
)
from dynlight.learning.stacked import Stacked

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 33, 1, 0, 16, 70))]
MEMORY = TransformerXL(16, 24)
RATES = [0.01, 0.05, 0.2]
SGD = torch.optim.SGD


def mixed(documents=DOCUMENTS, context=MEMORY, together=1, callbacks=(), **choices):
    """A run with a mixture: what the experts said, and the mixture's nats, of documents that have tokens."""
    experts = Experts()
    choices = {"update": SGD, "rates": RATES, "reference": "static"} | choices
    found = run(tiny(), documents, context, together=together, callbacks=[experts, *callbacks], **choices)
    by_expert = {index: np.concatenate(nats, axis=1) for index, nats in experts.nats.items()}
    return found, experts, by_expert


def joined(segments):
    return torch.cat(segments).numpy() if segments else np.zeros(0)


@pytest.mark.parametrize("context", [MEMORY, Overlapping(16, 40)], ids=str)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"parameters": LoRA(rank=2)},
        {"clip": 0.05},
        {"schedule": UpdateFrequency(every=2, passes=2)},
        {"update": partial(torch.optim.AdamW, weight_decay=0.1), "rates": [1e-4, 1e-3]},
        {"update": partial(SGD, momentum=0.9, nesterov=True)},
    ],
    ids=["plain", "LoRA", "clip", "schedule", "AdamW", "momentum"],
)
@pytest.mark.slow
def test_each_rate_scores_what_a_run_with_that_rate_scores(context, choices):
    of_each_number = [mixed(context=context, together=together, **choices)[2] for together in (1, 3, 16)]
    choices = {"update": SGD, "rates": RATES, "parameters": All()} | choices
    rule, rates = choices.pop("update"), choices.pop("rates")
    for expert, rate in enumerate(rates, start=1):
        alone = run(tiny(), DOCUMENTS, context, update=partial(rule, lr=rate), reference="static", **choices)
        for index, nats in itertools.chain.from_iterable(by_expert.items() for by_expert in of_each_number):
            np.testing.assert_allclose(nats[expert], joined(alone.nats[index]), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(nats[expert].sum(), joined(alone.nats[index]).sum(), rtol=1e-5)
            np.testing.assert_allclose(nats[0], joined(alone.static[index]), rtol=1e-4, atol=1e-4)


def test_krauses_rule_at_many_rates(monkeypatch):
    from dynlight import GradientStatistics

    reads = []

    def collect(statistics, model, tokenizer, context, setting):
        reads.append(statistics)
        return [torch.full_like(weight, 0.01) for weight in model.parameters()]

    monkeypatch.setattr("dynlight.learning.module.load_or_collect", collect)
    rule = partial(RMSDynamic, decay=0.05, statistics=GradientStatistics(data={"path": "text", "data_files": "x"}))
    _, _, by_expert = mixed(update=rule, rates=[1e-4, 1e-3], together=3)
    assert len(reads) == 1
    alone = run(tiny(), DOCUMENTS, MEMORY, update=partial(rule, lr=1e-3))
    for index, nats in by_expert.items():
        np.testing.assert_allclose(nats[2].sum(), joined(alone.nats[index]).sum(), rtol=1e-5)


def test_a_mixture_does_not_depend_on_neighbours():
    alone, *_ = mixed()
    beside, *_ = mixed(together=3)
    for one, other in zip(alone.nats, beside.nats, strict=True):
        np.testing.assert_allclose(joined(one).sum(), joined(other).sum(), rtol=1e-5)


@pytest.mark.parametrize("switching", [0.0, 0.01])
def test_the_run_equals_the_formula_written_out(switching):
    found, _experts, by_expert = mixed(together=3, mixture=Mixture(switching))
    for index, nats in by_expert.items():
        weights = np.full(len(nats), 1 / len(nats))
        expected = []
        for surprise in nats.T.astype(np.float64):
            chance = (weights * np.exp(-surprise)).sum()
            expected.append(-math.log(chance))
            weights = (1 - switching) * weights * np.exp(-surprise) / chance + switching / len(nats)
        np.testing.assert_allclose(joined(found.nats[index]), expected, rtol=1e-9)


losses = arrays(np.float64, st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 60)), elements=st.floats(0, 60))
adversarial = losses.map(lambda nats: np.where(np.arange(nats.shape[2]) % 7 < 3, nats, nats[::-1]))


@settings(max_examples=200, deadline=None)
@given(losses | adversarial)
def test_plain_bayes_loses_at_most_the_logarithm_of_the_number_of_experts(nats):
    mixture = Mixture(switching=0)
    found, _, weights = mixture.predict(mixture.prior(len(nats), 1), nats)
    totals = nats.sum(axis=2)[:, 0]
    assert found.sum() <= totals.min() + math.log(len(nats)) + 1e-9
    assert found.sum() == pytest.approx(-logsumexp(-totals) + math.log(len(nats)))
    assert np.exp(weights).sum() == pytest.approx(1)


@settings(max_examples=200, deadline=None)
@given(losses | adversarial, st.floats(1e-4, 0.5))
def test_fixed_share_is_near_the_best_sequence_of_experts(nats, switching):
    mixture = Mixture(switching)
    found, shares, weights = mixture.predict(mixture.prior(len(nats), 1), nats)
    experts, _, tokens = nats.shape
    best = np.full(experts, 0.0)  # of sequences that end with each expert, what they cost in all
    cost = nats[:, 0].copy()
    best = cost[:, 0] + math.log(experts)
    for t in range(1, tokens):
        stay = -math.log1p(-switching + switching / experts)
        move = -math.log(switching / experts)
        best = cost[:, t] + np.minimum(best + stay, best.min() + move)
    assert found.sum() <= best.min() + 1e-9
    assert np.exp(weights).sum() == pytest.approx(1)
    assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("switching", [0.0, 0.01])
def test_the_mixture_does_not_depend_on_how_the_text_is_cut(switching):
    mixture = Mixture(switching)
    nats = np.random.default_rng(0).gamma(2.0, 2.0, (4, 3, 90))
    nats[1, 0, 40:] = np.nan
    whole, _, after = mixture.predict(mixture.prior(4, 3), nats)
    weights, parts = mixture.prior(4, 3), []
    for start in range(0, 90, 9):
        part, _, weights = mixture.predict(weights, nats[:, :, start : start + 9])
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12)
    np.testing.assert_allclose(weights, after, rtol=1e-9)


@pytest.mark.parametrize("switching", [0.0, 0.01])
def test_places_without_a_token_change_nothing(switching):
    mixture = Mixture(switching)
    nats = np.random.default_rng(0).gamma(2.0, 2.0, (4, 1, 20))
    is_scored = np.random.default_rng(1).random((1, 30)) < 0.5
    is_scored[:, 10:] = np.arange(20) < 20 - is_scored[:, :10].sum()
    wide = np.zeros((4, 1, 30))
    wide[:, is_scored] = nats[:, 0]
    whole, narrow = mixture.predict(mixture.prior(4, 1), wide, is_scored), mixture.predict(mixture.prior(4, 1), nats)
    assert np.array_equal(whole[0][is_scored], narrow[0][0])
    assert not whole[0][~is_scored].any()
    for one, other in zip(whole[1:], narrow[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("switching", [0.0, 0.01])
def test_it_is_a_distribution_whatever_fails(switching):
    """Σ_v p(v) = 1 at every token of a random text, with an expert that becomes NaN and one that rules tokens out."""
    generator = np.random.default_rng(1)
    mixture = Mixture(switching)
    chances = generator.dirichlet(np.ones(6), (4, 20))  # [experts, tokens, vocabulary]
    chances[2, 8:] = np.nan
    chances[3, :, 0] = 0
    chances[3] /= chances[3].sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        nats = -np.log(chances)
    text = generator.integers(1, 6, 20)
    text[12] = 0  # where expert 3 gave no chance
    weights = mixture.prior(4, 1)
    for t, token in enumerate(text):
        every = [mixture.predict(weights, nats[:, None, t, v, None])[0][0, 0] for v in range(6)]
        assert np.exp(-np.array(every)).sum() == pytest.approx(1, abs=1e-12)
        _, _, weights = mixture.predict(weights, nats[:, None, t, token, None])
        assert np.isinf(weights[2, 0]) == (t >= 8)
        assert np.isinf(weights[3, 0]) == (t >= 12)


def test_a_rate_that_diverges_is_left_behind_and_costs_nothing_more():
    records = Records()
    documents = [random_tokens(160, 3), random_tokens(120, 4)]
    found, experts, by_expert = mixed(
        documents, rates=[0.05, 1e6], together=2, update=partial(SGD, momentum=0.9), callbacks=[records]
    )
    assert not stopped(found.module)
    assert np.isnan(by_expert[0][2, -16:]).all()
    assert all(np.isfinite(joined(nats)).all() for nats in found.nats)
    read = {(index, segment): learners for index, segment, learners in experts.read}
    assert read[0, 0] == [True, True]
    assert read[0, 9] == [True, False]
    flops = records.segments.query("document == 0").set_index("segment").flops
    static = records.segments.query("document == 0").set_index("segment").static_flops
    ratio = (flops[9] - static[9]) / (flops[2] - static[2])
    assert ratio == pytest.approx(0.5, abs=0.1)
    alone = run(tiny(), documents, MEMORY, update=partial(SGD, lr=0.05, momentum=0.9))
    for index in (0, 1):
        np.testing.assert_allclose(by_expert[index][1].sum(), joined(alone.nats[index]).sum(), rtol=1e-5)


def test_a_mixture_without_rates_chooses_its_own():
    found, *_ = mixed([random_tokens(40, 1)], update=None, rates=None, mixture=Mixture())
    rules = [name.partition("(")[0] for name in [expert.name for expert in found.module.experts]]
    assert rules == ["static"] + ["SGD"] * 3 + ["Adam"] * 3
    rates = [rule.defaults["lr"] for rule in found.module.optimizers_of_rules]
    assert rates[2] == pytest.approx(10 * rates[0])
    assert rates[5] == pytest.approx(10 * rates[3])


@pytest.mark.parametrize(
    "rule", ["AdamW", "Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop", "NAdam", "RAdam", "Adamax"]
)
def test_every_elementwise_rule_has_usual_rates(rule):
    found, _, by_expert = mixed(
        [random_tokens(60, 1)], update=getattr(torch.optim, rule), rates=None, mixture=Mixture()
    )
    assert len(by_expert[0]) == 4
    assert float(torch.cat(found.nats[0]).sum()) <= by_expert[0].sum(axis=1).min() + math.log(4) + 60 * 0.01


def test_learning_goes_on_through_documents_where_nothing_is_reset():
    texts = [random_tokens(40, 1), random_tokens(40, 1)]
    forgetful, *_ = mixed(texts)
    found, experts, _ = mixed(texts, reset=ResetWeights("never"))
    assert joined(forgetful.nats[0]).sum() == joined(forgetful.nats[1]).sum()
    assert joined(found.nats[1]).sum() < joined(found.nats[0]).sum()
    assert experts.shares[1][0][0] < 0.25  # what was known of the experts, too


def test_without_a_reference_the_static_model_is_no_expert():
    found, _experts, by_expert = mixed(reference=None)
    assert len(by_expert[0]) == len(RATES)
    assert [expert.name for expert in found.module.experts] == [f"SGD(lr {rate:g})" for rate in RATES]


def test_a_document_fails_when_no_expert_is_left():
    found, *_ = mixed([random_tokens(160, 3), random_tokens(40, 2)], rates=[1e8], reference=None, together=2)
    assert set(stopped(found.module)) >= {0}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rates": []}, "rates must be different learning rates"),
        ({"rates": [0.1, 0.1]}, "rates must be different learning rates"),
        ({"rates": [-1.0]}, "rates must be at least 0"),
        ({"rates": [math.inf]}, "rates must be at least 0 and finite"),
        ({"rates": None, "update": [SGD, SGD]}, "update must be one rule where nothing is mixed"),
        ({"update": None}, "update must be a rule where there are rates"),
        ({"update": partial(torch.optim.Adafactor, lr=0.1)}, "treats each weight by itself in a mixture"),
    ],
)
def test_what_cannot_be_mixed_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        mixed(**choices)


@pytest.mark.parametrize("switching", [-0.1, 1.0, math.nan])
def test_a_switching_rate_is_a_share(switching):
    with pytest.raises(ValueError, match="mixture.switching must be at least 0 and under 1"):
        Mixture(switching)


@pytest.mark.parametrize("together", [1, 2])
def test_what_spoils_tokens_before_it_changes_no_weight_of_theirs(together, monkeypatch):
    """An expert whose nats of a whole segment are NaN, because of a token late in it, is kept up to that token."""
    place = 16 + 9
    documents = [random_tokens(64, 3), random_tokens(64, 4)]
    score = Stacked.score

    def spoiled(self, segment, guide=None, keeps=(), plain=False):
        """As a kernel may that multiplies what it masks by 0: the first row is NaN as soon as token 60 is among inputs."""
        reading = score(self, segment, guide, keeps, plain)
        if self.owners[:1] == [(0, 0)] and (segment.inputs[0] == 60).any():
            reading = reading._replace(nats=torch.cat([reading.nats[:1] * math.nan, reading.nats[1:]]))
        return reading

    monkeypatch.setattr(Stacked, "score", spoiled)
    without = [token % 60 for token in documents[0]]
    with_it = [*without[:place], 60, *without[place + 1 :]]
    memories = [NGrams(3, 1.0), NeuralCache(40, 0.3, 0.2), OutputBias(0.1)]
    one, _, experts = mixed([with_it, documents[1][:40]], together=together, rates=[0.05], memories=memories)
    other, *_ = mixed([without, documents[1][:40]], together=together, rates=[0.05], memories=memories)
    # Token `place` itself is scored from what comes before it, and so has its nats from all experts.
    np.testing.assert_allclose(joined(one.nats[0])[:place], joined(other.nats[0])[:place], rtol=1e-6)
    for nats in experts[0][1:]:
        assert np.isfinite(nats[: place + 1]).all()
        assert np.isnan(nats[place + 1 :]).all()


def test_rules_of_one_class_have_names_of_their_own():
    rules = [SGD, partial(SGD, momentum=0.9)]
    found, *_ = mixed([random_tokens(20, 1)], update=rules, rates=[0.01])
    assert [expert.name for expert in found.module.experts] == ["static", "SGD(lr 0.01)", "SGD(lr 0.01) no. 2"]


def test_whether_a_document_was_learned_from_does_not_depend_on_neighbours():
    documents = [random_tokens(64, 3), random_tokens(64, 4)]
    tables = []
    for together in (1, 2):
        records = Records()
        mixed(documents, rates=[1e6], together=together, update=partial(SGD, momentum=0.9), callbacks=[records])
        tables.append(records.segments)
    columns = ["document", "segment", "learned", "updates", "flops"]
    assert tables[0][columns].equals(tables[1][columns])
