"""A teacher reads the same windows: beside, as what is learned from, and as an expert of the mixture."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from folders import configuration, save_documents, save_model
from models import LLAMA, tiny
from running import Experts, random_tokens, run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from dynlight import (
    Distilled,
    LoRA,
    Matching,
    Mixture,
    NextToken,
    Overlapping,
    Records,
    SettingError,
    TransformerXL,
)
from dynlight.choices.objective import Forward
from dynlight.learning.forward import Guide, divergences
from dynlight.running.run import Run

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((70, 33, 1, 64, 16))]
WINDOWS, MEMORY = Overlapping(16, 40), TransformerXL(16, 24, sinks=3)
RATE = 0.1
SGD = partial(torch.optim.SGD, lr=RATE)


def teacher(**changes):
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**(LLAMA | {"hidden_size": 48, "num_hidden_layers": 2} | changes))
    )


class Taught(Experts):
    """Keeps what the teacher says of each token, by document."""

    def __init__(self):
        super().__init__()
        self.teacher = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        score = pl_module.score
        for row in score.rows if score else ():
            nats = score.teacher_nats[row, batch.scored[row]]
            self.teacher.setdefault(batch.documents[row].index, []).append(nats)


def test_numbers_by_hand():
    q, p = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    apart = divergences(p.log()[None, None], Guide(q.log()[None, None]))
    assert apart.item() == pytest.approx((q * (q / p).log()).sum().item())
    soft_q, soft_p = ((each.sqrt() / each.sqrt().sum()) for each in (q, p))
    apart = divergences(p.log()[None, None], Guide(q.log()[None, None], temperature=2.0))
    assert apart.item() == pytest.approx((soft_q * (soft_q / soft_p).log()).sum().item())
    nats, scored = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[True, True, False]])
    read = Forward(nats, scored, nats, torch.tensor([[0.5, 0.1, 9.0]]))
    assert Distilled(0.25, temperature=3.0).losses(read).tolist() == pytest.approx([0.75 * 2 + 0.25 * 9 * 0.3])


def learned_by_the_loop(tokens, share, temperature):
    model, teaching = tiny(), teacher()
    weights = list(model.parameters())
    optimizer, sequence, nats = torch.optim.SGD(weights, lr=RATE), torch.tensor([0, *tokens]), []
    for start in range(0, len(tokens), 16):
        stop = min(start + 16, len(tokens))
        inputs, targets = sequence[None, max(0, stop - 40) : stop], sequence[start + 1 : stop + 1]
        logits, guide = (
            each(input_ids=inputs, use_cache=False).logits[0, start - stop :] for each in (model, teaching)
        )
        of_tokens = F.cross_entropy(logits, targets, reduction="none")
        nats.append(of_tokens.detach())
        p, q = (F.softmax(each / temperature, -1) for each in (logits, guide.detach()))
        apart = (q * (q.log() - p.log())).sum(-1)
        optimizer.zero_grad()
        ((1 - share) * of_tokens + share * temperature**2 * apart).mean().backward()
        optimizer.step()
    return torch.cat(nats)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_distilling_equals_a_loop(share, temperature, together):
    choices = {"update": SGD, "objective": Distilled(share, temperature), "teacher": teacher()}
    found = run(tiny(), DOCUMENTS, WINDOWS, together=together, **choices)
    for tokens, mine in zip(DOCUMENTS, found.nats, strict=True):
        theirs = learned_by_the_loop(tokens, share, temperature)
        torch.testing.assert_close(torch.cat(mine), theirs, rtol=1e-4, atol=1e-4)
        assert float(torch.cat(mine).sum()) == pytest.approx(float(theirs.sum()), rel=1e-5)


@pytest.mark.parametrize("context", [WINDOWS, MEMORY], ids=str)
@pytest.mark.parametrize("parameters", [Matching("mlp"), LoRA(rank=2)], ids=str)
def test_a_share_of_0_learns_as_without_a_teacher(context, parameters):
    read = partial(run, documents=DOCUMENTS, context=context, parameters=parameters, update=SGD)
    without = read(tiny(), objective=NextToken())
    beside = read(tiny(), objective=Distilled(share=0.0), teacher=teacher())
    for mine, other in zip(beside.nats, without.nats, strict=True):
        assert all(torch.equal(each, same) for each, same in zip(mine, other, strict=True))


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("context", [WINDOWS, MEMORY], ids=str)
def test_its_score_is_that_of_a_static_run(context, together):
    taught = Taught()
    run(tiny(), DOCUMENTS, context, [taught], together=together, update=SGD, teacher=teacher())
    alone = run(teacher(), DOCUMENTS, context)
    for index, nats in taught.teacher.items():
        torch.testing.assert_close(torch.cat(nats), torch.cat(alone.nats[index]), rtol=1e-4, atol=1e-5)


def test_it_may_be_an_expert():
    experts = Experts()
    choices = {
        "update": torch.optim.SGD,
        "rates": [0.01, RATE],
        "mixture": Mixture(teacher=True),
        "reference": "static",
    }
    found = run(tiny(), DOCUMENTS, MEMORY, [experts], together=4, teacher=teacher(), **choices)
    assert [expert.name for expert in found.module.experts] == ["static", "teacher", "SGD(lr 0.01)", "SGD(lr 0.1)"]
    alone = run(teacher(), DOCUMENTS, MEMORY)
    for index, nats in experts.nats.items():
        own = np.concatenate(nats, axis=1)
        np.testing.assert_allclose(own[1], torch.cat(alone.nats[index]).numpy(), rtol=1e-4, atol=1e-5)
        mixed = torch.cat(found.nats[index]).sum()
        assert mixed <= own.sum(axis=1).min() + math.log(4) + 0.01 * own.shape[1]


@pytest.mark.flops
def test_its_cost_stands_apart():
    records, without, own = Records(), Records(), Records()
    run(tiny(), DOCUMENTS, MEMORY, [records], update=SGD, reference="static", teacher=teacher())
    run(tiny(), DOCUMENTS, MEMORY, [without], update=SGD, reference="static")
    run(teacher(), DOCUMENTS, MEMORY, [own])
    assert records.segments.flops.tolist() == without.segments.flops.tolist()
    assert records.segments.teacher_flops.tolist() == own.segments.flops.tolist()
    np.testing.assert_allclose(records.segments.teacher_nats, own.segments.nats, rtol=1e-5)
    assert records.segments.nats.tolist() == without.segments.nats.tolist()


class MixesRows(torch.nn.Linear):
    """As a model may whose experts have room for so many tokens: what one row reads depends on the others."""

    def forward(self, x):
        return super().forward(x + 0.1 * x.mean(dim=0, keepdim=True))


@pytest.mark.filterwarnings("ignore:.*read one document after another")
def test_a_teacher_that_mixes_rows_reads_one_document_after_another():
    sums = []
    for together in (1, 3):
        taught, mixing = Taught(), teacher()
        mixing.model.layers[1].mlp.down_proj.__class__ = MixesRows
        run(
            tiny(), DOCUMENTS, MEMORY, [taught], together=together, update=SGD, teacher=mixing, objective=Distilled(0.5)
        )
        sums.append([float(torch.cat(nats).sum()) for _, nats in sorted(taught.teacher.items())])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_one_that_fails_ends_no_document_that_does_not_learn_from_it():
    broken = teacher()
    broken.lm_head.weight.data[5] = math.nan
    beside = run(tiny(), DOCUMENTS, MEMORY, update=SGD, teacher=broken)
    without = run(tiny(), DOCUMENTS, MEMORY, update=SGD)
    assert not beside.module.failures.of_documents
    assert float(torch.cat(beside.nats[0]).sum()) == float(torch.cat(without.nats[0]).sum())


def test_it_reads_without_dropout():
    learner = tiny()
    module_of = partial(run, learner, DOCUMENTS, WINDOWS, teacher=tiny("gpt2").train(), update=SGD)
    assert not module_of().module.teacher_model.training


def test_the_model_is_not_its_own_teacher():
    model = tiny()
    with pytest.raises(SettingError, match="teacher must be another model"):
        run(model, DOCUMENTS, MEMORY, update=SGD, teacher=model)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"objective": Distilled()}, "teacher must be given with objective Distilled, got null"),
        ({"mixture": Mixture(teacher=True)}, "teacher must be given with mixture.teacher true, got null"),
        (
            {"teacher": teacher(vocab_size=70)},
            "teacher.pretrained must predict the 61 tokens that the model does, got 70",
        ),
        (
            {"teacher": tiny("gpt2")},
            "teacher.pretrained must be a model that can be read in this context, got gpt2; context.class_path must be Overlapping",
        ),
    ],
)
def test_what_cannot_be_is_refused(choices, message):
    with pytest.raises(SettingError, match=message):
        run(tiny(), DOCUMENTS, MEMORY, update=SGD if "mixture" not in choices else None, **choices)


@pytest.mark.parametrize(("share", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, math.inf)])
def test_numbers_out_of_range_are_refused(share, temperature):
    with pytest.raises(SettingError, match=r"objective\.(share|temperature) must be"):
        Distilled(share, temperature)


def test_another_tokenizer_is_refused(tmp_path, byte_tokenizer, word_tokenizer):
    save_model(tmp_path / "model", byte_tokenizer, "llama")
    save_model(tmp_path / "teacher", word_tokenizer, "llama")
    config = configuration(tmp_path / "model", save_documents(tmp_path / "documents"), tmp_path / "out")
    chosen = {"class_path": "Pretrained", "init_args": {"pretrained": str(tmp_path / "teacher")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"teacher": chosen}))
    with pytest.raises(
        SettingError, match=r"teacher.pretrained must have the tokenizer of model.pretrained, got .*teacher"
    ):
        Run.of(["--config", str(tmp_path / "run.yaml")]).module()
