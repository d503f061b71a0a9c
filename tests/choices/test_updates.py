"""Krause's rule against its published formula, its statistics, and what is asked of torch's optimizers."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from running import document, random_tokens, run
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from dynlight import DocumentStream, GradientStatistics, Matching, Overlapping, RMSDynamic, TransformerXL
from dynlight.choices.update import elementwise_rules, is_elementwise
from dynlight.learning.forward import token_nats
from dynlight.learning.optimizers import make_optimizers


def krause(weights, initial, gradients, mean_squares, lr, decay, epsilon):
    """Δθ = λ · min(MS / mean(MS), 1/λ) · (θ0 − θ) − η · g / (MS + ε), one weight tensor after the other."""
    mean = sum(float(ms.mean()) for ms in mean_squares) / len(mean_squares)
    changed = []
    for theta, theta0, g, ms in zip(weights, initial, gradients, mean_squares, strict=True):
        pull = torch.zeros_like(theta)
        if decay > 0:
            pull = decay * torch.minimum(ms / mean, torch.full_like(ms, 1 / decay)) * (theta0 - theta)
        changed.append(theta + pull - lr * g / (ms + epsilon))
    return changed


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.7, 5.0])
def test_rms_dynamic_equals_the_published_formula(decay):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 2)]
    initial = [torch.randn(shape, generator=generator) for shape in shapes]
    mean_squares = [torch.rand(shape, generator=generator) * 3 for shape in shapes]
    weights = [torch.nn.Parameter(theta.clone()) for theta in initial]
    optimizer = RMSDynamic(weights, lr=0.3, decay=decay, epsilon=0.01)
    optimizer.use_statistics(mean_squares)
    expected = initial
    for _ in range(5):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        expected = krause(expected, initial, gradients, mean_squares, 0.3, decay, 0.01)
        optimizer.step()
    for weight, theta in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), theta, rtol=1e-5, atol=1e-6)


def test_weights_without_gradient_stay():
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = RMSDynamic(weights, lr=0.5)
    optimizer.use_statistics([torch.ones(2), torch.ones(2)])
    weights[0].grad = torch.ones(2)
    optimizer.step()
    assert torch.all(weights[0] < 1)
    assert torch.all(weights[1] == 1)


@pytest.fixture
def corpus(monkeypatch):
    """Two documents of token ids wherever GradientStatistics asks for its data."""
    documents = [document(random_tokens(40, 1), 0), document(random_tokens(33, 2), 1)]
    monkeypatch.setattr(DocumentStream, "load", lambda self, tokenizer: documents)
    return documents


def by_hand(model, documents, limit):
    """MS of all weights over windows of 16 tokens that overlap by nothing."""
    sums, count = [torch.zeros_like(p) for p in model.parameters()], 0
    for each in documents:
        sequence = torch.cat([torch.tensor([each.prefix]), each.tokens])
        for start in range(0, len(each), 16):
            if count == limit:
                break
            stop = min(start + 16, len(each))
            inputs = sequence[max(0, stop - 16) : stop]
            logits = model(input_ids=inputs[None]).logits[:, -(stop - start) :]
            loss = token_nats(logits, sequence[None, start + 1 : stop + 1]).mean()
            for total, g in zip(sums, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                total += g**2
            count += 1
    return [(total / count).sqrt() for total in sums]


@pytest.mark.parametrize("limit", [3, 100])
def test_statistics_are_the_root_mean_square_over_segments(corpus, limit, tmp_path):
    file = tmp_path / "deep" / "statistics.safetensors"
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"}, segments=limit, file=str(file))
    update = partial(RMSDynamic, lr=1e-3, statistics=statistics)
    found = run(tiny(), [random_tokens(40, 3)], Overlapping(16, 16), update=update)
    saved = load_file(file)
    assert list(saved) != []
    expected = by_hand(tiny(), corpus, limit)
    for (name, _), value in zip(tiny().named_parameters(), expected, strict=True):
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-7)
    again = run(
        tiny(),
        [random_tokens(40, 3)],
        Overlapping(16, 16),
        update=partial(RMSDynamic, lr=1e-3, statistics=GradientStatistics(file=str(file))),
    )
    assert torch.equal(torch.cat(again.nats[0]), torch.cat(found.nats[0]))


def test_reset_keeps_the_statistics(corpus):
    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    update = partial(RMSDynamic, lr=1e-2, decay=0.01, statistics=statistics)
    documents = [random_tokens(50, 4), random_tokens(50, 5)]
    both = run(tiny(), documents, TransformerXL(16, 32), update=update)
    alone = run(tiny(), documents[1:], TransformerXL(16, 32), update=update)
    assert torch.equal(torch.cat(both.nats[1]), torch.cat(alone.nats[0]))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (GradientStatistics(), "update.statistics.data must name a corpus"),
        (GradientStatistics(file="nowhere.safetensors"), "update.statistics.data must name a corpus"),
        (
            GradientStatistics(data={"path": "text", "data_files": "x"}, segments=0),
            "segments must be at least 1, got 0",
        ),
    ],
)
def test_statistics_that_cannot_be_had(corpus, statistics, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), [[1, 2]], Overlapping(16, 16), update=partial(RMSDynamic, lr=1e-3, statistics=statistics))


def test_statistics_of_another_model_are_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"
    save_file({"some.weight": torch.ones(3)}, file)
    update = partial(RMSDynamic, lr=1e-3, statistics=GradientStatistics(file=str(file)))
    with pytest.raises(ValueError, match=r"statistics of the \d+ learned weights"):
        run(tiny(), [[1, 2]], Overlapping(16, 16), update=update, parameters=Matching(names="mlp"))


@pytest.mark.parametrize(("setting", "value"), [("lr", -1.0), ("decay", -0.1), ("epsilon", 0.0)])
def test_numbers_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        RMSDynamic([torch.nn.Parameter(torch.ones(1))], **({"lr": 0.1} | {setting: value}))


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_rules_that_need_more_than_a_gradient_are_refused(name):
    with pytest.raises(ValueError, match=f"got {name}; choose"):
        run(tiny(), [[1, 2]], Overlapping(16, 16), update=partial(getattr(torch.optim, name), lr=0.1))


ELEMENTWISE = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", [*ELEMENTWISE, "Adafactor"])
def test_every_optimizer_of_torch_learns_and_resets(name):
    tokens = random_tokens(64, 6)
    update = partial(getattr(torch.optim, name), lr=1e-3)
    twice = run(tiny(), [tokens, tokens], TransformerXL(16, 32), update=update)
    static = run(tiny(), [tokens], TransformerXL(16, 32))
    assert torch.equal(torch.cat(twice.nats[0]), torch.cat(twice.nats[1]))
    assert not torch.equal(torch.cat(twice.nats[0])[16:], torch.cat(static.nats[0])[16:])


@pytest.mark.parametrize(
    ("rule", "device", "fused"), [("Adagrad", "cpu", True), ("Adagrad", "cuda", False), ("Adam", "cuda", True)]
)
def test_rules_run_as_one_kernel_where_torch_has_one(rule, device, fused):
    with FakeTensorMode():  # devices that needn't be there
        weights = SimpleNamespace(of_rules=[[torch.nn.Parameter(torch.empty(2, device=device))]])
        (optimizer,) = make_optimizers([partial(getattr(torch.optim, rule), lr=0.1)], weights, [], None)
    assert optimizer.param_groups[0]["fused"] is fused
    assert fused or optimizer.param_groups[0]["foreach"]


OF_TORCH = [
    rule for rule in vars(torch.optim).values() if isinstance(rule, type) and issubclass(rule, torch.optim.Optimizer)
]


@pytest.mark.parametrize("rule", [*OF_TORCH, RMSDynamic], ids=lambda rule: rule.__name__)
def test_a_trial_tells_which_rules_treat_each_weight_by_itself(rule):
    assert is_elementwise(rule) == (rule.__name__ in [*ELEMENTWISE, "RMSDynamic"])
    assert (rule.__name__ in elementwise_rules()) == is_elementwise(rule)


def users_rule(direction):
    """A user's rule, θ ← θ − η direction(g), made in a function, so that no message of another test can name it."""

    class UsersRule(torch.optim.Optimizer):
        def __init__(self, params, lr=0.01):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.sub_(direction(weight.grad), alpha=group["lr"])

    return UsersRule


def test_a_users_rule_adapts_documents_together_if_it_treats_each_weight_by_itself():
    rule = users_rule(torch.tanh)
    assert is_elementwise(rule)
    documents = [random_tokens(length, length) for length in (40, 33, 17)]
    runs = [run(tiny(), documents, TransformerXL(16, 24), together=together, update=rule) for together in (1, 3)]
    static = run(tiny(), documents, TransformerXL(16, 24))
    for alone, beside, unlearned in zip(runs[0].nats, runs[1].nats, static.nats, strict=True):
        alone, beside, unlearned = (torch.cat(each).double().sum().item() for each in (alone, beside, unlearned))
        assert beside == pytest.approx(alone, rel=1e-5)
        assert alone != pytest.approx(unlearned, rel=1e-4), "what is learned must matter"


def test_a_users_rule_that_looks_at_a_norm_adapts_one_document_at_a_time():
    rule = users_rule(lambda gradient: gradient / (gradient.norm() + 1e-12))
    assert not is_elementwise(rule)
    run(tiny(), [[1, 2]], TransformerXL(16, 24), update=rule)
    message = "update.class_path must be a rule that treats each weight by itself .*, got UsersRule"
    with pytest.raises(ValueError, match=message):
        run(tiny(), [[1, 2], [3]], TransformerXL(16, 24), together=2, update=rule)
    with pytest.raises(ValueError, match=message):
        run(tiny(), [[1, 2]], TransformerXL(16, 24), update=rule, rates=[0.1])
