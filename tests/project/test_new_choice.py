"""A new choice is one class in one file: here a context, a parameters choice and two rules that live outside of dynlight."""

import json
import sys

import pandas as pd
import pytest
import yaml
from folders import configuration, save_documents, save_model

from dynlight import fit

MINE = '''
"""Choices of a user."""

import torch
from dynlight import Context, Parameters, SettingError


class Disjoint(Context):
    """Each forward reads a segment alone, with nothing else in view."""

    def __init__(self, tokens: int) -> None:
        if tokens > 64:
            raise SettingError("context.tokens", "be at most 64", got=tokens)
        super().__init__(segment=tokens)

    def check(self, config) -> None:
        pass

    def __str__(self) -> str:
        return f"Disjoint({self.segment})"


class Norms(Parameters):
    """The norms learn."""

    def prepare(self, model) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)

    def __str__(self) -> str:
        return "norms"


class Signs(torch.optim.Optimizer):
    """A step of the gradient's sign."""

    def __init__(self, params, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad.sign(), alpha=group["lr"])


class Normed(Signs):
    """A step of the gradient by its norm, which couples what lies in one tensor."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad / weight.grad.norm(), alpha=group["lr"])
'''


@pytest.fixture
def run(tmp_path, byte_tokenizer, monkeypatch, capsys):
    """Runs a YAML that names the classes by their import path; they are gone afterwards."""
    (tmp_path / "users_choices.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    documents = save_documents(tmp_path / "documents")
    save_model(tmp_path / "model", byte_tokenizer)

    def run(together=1, tokens=16, rule="Signs", **changes):
        config = configuration(tmp_path / "model", documents, tmp_path / f"out{together}") | {
            "context": {"class_path": "users_choices.Disjoint", "init_args": {"tokens": tokens}},
            "parameters": {"class_path": "users_choices.Norms"},
            "update": {"class_path": f"users_choices.{rule}", "init_args": {"lr": 0.01}},
        }
        config["data"]["together"] = together
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | changes))
        status = fit.main(["--config", str(tmp_path / "run.yaml")])
        return status, capsys.readouterr()

    yield run
    sys.modules.pop("users_choices", None)


def test_they_run_from_a_yaml_alone_and_together(run, tmp_path):
    statuses = [run(together)[0] for together in (1, 4)]
    assert statuses == [0, 0]
    alone, together = (pd.read_parquet(tmp_path / f"out{n}/segments.parquet") for n in (1, 4))
    assert alone.updates.gt(0).all()
    assert together.nats.tolist() == pytest.approx(alone.nats.tolist(), rel=1e-5)
    assert together.nats.tolist() != pytest.approx(together.static_nats.tolist(), rel=1e-5), "something was learned"
    protocol = json.loads((tmp_path / "out1/run.json").read_text("utf-8"))["protocol"]
    assert protocol.startswith("context Disjoint(16) · learns norms · by Signs(lr 0.01)")


def test_a_rule_that_couples_documents_is_refused_by_name_where_they_are_together(run):
    assert run(rule="Normed")[0] == 0
    status, output = run(together=4, rule="Normed")
    assert status == 2
    assert output.err.startswith(
        "error: update.class_path must be a rule that treats each weight by itself where data.together is 4, got Normed; "
        "choose one of ASGD, Adadelta, Adagrad, Adam, AdamW, Adamax, NAdam, RAdam, RMSDynamic, RMSprop, Rprop, SGD, Signs"
    )


def test_what_they_refuse_is_said_in_one_line(run):
    status, output = run(tokens=65)
    assert (status, output.err) == (2, "error: context.tokens must be at most 64, got 65\n")


def test_they_stand_in_error_messages_and_in_the_help(run, capsys):
    run()
    _, output = run(context={"class_path": "Nothing"})
    assert output.err == "error: context.class_path must be TransformerXL, Overlapping or Disjoint, got Nothing\n"
    _, output = run(parameters={"class_path": "Nothing"})
    assert output.err == "error: parameters.class_path must be All, LoRA, Pruned, Matching or Norms, got Nothing\n"
    _, output = run(update={"class_path": "Nothing"})
    assert output.err.startswith(
        "error: update.class_path must be a class of torch.optim, RMSDynamic, Signs, Normed, or null"
    )
    assert fit.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "TransformerXL, Overlapping, Disjoint" in text
    assert "All, LoRA, Pruned, Matching, Norms" in text
    assert "torch.optim's, RMSDynamic, Signs, Normed" in text
