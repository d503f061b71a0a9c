"""Documents adapted together, each with its own weights, score what they score alone."""

import argparse
import copy
import inspect
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from models import CONFIGS, EXPERTS, WITH_MEMORY, tiny
from running import document, random_tokens, run, stopped

from dynlight import (
    All,
    LoRA,
    Matching,
    Overlapping,
    Pretrained,
    Records,
    ResetWeights,
    RMSDynamic,
    TransformerXL,
    UpdateFrequency,
)
from dynlight.documents.document import tokenize
from dynlight.documents.waves import segments, waves

LENGTHS = (70, 33, 1, 64, 0, 16, 70, 15)
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
SGD = partial(torch.optim.SGD, lr=0.05)


def assert_same(one, other, relative=1e-5):
    for a, b in zip(one, other, strict=True):
        assert [len(nats) for nats in a] == [len(nats) for nats in b]
        if a:
            assert float(torch.cat(a).double().sum()) == pytest.approx(float(torch.cat(b).double().sum()), rel=relative)
            torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=1e-4, atol=1e-4)


def compare(architecture="llama", context=None, together=(3,), documents=DOCUMENTS, **choices):
    """Documents read together, as many at once as each number says, against each alone."""
    context = context or TransformerXL(16, 24)
    choices = {"update": SGD, "reference": "static"} | choices
    alone = run(tiny(architecture), documents, context, **choices)
    for count in together:
        beside = run(tiny(architecture), documents, context, together=count, **choices)
        assert_same(beside.nats, alone.nats)
        assert_same(beside.static, alone.static)


@pytest.mark.parametrize("context", [Overlapping(16, 40), TransformerXL(16, 24)], ids=str)
@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2), Matching(names="mlp"), Matching(blocks=[-1, -1])], ids=str)
def test_neighbours_change_nothing(context, parameters):
    compare(context=context, together=(2, 5, 16), parameters=parameters)


@pytest.mark.filterwarnings("ignore:read one row after another")
@pytest.mark.parametrize("architecture", [name for name in CONFIGS | EXPERTS if name != "llama"])
@pytest.mark.parametrize("context", [Overlapping(16, 40), TransformerXL(16, 24)], ids=str)
@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2)], ids=str)
def test_every_architecture(architecture, context, parameters):
    if context.memory is not None and architecture not in [*WITH_MEMORY, *EXPERTS]:
        pytest.skip("absolute positions carry no memory")
    compare(architecture, context, parameters=parameters)


RULES = {
    "ASGD": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 0.01},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "amsgrad": True},
    "Adamax": {"lr": 1e-3},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 1e-4},
    "SGD": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("rule", RULES)
def test_every_elementwise_rule(rule):
    compare(update=partial(getattr(torch.optim, rule), **RULES[rule]))


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_krauses_rule(decay, monkeypatch):
    from dynlight import GradientStatistics

    statistics = GradientStatistics(data={"path": "text", "data_files": "x"})
    monkeypatch.setattr(
        "dynlight.learning.module.load_or_collect",
        lambda *_, model, **__: [torch.full_like(p, 0.01).add_(i) for i, p in enumerate(model.parameters())],
    )
    compare(update=partial(RMSDynamic, lr=0.05, decay=decay, epsilon=0.01, statistics=statistics))


@pytest.mark.parametrize(
    "schedule", [UpdateFrequency(every=2), UpdateFrequency(every={0: 1, 2: 3}), UpdateFrequency(passes=2)], ids=str
)
def test_every_schedule(schedule):
    compare(schedule=schedule, update=partial(torch.optim.AdamW, lr=1e-3))


def test_windows_that_begin_with_the_prefix():
    compare(context=Overlapping(16, 40, prefix=True))
    compare(context=Overlapping(16, 16, prefix=True))


def test_clipping_is_per_document():
    compare(clip=0.05)


def test_static_evaluation():
    compare(update=None)
    compare(update=partial(torch.optim.AdamW, lr=0.0))


@pytest.mark.parametrize(
    ("parameters", "update", "at_most"),
    [
        pytest.param(All(), SGD, 0.8, marks=pytest.mark.exhaustive),
        pytest.param(LoRA(rank=4), partial(torch.optim.Adam, lr=3e-3), 0.9, marks=pytest.mark.exhaustive),
        (LoRA(rank=4), partial(torch.optim.SGD, lr=0.3), 2.0),  # unstable: worse than static
    ],
    ids=["all", "lora", "unstable"],
)
@pytest.mark.slow
def test_errors_do_not_grow_over_300_segments(parameters, update, at_most):
    """Real text, and rates at which learning changes much, so that a difference in the last bit would show."""
    tiny_books = Pretrained("tiny-books")
    text = inspect.getsource(argparse)
    tokens = tokenize(text, tiny_books.load_tokenizer())[0].tolist()
    documents = [tokens[: 300 * 4], tokens[5000:5400], tokens[9000:9037]]
    choices = {"parameters": parameters, "update": update, "reference": "static"}
    alone = run(tiny_books.load(), documents, TransformerXL(4, 64), **choices)
    beside = run(tiny_books.load(), documents, TransformerXL(4, 64), together=2, **choices)
    for one, other in zip(alone.nats, beside.nats, strict=True):
        assert float(torch.cat(one).double().sum()) == pytest.approx(float(torch.cat(other).double().sum()), rel=1e-5)
    learned, static = torch.cat(alone.nats[0]).sum(), torch.cat(alone.static[0]).sum()
    assert abs(1 - learned / static) > 0.1, "the rate must matter"
    assert learned < at_most * static


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:read one row after another")
@pytest.mark.parametrize("architecture", CONFIGS | EXPERTS)
@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2)], ids=str)
def test_no_architecture_drifts_over_300_segments(architecture, parameters):
    """At a rate that changes the nats of a token by a tenth of a nat and more."""
    context = TransformerXL(4, 12) if architecture in [*WITH_MEMORY, *EXPERTS] else Overlapping(4, 16)
    documents = [random_tokens(length, seed) for seed, length in enumerate((1200, 400, 37, 1100, 90, 203))]
    choices = {"update": partial(torch.optim.SGD, lr=0.02 if parameters.are_adapters else 0.03), "reference": "static"}
    choices |= {"parameters": parameters}
    alone = run(tiny(architecture), documents, context, **choices)
    assert (torch.cat(alone.nats[0]) - torch.cat(alone.static[0])).abs().mean() > 0.1
    for together in (2, 5, 16):
        beside = run(tiny(architecture), documents, context, together=together, **choices)
        for one, other in zip(beside.nats, alone.nats, strict=True):
            assert float(torch.cat(one).double().sum()) == pytest.approx(
                float(torch.cat(other).double().sum()), rel=1e-5
            )


def test_order_and_neighbours_change_nothing():
    order = [6, 0, 3, 1, 7, 2, 5, 4]
    straight = run(tiny(), DOCUMENTS, TransformerXL(16, 24), together=3, update=SGD)
    permuted = run(tiny(), [DOCUMENTS[i] for i in order], TransformerXL(16, 24), together=4, update=SGD)
    assert_same(permuted.nats, [straight.nats[i] for i in order])


def test_a_finished_document_costs_nothing(tmp_path):
    counts = []
    for lengths in ((160, 16, 16, 16), (160,), (16,)):
        records = Records()
        run(
            tiny(),
            [random_tokens(length, 5) for length in lengths],
            Overlapping(16, 16),
            together=4,
            update=SGD,
            callbacks=[records],
        )
        counts.append(records.segments.flops.sum())
    assert counts[0] == 13 * counts[2]
    assert counts[1] == 10 * counts[2]


@pytest.mark.parametrize("context", [Overlapping(16, 40), TransformerXL(16, 24)], ids=str)
def test_rows_are_those_of_one_at_a_time(context):
    tables = []
    for together in (1, 3, 5):
        records = Records()
        run(tiny(), DOCUMENTS, context, together=together, update=SGD, callbacks=[records], reference="static")
        tables.append((records.segments, records.tokens, records.documents))
    alone, beside, other = tables
    for one, two, three in zip(alone, beside, other, strict=True):
        exact = [column for column in one.columns if "nats" not in column and "seconds" not in column]
        assert two[exact].equals(three[exact])  # whoever the neighbours are
        exact = [column for column in exact if "flops" not in column]
        assert one[exact].equals(two[exact])
    whole, flops = alone[0].tokens == 16, ["flops", "update_flops", "static_flops"]
    assert alone[0][whole][flops].equals(beside[0][whole][flops])
    # What is filled in costs what it costs: as much as a whole segment, or a power of two of tokens.
    filled = beside[0].set_index(["document", "segment"]).flops
    assert filled[1, 2] == filled[0, 2] == filled[3, 2]  # 1, 16 and 16 tokens
    assert filled[7, 0] == filled[3, 0]  # 15 and 16 tokens, at the start
    assert filled[2, 0] == alone[0].set_index(["document", "segment"]).flops[2, 0]  # one token, which is one


# Last segments of every length; documents shorter than one.
RAGGED = [random_tokens(length, seed) for seed, length in enumerate((33, 34, 35, 47, 48, 49, 17, 1, 2, 3, 7, 9, 15))]


@pytest.mark.parametrize(
    "context",
    [Overlapping(16, 16), Overlapping(16, 20), Overlapping(16, 48), TransformerXL(16, 0), TransformerXL(16, 24)],
    ids=str,
)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"parameters": LoRA(rank=2), "update": partial(torch.optim.AdamW, lr=1e-3)},
        {"schedule": UpdateFrequency(every=2, passes=2), "clip": 0.05},
        {"rates": [0.01, 0.1]},
    ],
    ids=["plain", "adapters", "passes", "rates"],
)
@pytest.mark.slow
def test_rows_that_are_filled_score_what_they_score_alone(context, choices):
    if "rates" in choices:
        choices = choices | {"update": torch.optim.SGD}
    compare(context=context, together=(5,), documents=RAGGED, **choices)


class FillWith(Callback):
    """Fills in other tokens."""

    def __init__(self, token):
        self.token = token

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for row, columns in enumerate(batch.scored):
            batch.inputs[row, batch.cut.context + columns.stop :] = self.token


@pytest.mark.parametrize("context", [Overlapping(16, 48), TransformerXL(16, 24)], ids=str)
@pytest.mark.parametrize("update", [SGD, partial(torch.optim.AdamW, lr=1e-3)], ids=["SGD", "AdamW"])
def test_what_is_filled_in_changes_nothing(context, update):
    nats, weights = [], []
    for token in (0, 60):
        found = run(tiny(), RAGGED[:6], context, [FillWith(token)], together=6, update=update)
        nats.append(torch.cat([each for segments in found.nats for each in segments]))
        weights.append(torch.cat([weight.flatten() for weight in found.module.weights.learned]))
    assert torch.equal(*nats)
    assert torch.equal(*weights)


def test_documents_that_are_filled_alike_are_in_a_wave():
    documents = [document(tokens, index) for index, tokens in enumerate(RAGGED)]
    lengths = [[len(each) for each in wave] for wave in waves(documents, TransformerXL(16, 24), together=4)]
    assert lengths == [[49, 48, 47, 35], [34, 33, 17, 15], [9], [7], [3], [2], [1]]
    for wave in waves(documents, Overlapping(12, 24), together=4):
        for segment in segments(wave, Overlapping(12, 24), fills=True):
            columns = segment.targets.shape[1]
            assert columns <= 12
            assert all(columns < 2 * len(each) for each in segment.documents)


class FailAt(Callback):
    """Poisons the weights of one row of a wave after its first segment."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.cut.index == 0 and batch.documents[0].index == 0:
            with torch.no_grad():
                pl_module.weights.learned[0][1].fill_(float("nan"))


def test_a_document_that_fails_leaves_its_neighbours_alone():
    documents = [random_tokens(64, seed) for seed in range(3)]
    whole = run(tiny(), documents, TransformerXL(16, 24), together=3, update=SGD)
    found = run(tiny(), documents, TransformerXL(16, 24), together=3, update=SGD, callbacks=[FailAt()])
    assert stopped(found.module) == {1: 1}
    assert len(found.nats[1]) == 1
    assert_same([found.nats[0], found.nats[2]], [whole.nats[0], whole.nats[2]])
    assert found.module.totals.read.tokens == 64 + 64


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"reset": ResetWeights("never")}, "data.together must be 1 with reset.every never"),
        ({"update": partial(torch.optim.Adafactor, lr=0.1)}, "treats each weight by itself .* got Adafactor"),
    ],
)
def test_what_cannot_be_done_together_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), DOCUMENTS, TransformerXL(16, 24), together=2, **({"update": SGD} | choices))


def test_what_is_read_one_row_after_another_is_said():
    with pytest.warns(UserWarning, match="read one row after another, .*: MixtralExperts, MixtralTopKRouter$"):
        run(tiny("mixtral"), DOCUMENTS, TransformerXL(16, 24), together=2, update=SGD)


class MixesRows(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.roll(1, 0))


@pytest.mark.parametrize("update", [None, SGD])
def test_a_model_that_mixes_rows_reads_each_alone(update):
    def mixing():
        model = tiny()
        model.model.layers[1].mlp.down_proj.__class__ = MixesRows
        return model

    alone = run(mixing(), DOCUMENTS, TransformerXL(16, 24), update=update).nats
    with pytest.warns(UserWarning, match="read one row after another, .* llama, whose logits of a row are .* apart"):
        together = run(mixing(), DOCUMENTS, TransformerXL(16, 24), together=2, update=update).nats
    for one, other in zip(alone, together, strict=True):
        for mine, its in zip(one, other, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


class KeepsWhatItReads(torch.nn.Linear):
    """Adds nothing of what it has read before, but with a gradient."""

    before = 0.0

    def forward(self, x):
        y = super().forward(x)
        found = y + 0 * self.before
        self.before = y.sum()
        return found


def test_a_model_that_cannot_be_learned_from_twice_is_refused_by_name():
    model = tiny()
    model.model.layers[1].mlp.down_proj.__class__ = KeepsWhatItReads
    with pytest.raises(ValueError, match=r"data.together must be 1, .* for llama, which cannot be read so .* got 2"):
        run(model, DOCUMENTS, TransformerXL(16, 24), together=2, update=SGD)


@pytest.mark.parametrize(
    ("architecture", "attention"), [("gemma2", "eager"), ("gpt_oss", "eager"), ("gemma4", "sdpa"), ("gemma4", "eager")]
)
def test_attention_is_the_models_own_whatever_it_is_given(architecture, attention):
    """Against one plain forward of transformers over each document, which the window holds as a whole."""
    documents, context = [random_tokens(length, length) for length in (70, 33, 64)], Overlapping(16, 96)
    model = tiny(architecture, attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(0, 2, len(parameter)))  # sinks and norms too
        plain = [
            model(torch.tensor([[0, *document[:-1]]])).logits[0].log_softmax(-1)[range(len(document)), document]
            for document in documents
        ]
    found = run(model, documents, context, together=3, parameters=LoRA(rank=2), update=SGD, reference="static")
    for static, nats, expected in zip(found.static, found.nats, plain, strict=True):
        torch.testing.assert_close(torch.cat(static), -expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(torch.cat(nats), -expected, rtol=1e-3), "the rate must matter"


def test_mixtures_read_each_row_by_the_models_own_attention():
    documents, context = [random_tokens(length, length) for length in (70, 33)], Overlapping(16, 96)
    choices = {"parameters": LoRA(rank=2), "update": torch.optim.SGD, "reference": "static"}
    mixed = run(tiny("gemma2", attention="eager"), documents, context, rates=[0.05, 0.2], together=2, **choices)
    alone = run(tiny("gemma2", attention="eager"), documents, context, rates=[0.05, 0.2], **choices)
    assert_same(mixed.nats, alone.nats)


@pytest.mark.parametrize("copies", [False, True], ids=["the same", "a copy"])
def test_a_model_may_be_read_together_again(copies):
    model = tiny()
    first = run(model, DOCUMENTS, TransformerXL(16, 24), together=3, update=SGD, reference="static")
    model = copy.deepcopy(model) if copies else model
    again = run(model, DOCUMENTS, TransformerXL(16, 24), together=3, update=SGD, reference="static")
    alone = run(model, DOCUMENTS, TransformerXL(16, 24), update=SGD, reference="static")
    assert_same(again.nats, first.nats)
    assert_same(again.nats, alone.nats)
