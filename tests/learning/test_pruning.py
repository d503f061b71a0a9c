"""Units that contribute least learn no more: against a loop, each document by itself, and against AdaLoRA's own scores."""

import math
from functools import partial

import pytest
import reference
import torch
from lightning.pytorch import Trainer
from models import tiny
from peft.tuners.adalora.layer import RankAllocator
from running import TRAINER, as_ours, document, random_tokens, run

from dynlight import (
    All,
    Clip,
    Compressed,
    DocumentStream,
    DynamicEvaluation,
    LoRA,
    Matching,
    Overlapping,
    Pruned,
    Records,
    ResetWeights,
    SettingError,
    Sparse,
    TransformerXL,
)
from dynlight.learning.flops import EmptyModel, FlopCounter
from dynlight.learning.pruning import Pruning

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((150, 33, 1, 110, 16))]
MEMORY = TransformerXL(16, 24)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


class Slow:
    """Hooks of an optimizer that prune, one unit after another."""

    def __init__(self, model, keep, every):
        self.named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.keep, self.every, self.updates = keep, every, 0
        self.mean = {name: torch.zeros_like(weight) for name, weight in self.named}
        self.doubt = {name: torch.zeros_like(weight) for name, weight in self.named}
        self.units = {}
        for name, weight in self.named:
            for unit, index in self.units_of(name, weight):
                self.units.setdefault(unit, []).append((name, index))
        self.left = list(self.units)

    @staticmethod
    def units_of(name, weight):
        if ".lora_A." in name:
            return [((name.split(".lora_")[0], rank), (rank,)) for rank in range(len(weight))]
        if ".lora_B." in name:
            return [((name.split(".lora_")[0], rank), (slice(None), rank)) for rank in range(weight.shape[1])]
        return [(name.rpartition(".")[0], (...,))]

    @torch.no_grad()
    def before(self, optimizer, args, kwargs):
        for name, weight in self.named:
            impact = (weight * weight.grad).abs() if weight.grad is not None else torch.zeros_like(weight)
            self.mean[name] = 0.85 * self.mean[name] + 0.15 * impact
            self.doubt[name] = 0.85 * self.doubt[name] + 0.15 * (impact - self.mean[name]).abs()
        for unit in set(self.units) - set(self.left):
            for name, index in self.units[unit]:
                weight = dict(self.named)[name]
                if "lora" in name:
                    weight.grad[index] = 0
                else:
                    weight.grad = None

    @torch.no_grad()
    def after(self, optimizer, args, kwargs):
        self.updates += 1
        if self.updates % self.every == 0:
            count = max(
                math.ceil(self.keep * len(self.units)), math.ceil(len(self.units) / 2 ** (self.updates / self.every))
            )
            self.left = sorted(self.left, key=lambda unit: -self.score(unit))[:count]
        for unit in set(self.units) - set(self.left):
            for name, index in self.units[unit]:
                if "lora_B" in name:
                    dict(self.named)[name][index] = 0

    def score(self, unit):
        parts = [(self.mean[name] * self.doubt[name])[index].double() for name, index in self.units[unit]]
        if isinstance(unit, tuple):
            return sum(float(part.mean()) for part in parts)
        return sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)


@pytest.mark.parametrize("update", [SGD, ADAM], ids=["momentum", "adamw"])
@pytest.mark.parametrize(
    "of", [LoRA(rank=4), Matching("mlp|attn"), All()], ids=["ranks of adapters", "modules", "all weights"]
)
@pytest.mark.parametrize(
    ("context", "seen"), [(MEMORY, {"memory": 24}), (Overlapping(16, 40), {"window": 40})], ids=["memory", "windows"]
)
def test_it_equals_a_loop(of, update, context, seen):
    theirs = tiny()
    of.prepare(theirs)

    def make(learned):
        optimizer, slow = as_ours(update, learned), Slow(theirs, keep=0.2, every=2)
        optimizer.register_step_pre_hook(slow.before)
        optimizer.register_step_post_hook(slow.after)
        return optimizer

    expected = reference.evaluate(theirs, DOCUMENTS, 0, segment=16, make_optimizer=make, **seen)
    for together in (1, 4):
        choices = {"parameters": Pruned(of, keep=0.2, every=2), "update": update}
        found = run(tiny(), DOCUMENTS, context, together=together, **choices)
        for mine, other in zip(found.nats, expected, strict=True):
            if mine:
                torch.testing.assert_close(torch.cat(mine), torch.cat(other), rtol=1e-4, atol=1e-4)
                assert float(sum(map(torch.sum, mine))) == pytest.approx(float(sum(map(torch.sum, other))), rel=1e-5)


def test_scores_of_ranks_are_those_of_adalora():
    model = tiny()
    LoRA(rank=4).prepare(model)
    pruning = Pruning(Pruned(LoRA(rank=4)), model)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.adapter_name, allocator.beta1, allocator.beta2 = "default", 0.85, 0.85
    allocator.reset_ipt()
    learned = [weight for weight in model.parameters() if weight.requires_grad]

    class Alone:
        owners = [(0, 0)]  # noqa: RUF012

        def gradients(self):
            return {place: weight.grad[None] for place, weight in enumerate(learned)}

        def values(self):
            return [weight.detach()[None] for weight in learned]

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for weight in learned:
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
            weight.grad = torch.randn(weight.shape, generator=generator)
        allocator.update_ipt(model)
        pruning.see(Alone(), [True])
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    scores = []
    for name in names[::2]:
        a, b = (allocator._element_score(each) for each in (name, name.replace("lora_A", "lora_B")))
        scores += (a.mean(dim=1) + b.mean(dim=0)).tolist()
    assert pruning._scores(pruning._rows[0, 0]).tolist() == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("of", [LoRA(rank=3), Matching("mlp")], ids=str)
@pytest.mark.parametrize("changes", [{"keep": 1.0, "every": 2}, {"keep": 0.1, "every": 1000}], ids=str)
def test_where_nothing_stops_it_is_the_choice_itself(of, changes, together):
    plain, pruned = (
        run(tiny(), DOCUMENTS, MEMORY, together=together, update=ADAM, parameters=each)
        for each in (of, Pruned(of, **changes))
    )
    for mine, other in zip(pruned.nats, plain.nats, strict=True):
        assert all(torch.equal(each, same) for each, same in zip(mine, other, strict=True))


def test_rates_of_a_mixture_prune_by_themselves():
    choices = {"update": torch.optim.SGD, "reference": "static", "gradient": [Clip(0.5)]}
    pruned = Pruned(LoRA(rank=4), keep=0.3, every=2)
    mixed = run(tiny(), DOCUMENTS, MEMORY, together=4, rates=[0.1, 0.5], parameters=pruned, **choices).module
    alone = run(tiny(), DOCUMENTS[:1], MEMORY, rates=[0.1, 0.5], parameters=pruned, **choices).module
    assert mixed.pruning.is_set
    one, other = alone.pruning._rows[0, 0].learns, alone.pruning._rows[1, 0].learns
    assert one.sum() == other.sum() == math.ceil(0.3 * len(one))


@pytest.mark.flops
def test_flops_are_those_of_what_still_learns():
    records = Records()
    pruned = Pruned(Matching("mlp"), keep=0.1, every=3)
    found = run(tiny(), [DOCUMENTS[0][:128]], MEMORY, [records], update=SGD, parameters=pruned)
    segments = records.segments
    of_weights = segments.weight_flops.tolist()
    assert of_weights[0] == of_weights[2] == 2 * of_weights[3] == 2 * of_weights[5] == 4 * of_weights[6]
    assert segments.update_flops[7] < segments.update_flops[0]
    learns = found.module.pruning._rows[0, 0].learns
    parts = found.module.pruning._parts
    stopped = {place for place, part in enumerate(parts) if not learns[part.first]}
    assert all(weight.requires_grad for weight in found.module.weights.learned)  # as the model was given
    model = tiny()
    Matching("mlp").prepare(model)
    for place, weight in enumerate([weight for weight in model.parameters() if weight.requires_grad]):
        weight.requires_grad_(place not in stopped)
    alone = EmptyModel(model, MEMORY, learns=True, has_reference=False).measure(0, 16, 24)
    assert (segments.activation_flops[7], of_weights[7]) == (alone.activation, alone.weight)


@pytest.mark.parametrize(
    "gradient",
    [[Sparse(0.1)], [Compressed(share=0.1), Clip(0.5)], [Compressed(bits=2), Sparse(0.3)], [Clip(0.1)]],
    ids=lambda changes: ", ".join(map(str, changes)),
)
@pytest.mark.parametrize("of", [LoRA(rank=4), Matching("mlp"), All()], ids=str)
def test_what_becomes_of_the_gradient_is_the_same_beside_others(of, gradient):
    choices = {"parameters": Pruned(of, keep=0.2, every=2), "update": SGD, "gradient": gradient}
    alone, beside = (run(tiny(), DOCUMENTS, MEMORY, together=together, **choices) for together in (1, 4))
    for mine, other in zip(alone.nats, beside.nats, strict=True):
        if mine:
            torch.testing.assert_close(torch.cat(mine), torch.cat(other), rtol=1e-4, atol=1e-4)


def test_a_document_without_nats_leaves_no_trace_where_nothing_is_reset():
    for choices in ({"parameters": Pruned(LoRA(rank=4), keep=0.2, every=2)}, {"parameters": LoRA(rank=4)}):
        model = tiny("qwen3")
        model.model.embed_tokens.weight.data[60] = torch.nan
        documents = [[token % 60 for token in tokens] for tokens in DOCUMENTS[:2]]
        broken = [*documents[0][:40], 60, *documents[0][40:]]
        more = {"update": SGD, "reset": ResetWeights("never"), "gradient": [Compressed(share=0.1)]}
        found = run(model, [documents[0], broken, documents[1]], MEMORY, **more, **choices).module
        assert [*found.failures.of_documents] == [1]
        for row in found.pruning._rows.values():
            assert all(mean.isfinite().all() for mean in row.sensitivities.values())


def test_a_second_run_of_a_module_begins_as_the_first():
    records = [Records(), Records()]
    choices = {"parameters": Pruned(Matching("mlp"), keep=0.2, every=2), "update": SGD, "context": MEMORY}
    module = DynamicEvaluation(tiny(), None, reference=None, **choices)
    for each in records:
        stream = DocumentStream.of([document(DOCUMENTS[0])], 1)
        module.weights.reset(1) if hasattr(module, "weights") else None
        Trainer(callbacks=[each], **TRAINER).fit(module, stream)
    assert records[0].segments.nats.tolist() == records[1].segments.nats.tolist()


def test_flops_without_weights_are_those_that_a_measurement_finds():
    for of, context in ((Matching("mlp|attn"), MEMORY), (All(), Overlapping(16, 40)), (All(), MEMORY)):
        model = tiny()
        of.prepare(model)
        counter = FlopCounter(model, context, [SGD])
        copied = EmptyModel(model, context, learns=True, has_reference=False)
        shape = context.context(999, 1015), 16, context.memory or 0
        places = range(len(copied.learned))
        for stopped in (frozenset(places[:3]), frozenset(places[2:9]), frozenset({0, 1, 5, len(places) - 1})):
            assert counter._cost_without(stopped)(*shape) == copied.measure(*shape, stopped), (str(of), stopped)


@pytest.mark.parametrize(
    ("of", "model", "message"),
    [
        (
            LoRA(targets=["embed_tokens", "q_proj"]),
            "llama",
            "parameters.of must adapt linear maps alone .*, got Embedding",
        ),
        (LoRA(rank=2), "mixtral", "parameters.of must adapt linear maps alone to be pruned by rank, got ParamWrapper"),
    ],
    ids=["embedding", "experts"],
)
def test_adapters_of_other_layers_are_refused(of, model, message):
    with pytest.raises(SettingError, match=message):
        run(tiny(model), DOCUMENTS, MEMORY, parameters=Pruned(of), update=SGD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Pruned, All(), keep=0.0), "parameters.keep must be above 0 and at most 1, got 0.0"),
        (partial(Pruned, All(), every=0), "parameters.every must be at least 1, got 0"),
        (partial(Pruned, LoRA(), every=1), "parameters.every must be at least 2 with adapters, whose first gradients"),
        (partial(Pruned, Pruned(All())), "parameters.of must be a choice that is not pruned itself, got Pruned"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()
