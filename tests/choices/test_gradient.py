"""What becomes of the gradient, against the published formulas written out, each document by itself."""

import math
from functools import partial
from itertools import chain

import pytest
import reference
import torch
from lightning.pytorch import Callback
from models import tiny
from running import IN_BOTH_CONTEXTS, as_ours, random_tokens, run

from dynlight import (
    All,
    Clip,
    Compressed,
    GradientStatistics,
    LoRA,
    Matching,
    Overlapping,
    ResetWeights,
    RMSDynamic,
    Sparse,
    TransformerXL,
)
from dynlight.choices.gradient import RowGradients

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 33, 1, 64, 16))]
SGD = partial(torch.optim.SGD, lr=0.05)


def changed(change, gradients, errors=()):
    """Gradients [R, …] of each weight after a change."""
    gradients = [torch.tensor(gradient) for gradient in gradients]
    squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
    change.change(RowGradients(dict(enumerate(gradients)), squares.sqrt, list(errors)))
    return [gradient.tolist() for gradient in gradients]


def test_numbers_by_hand():
    # The three greatest of six in the first row, two of which lie in the first weight; in the second row all in the second.
    two_weights = [[[3.0, -0.1], [0.1, 0.5]], [[1.0, -2.0, 0.5, 0.0], [5.0, -1.0, 7.0, 1.5]]]
    assert changed(Sparse(0.5), two_weights) == [
        [[3.0, -0.0], [0.0, 0.0]],
        [[1.0, -2.0, 0.0, 0.0], [5.0, -0.0, 7.0, 1.5]],
    ]
    assert changed(Clip(2.5), [[[3.0, -4.0], [0.3, 0.4]]])[0][1] == pytest.approx([0.3, 0.4])
    assert changed(Clip(2.5), [[[3.0, -4.0], [0.3, 0.4]]])[0][0] == pytest.approx([1.5, -2.0])
    assert changed(Compressed(share=0.25, feedback=False), two_weights) == [
        [[3.0, -0.0], [0.0, 0.5]],  # of two numbers at least one
        [[0.0, -2.0, 0.0, 0.0], [0.0, -0.0, 7.0, 0.0]],
    ]
    one_bit = changed(Compressed(bits=1, feedback=False), [[[3.0, -1.0, 0.0, 2.0]]])
    assert one_bit == [[[1.5, -1.5, 0.0, 1.5]]]
    assert changed(Compressed(bits=3, feedback=False), [[[3.0, -1.4, 0.4, 2.0]]]) == [[[3.0, -1.0, 0.0, 2.0]]]


def test_what_was_lost_is_added_to_the_next_gradient():
    errors = [torch.zeros(1, 3)]
    compressed = Compressed(share=0.34)
    assert changed(compressed, [[[3.0, 2.0, 1.0]]], errors) == [[[3.0, 0.0, 0.0]]]
    assert errors[0].tolist() == [[0.0, 2.0, 1.0]]
    assert changed(compressed, [[[3.0, 2.0, 1.0]]], errors) == [[[0.0, 4.0, 0.0]]]
    assert errors[0].tolist() == [[3.0, 0.0, 2.0]]


def sparse(share):
    def change(gradients):
        sizes = torch.cat([gradient.abs().flatten() for gradient in gradients]).sort(descending=True).values
        for gradient in gradients:
            gradient[gradient.abs() < sizes[round(share * len(sizes)) - 1]] = 0

    return lambda: change


def compressed(feedback=True, share=None, bits=None):
    def smaller(values):
        if share is not None:
            kept = max(1, round(share * values.numel()))
            least = values.abs().flatten().sort(descending=True).values[kept - 1]
            return torch.where(values.abs() < least, torch.zeros_like(values), values)
        if bits == 1:
            return values.sign() * values.abs().mean()
        step = values.abs().max() / (2 ** (bits - 1) - 1)
        return torch.zeros_like(values) if step == 0 else (values / step).round() * step

    def make():
        errors = {}

        def change(gradients):
            for place, gradient in enumerate(gradients):
                wanted = gradient + errors.get(place, 0.0)
                gradient.copy_(smaller(wanted))
                errors[place] = wanted - gradient if feedback else 0.0

        return change

    return make


CHANGES = {
    "sparse": ([Sparse(0.1)], sparse(0.1)),
    "top-k": ([Compressed(share=0.05)], compressed(share=0.05)),
    "without feedback": ([Compressed(share=0.05, feedback=False)], compressed(share=0.05, feedback=False)),
    "signs": ([Compressed(bits=1)], compressed(bits=1)),
    "4 bits": ([Compressed(bits=4)], compressed(bits=4)),
}


@pytest.mark.parametrize("update", [SGD, partial(torch.optim.Adam, lr=1e-3)], ids=["sgd", "adam"])
@IN_BOTH_CONTEXTS
@pytest.mark.parametrize(("changes", "make_change"), CHANGES.values(), ids=CHANGES)
def test_a_change_equals_the_reference(changes, make_change, context, window, parameters, update):
    ours, theirs = tiny(), tiny()
    parameters.prepare(theirs)
    optimizer = partial(as_ours, update)
    expected = reference.evaluate(theirs, DOCUMENTS, 0, make_optimizer=optimizer, make_change=make_change, **window)
    found = run(ours, DOCUMENTS, context, parameters=parameters, update=update, gradient=changes)
    for one, other in zip(chain(*found.nats), chain(*expected), strict=True):
        assert torch.equal(one, other)


def nats(documents=DOCUMENTS, together=1, **choices):
    """Nats of each document."""
    found = run(tiny(), documents, TransformerXL(16, 24), together=together, **({"update": SGD} | choices))
    return [float(torch.cat(document).double().sum()) if document else 0.0 for document in found.nats]


@pytest.mark.parametrize("changes", [changes for changes, _ in CHANGES.values()], ids=CHANGES)
@pytest.mark.parametrize("parameters", [All(), Matching(names="mlp")], ids=str)
def test_each_document_by_itself(changes, parameters):
    alone = nats(parameters=parameters, gradient=changes)
    assert nats(parameters=parameters, gradient=changes, together=3) == pytest.approx(alone, rel=1e-5)
    assert nats(DOCUMENTS[2:], parameters=parameters, gradient=changes) == alone[2:]


@pytest.mark.parametrize("changes", [changes for changes, _ in CHANGES.values()], ids=CHANGES)
def test_each_rate_by_itself(changes):
    rates = [0.05, 0.2]
    scores = {rate: nats(DOCUMENTS[:2], update=partial(torch.optim.SGD, lr=rate), gradient=changes) for rate in rates}
    experts = []

    class Experts(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            experts.append(pl_module.score.experts.nats.sum(axis=2))

    run(tiny(), DOCUMENTS[:2], TransformerXL(16, 24), [Experts()], update=torch.optim.SGD, rates=rates,
        gradient=changes, together=2, reference="static")  # fmt: skip
    by_rule = [sum(each[1 + rule, 0] for each in experts) for rule in (0, 1)]
    assert by_rule == pytest.approx([scores[rate][0] for rate in rates], rel=1e-5)


NEUTRAL = {
    "clip": [Clip(math.inf)],
    "sparse": [Sparse(1.0)],
    "top-k": [Compressed(share=1.0)],
    "list": [],
}


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("changes", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_settings_change_no_bit(changes, together):
    assert nats(gradient=changes, together=together) == nats(together=together)


def test_order_is_that_of_the_list():
    assert nats(gradient=[Clip(0.05), Sparse(0.1)]) != nats(gradient=[Sparse(0.1), Clip(0.05)])
    assert nats(gradient=[Clip(0.05)]) == nats(clip=0.05)
    assert nats(clip=0.05, gradient=[Sparse(0.1)]) == nats(gradient=[Clip(0.05), Sparse(0.1)])


@pytest.mark.parametrize("together", [1, 2])
def test_weights_are_chosen_once_by_the_statistics_of_a_corpus(monkeypatch, together):
    importance = [
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) for weight in tiny().parameters()
    ]
    monkeypatch.setattr("dynlight.learning.module.load_or_collect", lambda *_, **__: importance)
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    change = Sparse(0.2, by="fisher", statistics=statistics)
    model = tiny()
    before = [weight.detach().clone() for weight in model.parameters()]
    found = run(
        model, [DOCUMENTS[0]] * together, TransformerXL(16, 24), update=SGD, gradient=[change], together=together
    )
    least = torch.cat([each.flatten() for each in importance]).quantile(0.8)
    rows = list(model.parameters()) if together == 1 else [weight[0] for weight in found.module.weights.learned]
    for weight, initial, important in zip(rows, before, importance, strict=True):
        assert torch.equal(weight[important < least], initial[important < least])
    assert any(not torch.equal(one, other) for one, other in zip(rows, before, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(0), "gradient.norm must be above 0, got 0"),
        (lambda: Sparse(0), "gradient.share must be above 0 and at most 1, got 0"),
        (lambda: Sparse(1.5), "gradient.share must be above 0 and at most 1, got 1.5"),
        (lambda: Sparse(0.1, by="size"), "gradient.by must be gradient or fisher, got size"),
        (
            lambda: Sparse(0.1, statistics=GradientStatistics()),
            "gradient.statistics must be null where gradient.by is gradient, got settings",
        ),
        (lambda: Compressed(0.1, feedback=None), "gradient.feedback must be true or false, got null"),
        (Compressed, "gradient.share must be given, or gradient.bits, but not both, got share None and bits None"),
        (lambda: Compressed(0.1, 4), "gradient.share must be given, or gradient.bits, but not both, got share 0.1"),
        (lambda: Compressed(bits=17), "gradient.bits must be from 1 to 16, got 17"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_statistics_that_cannot_be_had():
    with pytest.raises(ValueError, match="gradient.statistics.data must name a corpus to collect gradient statistics"):
        run(tiny(), [[1, 2]], Overlapping(16, 16), update=SGD, gradient=[Sparse(0.1, by="fisher")])


def test_a_gradient_that_is_not_finite_is_noticed():
    documents = [DOCUMENTS[0], DOCUMENTS[3]]
    for changes in (changes for changes, _ in CHANGES.values()):
        found = run(tiny(), documents, TransformerXL(16, 24), update=partial(torch.optim.SGD, lr=1e30), gradient=changes,
                    together=2)  # fmt: skip
        assert set(found.module.failures.of_documents) == {0, 1}


def test_a_gradient_that_is_not_finite_spoils_no_later_document():
    """Not through what its compression left out, either."""
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]]

    class Spoiled(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 0 and not self.done:
                self.done = True
                for weight in pl_module.weights.learned:
                    weight.grad.fill_(math.nan)

        done = False

    for choices in ({}, {"gradient": [Compressed(share=0.05)]}):
        found = run(
            tiny(), documents, TransformerXL(16, 24), [Spoiled()], update=SGD, reset=ResetWeights("never"), **choices
        )
        assert set(found.module.failures.of_documents) == {0}


def test_statistics_of_adapters_are_refused():
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    with pytest.raises(ValueError, match="gradient.by must be gradient with adapters, of which half have no gradient"):
        run(tiny(), [[1, 2]], Overlapping(16, 16), update=SGD, parameters=LoRA(rank=2),
            gradient=[Sparse(0.1, by="fisher", statistics=statistics)])  # fmt: skip


def test_nothing_is_asked_of_a_corpus_where_nothing_is_learned():
    run(tiny(), [[1, 2]], Overlapping(16, 16), update=None, gradient=[Sparse(0.1, by="fisher")])


def test_krauses_rule_reads_a_sparse_gradient(monkeypatch):
    ones = [torch.ones_like(weight) for weight in tiny().parameters()]
    monkeypatch.setattr("dynlight.learning.module.load_or_collect", lambda *_, **__: ones)
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    rule = partial(RMSDynamic, lr=0.05, statistics=statistics)
    assert nats(update=rule, gradient=[Sparse(0.1)]) != nats(update=rule)
