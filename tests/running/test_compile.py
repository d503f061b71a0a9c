"""`model.compile` and `model.attention`: what is configured is done, to the same numbers, or refused by name."""

import pandas as pd
import pytest
import torch
import yaml
from folders import configuration

from dynlight import fit

RATES = {"rates": [0.01, 0.1], "update": {"class_path": "SGD"}}
SHARDED = {"trainer": {"accelerator": "cpu", "devices": 2, "strategy": "model_parallel"}}


@pytest.fixture
def run(library, tmp_path, capsys):
    """Runs a configuration with these changes, some of them of a section; its status, and what was said."""

    def run(out="out", **changes):
        config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / out)
        for name, value in changes.items():
            config[name] = config[name] | value if name in ("model", "data") else value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        status = fit.main(["--config", str(tmp_path / "run.yaml")])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def compiled(monkeypatch):
    """Forwards that ran through `torch.compile`, by a backend that needs no compiler."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend=backend, dynamic=True))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [{}, {"context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 32}}, "reference": None}],
    ids=["memory", "windows"],
)
def test_a_compiled_model_scores_the_same(run, tmp_path, compiled, choices):
    assert run("plain", **choices)[0] == 0
    assert not compiled
    assert run("compiled", model={"compile": True}, **choices)[0] == 0
    assert compiled
    plain, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("plain", "compiled"))
    assert other.nats.tolist() == pytest.approx(plain.nats.tolist(), rel=1e-5)
    exact = [column for column in plain if "nats" not in column]
    assert other[exact].equals(plain[exact])


@pytest.mark.parametrize(
    ("choices", "where"),
    [
        ({"data": {"together": 2}}, "where each document or rate has a row of its own"),
        (RATES, "where each document or rate has a row of its own"),
        (SHARDED, "with trainer.strategy model_parallel"),
    ],
    ids=["together", "rates", "model_parallel"],
)
def test_where_a_model_is_not_run_as_a_whole_compile_is_refused_by_name(run, tmp_path, choices, where):
    status, error = run(model={"compile": True}, **choices)
    assert (status, error) == (2, f"error: model.compile must be false {where}, got true\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choices", "where"),
    [({"data": {"together": 2}}, "where data.together is 2"), (RATES, "in a mixture")],
    ids=["together", "rates"],
)
def test_where_all_rows_are_read_by_one_kernel_another_is_refused_by_name(run, tmp_path, choices, where):
    status, error = run(model={"attention": "eager"}, **choices)
    assert status == 2
    assert error.startswith(
        f"error: model.attention must be sdpa {where}, where all rows are read by one kernel, got eager"
    )
    assert not (tmp_path / "out").exists()


def test_alone_a_document_is_read_by_the_kernel_that_was_chosen(run, tmp_path):
    assert run("sdpa")[0] == run("eager", model={"attention": "eager"})[0] == 0
    one, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("sdpa", "eager"))
    assert other.nats.tolist() == pytest.approx(one.nats.tolist(), rel=1e-4)
    assert other.nats.tolist() != one.nats.tolist(), "they add in another order"
