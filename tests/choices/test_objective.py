"""What is learned from a segment, and when that depends on what it scored: against a loop, each document by itself."""

import math
from functools import partial

import pytest
import reference
import torch
from lightning.pytorch import Callback
from models import tiny
from running import IN_BOTH_CONTEXTS, as_ours, random_tokens, run

from dynlight import (
    Anchored,
    Compressed,
    GradientStatistics,
    Matching,
    NextToken,
    Overlapping,
    Records,
    Replayed,
    RMSDynamic,
    Surprising,
    TransformerXL,
    UpdateFrequency,
)
from dynlight.choices.objective import Forward
from dynlight.learning.forward import Guide, divergences

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 33, 1, 64, 16))]
SGD = partial(torch.optim.SGD, lr=0.05)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
MIDDLE = 4.13  # nats a token, which some segments and tokens of these documents are above


def test_numbers_by_hand():
    nats = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 1.0, 0.0, 0.0]])
    scored = torch.tensor([[True, True, True, False], [True, True, False, False]])
    read = Forward(nats, scored, nats)
    assert NextToken().losses(read).tolist() == [2.0, 3.0]
    assert Surprising(1.5).losses(read).tolist() == [2.0, 3.0]
    assert Surprising(1.5, of="tokens").losses(read).tolist() == [2.5, 5.0]
    second = Forward(nats / 10, scored, nats)  # what surprised when it was scored is learned from in a second pass, too
    assert Surprising(1.5, of="tokens").losses(second).tolist() == pytest.approx([0.25, 0.5])
    weighted = Surprising(1.5, weight=0.1).losses(read).tolist()
    assert weighted == pytest.approx([0.1 * math.exp(0.5) * 2, 0.1 * math.exp(1.5) * 3])
    weighted = Surprising(2.0, weight=0.1, of="tokens").losses(read).tolist()
    assert weighted == pytest.approx([0.1 * math.exp(1) * 3, 0.1 * math.exp(3) * 5])
    assert [Surprising(2.0).learns(nats[0, :3]), Surprising(1.9).learns(nats[0, :3])] == [False, True]
    assert [Surprising(3.0, of="tokens").learns(nats[0, :3]), Surprising(2.9, of="tokens").learns(nats[0])] == [
        False,
        True,
    ]


def tokens_above(threshold, weight=None):
    def loss(nats, is_due):
        above = nats.detach() > threshold
        if not above.any():
            return None
        by_token = nats if weight is None else nats * weight * (nats.detach() - threshold).exp()
        return by_token[above].sum() / above.sum()

    return lambda: loss


def segments_above(threshold, weight=None):
    def loss(nats, is_due):
        mean = nats.mean()
        if mean <= threshold:
            return None
        return mean if weight is None else weight * (mean.detach() - threshold).exp() * mean

    return lambda: loss


def above_mean(factor):
    def make():
        read = []

        def loss(nats, is_due):
            before = sum(float(each.double().sum()) for each in read), sum(map(len, read))
            read.append(nats.detach())
            surprises = (
                before[1] == 0 or float(nats.detach().double().sum()) / len(nats) > factor * before[0] / before[1]
            )
            return nats.mean() if surprises else None

        return loss

    return make


CHOICES = {
    "segments": ({"objective": Surprising(MIDDLE)}, segments_above(MIDDLE)),
    "weighed": ({"objective": Surprising(MIDDLE, weight=0.5)}, segments_above(MIDDLE, 0.5)),
    "tokens": ({"objective": Surprising(MIDDLE, of="tokens")}, tokens_above(MIDDLE)),
    "tokens, weighed": ({"objective": Surprising(MIDDLE, 0.5, of="tokens")}, tokens_above(MIDDLE, 0.5)),
    "above": ({"schedule": UpdateFrequency(above=MIDDLE)}, segments_above(MIDDLE)),
    "above the mean": ({"schedule": UpdateFrequency(above_mean=1.0)}, above_mean(1.0)),
}


@pytest.mark.parametrize("update", [SGD, ADAM], ids=["sgd", "adamw"])
@IN_BOTH_CONTEXTS
@pytest.mark.parametrize(("choices", "make_loss"), CHOICES.values(), ids=CHOICES)
def test_a_choice_equals_the_reference(choices, make_loss, context, window, parameters, update):
    ours, theirs = tiny(), tiny()
    parameters.prepare(theirs)
    optimizer = partial(as_ours, update)
    expected = reference.evaluate(theirs, DOCUMENTS, 0, make_optimizer=optimizer, make_loss=make_loss, **window)
    found = run(ours, DOCUMENTS, context, parameters=parameters, update=update, **choices)
    for one, other in zip(sum(found.nats, []), sum(expected, []), strict=True):  # noqa: RUF017
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Updates(Callback):
    """Keeps the updates that each rule made from each document's segments, and the nats of each expert."""

    def __init__(self):
        self.made, self.nats = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for row in pl_module.score.rows:
            index = batch.documents[row].index
            self.made.setdefault(index, []).append(pl_module.score.updates_of(row))
            if pl_module.score.experts is not None:
                nats = pl_module.score.experts.nats[:, row, batch.scored[row]].astype(float).sum(axis=1)
                self.nats.setdefault(index, []).append(nats)


def read(documents=DOCUMENTS, together=1, **choices):
    """Nats of each document, and the updates that were made from each segment."""
    updates = Updates()
    choices = {"update": SGD} | choices
    found = run(tiny(), documents, TransformerXL(16, 24), [updates], together=together, **choices)
    return [float(torch.cat(each).double().sum()) for each in found.nats], updates.made


@pytest.mark.parametrize("choices", [choices for choices, _ in CHOICES.values()], ids=CHOICES)
@pytest.mark.parametrize("update", [SGD, ADAM], ids=["sgd", "adamw"])
def test_each_document_by_itself(choices, update):
    alone, made = read(update=update, **choices)
    assert {0, 1} <= {each for (each,) in sum(made.values(), [])}, "some segments are learned from, and some aren't"  # noqa: RUF017
    beside, made_beside = read(update=update, together=3, **choices)
    assert beside == pytest.approx(alone, rel=1e-5)
    assert made_beside == made
    assert read(DOCUMENTS[2:], update=update, **choices)[0] == alone[2:]


@pytest.mark.parametrize("choices", [choices for choices, _ in CHOICES.values()], ids=CHOICES)
def test_each_rate_by_itself(choices):
    rates, updates = [1e-3, 1e-2], Updates()
    run(tiny(), DOCUMENTS[:2], TransformerXL(16, 24), [updates], update=torch.optim.Adam, rates=rates, together=2,
        reference="static", parameters=Matching(names="mlp"), **choices)  # fmt: skip
    for rule, rate in enumerate(rates):
        alone, made = read(
            DOCUMENTS[:2], update=partial(torch.optim.Adam, lr=rate), parameters=Matching(names="mlp"), **choices
        )
        for index in (0, 1):
            assert sum(updates.nats[index])[1 + rule] == pytest.approx(alone[index], rel=1e-5)
            assert [each[rule] for each in updates.made[index]] == [each for (each,) in made[index]]


def anchored(documents, weight, update):
    """Nats of each document: windows of 40 tokens, 16 of them new, each scored, then learned from."""
    found = []
    for tokens in documents:
        model, initial = tiny(), tiny()
        optimizer, sequence, sums = as_ours(update, list(model.parameters())), torch.tensor([[0, *tokens]]), []
        for start in range(0, len(tokens), 16):
            stop = min(start + 16, len(tokens))
            inputs, targets = sequence[:, max(0, stop - 40) : stop], sequence[0, start + 1 : stop + 1]
            q, p = (each(input_ids=inputs).logits[0, start - stop :].log_softmax(-1) for each in (model, initial))
            nats = -q[range(len(targets)), targets]
            sums.append(float(nats.detach().double().sum()))
            optimizer.zero_grad()
            (nats.mean() + weight * (p.detach().exp() * (p.detach() - q)).sum(-1).mean()).backward()
            optimizer.step()
        found.append(sum(sums))
    return found


@pytest.mark.parametrize("update", [SGD, ADAM], ids=["sgd", "adamw"])
def test_an_anchor_equals_a_loop(update):
    context, choices = Overlapping(16, 40), {"objective": Anchored(0.7), "update": update, "reference": "static"}
    expected = anchored(DOCUMENTS, 0.7, update)
    for together in (1, 3):
        found = run(tiny(), DOCUMENTS, context, together=together, **choices)
        nats = [float(torch.cat(each).double().sum()) for each in found.nats]
        assert nats == pytest.approx(expected, rel=1e-5)
        assert nats != pytest.approx(anchored(DOCUMENTS, 0.0, update), rel=1e-3)
    twice = run(tiny(), DOCUMENTS, context, schedule=UpdateFrequency(passes=2), **choices).nats
    beside = run(tiny(), DOCUMENTS, context, together=3, schedule=UpdateFrequency(passes=2), **choices).nats
    for one, other in zip(twice, beside, strict=True):
        assert float(torch.cat(one).sum()) == pytest.approx(float(torch.cat(other).sum()), rel=1e-5)


def test_an_anchor_needs_no_reference_and_costs_a_forward():
    tables = []
    for choices in (
        {"objective": Anchored(0.5), "reference": "static"},
        {"objective": Anchored(0.5), "reference": None},
        {"reference": "static"},
    ):
        records = Records()
        found = run(tiny(), DOCUMENTS, TransformerXL(16, 24), [records], update=SGD, together=2, **choices)
        tables.append((records.segments, found.nats))
    (with_reference, nats), (without, same), (plain, _) = tables
    for one, other in zip(nats, same, strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))
    assert without.flops.tolist() == with_reference.flops.tolist() == (plain.flops + plain.static_flops).tolist()
    assert (without.static_flops.tolist(), without.static_nats.isna().all()) == ([0] * len(without), True)


def test_an_anchor_holds():
    """The heavier it is, the nearer scores stay to those of the initial weights."""
    static = read(update=None)[0]
    away = []
    for weight in (0.0, 1.0, 10.0):
        nats = read(update=partial(torch.optim.SGD, lr=0.02), objective=Anchored(weight), reference="static")[0]
        away.append(sum(abs(one - other) for one, other in zip(nats, static, strict=True)))
    assert away[0] > away[1] > away[2] > 0


def replayed(documents, segments, share, update):
    """Nats of each document in segments of 16 with a memory of all that was read, some of them read again without one."""
    found, objective = [], Replayed(segments, share)
    for tokens in documents:
        model, sums, memory = tiny(), [], []
        optimizer, sequence = as_ours(update, list(model.parameters())), torch.tensor([0, *tokens])

        def again(start, model=model, sequence=sequence):
            return reference.nats_with_memory(model, sequence, start, start + 16, [])[0].mean()

        for index, start in enumerate(range(0, len(tokens), 16)):
            stop = min(start + 16, len(tokens))
            nats, memory = reference.nats_with_memory(model, sequence, start, stop, memory)
            sums.append(float(nats.detach().double().sum()))
            optimizer.zero_grad()
            loss = nats.mean()
            if drawn := objective.replayed(index):
                loss = (1 - share) * loss + share * sum(again(16 * each) for each in drawn) / len(drawn)
            loss.backward()
            optimizer.step()
        found.append(sum(sums))
    return found


@pytest.mark.parametrize("update", [SGD, ADAM], ids=["sgd", "adamw"])
def test_segments_read_again_equal_a_loop(update):
    context, choices = TransformerXL(16, 100), {"objective": Replayed(2, 0.4), "update": update}
    expected = replayed(DOCUMENTS, 2, 0.4, update)
    for together in (1, 3):
        found = run(tiny(), DOCUMENTS, context, together=together, **choices)
        nats = [float(torch.cat(each).double().sum()) for each in found.nats]
        assert nats == pytest.approx(expected, rel=1e-5)
        assert nats != pytest.approx(replayed(DOCUMENTS, 1, 0.0, update), rel=1e-4)
    drawn = [Replayed(2).replayed(index) for index in range(5)]
    assert [len(each) for each in drawn] == [0, 1, 2, 2, 2]
    assert all(len({*each}) == len(each) and max(each) < index for index, each in enumerate(drawn) if each)
    assert drawn != [Replayed(2, seed=1).replayed(index) for index in range(5)]


@pytest.mark.parametrize("context", [TransformerXL(16, 24), Overlapping(16, 40)], ids=str)
def test_flops_of_segments_read_again(context):
    plain, twice, alone = Records(), Records(), Records()
    run(tiny(), DOCUMENTS[:2], context, [plain], update=SGD, together=2)
    run(tiny(), DOCUMENTS[:2], context, [twice], update=SGD, together=2, objective=Replayed(1))
    without_memory = TransformerXL(16, 0) if context.memory else context
    run(tiny(), DOCUMENTS[:2], without_memory, [alone], update=SGD, together=2)
    tables = (each.segments.groupby("document") for each in (plain, twice, alone))
    for (_, rows), (_, more), (_, single) in zip(*tables, strict=True):
        costs = single.flops.tolist()
        expected = [flops + sum(costs[j] for j in Replayed(1).replayed(i)) for i, flops in enumerate(rows.flops)]
        assert more.flops.tolist() == expected


def test_divergences_by_hand():
    guide, logits = torch.tensor([[[0.0, math.log(3), -math.inf]]]), torch.tensor([[[0.0, 0.0, -math.inf]]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergences(logits, Guide(guide)).item() == pytest.approx(expected)
    assert divergences(guide, Guide(guide)).item() == 0


NEUTRAL = {
    "replayed": {"objective": Replayed(2, share=0.0)},
    "anchored": {"objective": Anchored(0.0), "reference": "static"},
    "next token": {"objective": NextToken()},
    "segments": {"objective": Surprising(-math.inf)},
    "tokens": {"objective": Surprising(-math.inf, of="tokens")},
    "above": {"schedule": UpdateFrequency(above=-math.inf)},
    "above the mean": {"schedule": UpdateFrequency(above_mean=-1.0)},
}


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("update", [SGD, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("choices", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_settings_change_no_bit(choices, update, together):
    assert read(together=together, update=update, **choices) == read(together=together, update=update)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("choices", [choices for choices, _ in CHOICES.values()], ids=CHOICES)
def test_where_nothing_is_learned_nothing_is_asked(choices, together):
    assert read(together=together, **(choices | {"update": None})) == read(together=together, update=None)


@pytest.mark.parametrize("together", [1, 3])
def test_passes_fail_no_document(together):
    objective = Surprising(MIDDLE, of="tokens")
    update, schedule = partial(torch.optim.SGD, lr=0.3), UpdateFrequency(passes=4)
    found = run(tiny(), DOCUMENTS, TransformerXL(16, 24), update=update, objective=objective, schedule=schedule,
                together=together)  # fmt: skip
    assert not found.module.failures.of_documents


@pytest.mark.parametrize("together", [1, 3])
def test_a_threshold_that_nothing_reaches_is_static_evaluation(together):
    static = read(together=together, update=None)[0]
    for choices in ({"objective": Surprising(100.0)}, {"schedule": UpdateFrequency(above=100.0)}):
        nats, made = read(together=together, update=ADAM, **choices)
        assert nats == static
        assert {each for (each,) in sum(made.values(), [])} == {0}  # noqa: RUF017


def test_what_is_not_learned_from_leaves_errors_and_passes_alone():
    choices = {"schedule": UpdateFrequency(passes=2, above=MIDDLE), "gradient": [Compressed(share=0.05)]}
    alone, made = read(**choices)
    assert {0, 2} == {each for (each,) in sum(made.values(), [])}  # noqa: RUF017
    beside, made_beside = read(together=3, **choices)
    assert (beside, made_beside) == (pytest.approx(alone, rel=1e-5), made)


@pytest.mark.parametrize("together", [1, 3])
def test_krauses_rule(together, monkeypatch):
    monkeypatch.setattr(
        "dynlight.learning.module.load_or_collect",
        lambda *_, model, **__: [torch.full_like(weight, 0.01) for weight in model.parameters()],
    )
    rule = partial(
        RMSDynamic,
        lr=0.05,
        epsilon=0.01,
        decay=0.05,
        statistics=GradientStatistics(data={"path": "text", "data_files": "x"}),
    )
    nats, made = read(update=rule, together=together, schedule=UpdateFrequency(above=MIDDLE))
    assert nats == pytest.approx(read(update=rule, schedule=UpdateFrequency(above=MIDDLE))[0], rel=1e-5)
    assert {0, 1} == {each for (each,) in sum(made.values(), [])}  # noqa: RUF017


def test_flops_are_those_of_what_was_done():
    records = Records()
    run(tiny(), DOCUMENTS, TransformerXL(16, 24), [records], update=SGD, together=3,
        schedule=UpdateFrequency(above=MIDDLE))  # fmt: skip
    plain = Records()
    run(tiny(), DOCUMENTS, TransformerXL(16, 24), [plain], update=SGD, together=3)
    rows, all_rows = records.segments, plain.segments
    assert set(rows.learned) == {True, False}
    assert rows.flops[rows.learned].tolist() == all_rows.flops[rows.learned].tolist()
    assert rows.flops[~rows.learned].tolist() == all_rows.forward_flops[~rows.learned].tolist()
    assert (rows.update_flops[~rows.learned] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Surprising(math.nan), "objective.threshold must be a number, got nan"),
        (lambda: Surprising(3.0, weight=0.0), "objective.weight must be above 0, got 0.0; choose null"),
        (lambda: Surprising(-math.inf, weight=0.1), "objective.weight must be null where objective.threshold is -.inf"),
        (lambda: Anchored(-1.0), "objective.weight must be at least 0 and finite, got -1.0"),
        (
            lambda: UpdateFrequency(every="never", above=1.0),
            "schedule.above must be null with schedule.every never, got 1.0",
        ),
        (lambda: Replayed(0), "objective.segments must be at least 1, got 0"),
        (lambda: Replayed(share=1.0), "objective.share must be at least 0 and under 1, got 1.0"),
        (
            lambda: run(tiny(), [[1]], Overlapping(4, 4), update=SGD, objective=Replayed(), compile="reduce-overhead"),
            "model.compile must be true or false with objective Replayed, got reduce-overhead",
        ),
        (lambda: Surprising(3.0, of="words"), "objective.of must be segments or tokens, got words"),
        (lambda: UpdateFrequency(above=math.nan), "schedule.above must be a number, got nan"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
