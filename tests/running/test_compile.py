"""`model.compile` and `model.attention`: what is configured is done, to the same numbers, or refused by name."""

import shutil

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

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: original(function, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what Dynamo itself does
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 32}}, "reference": None},
        {"data": {"together": 2}},
        {"data": {"together": 2}, "parameters": {"class_path": "LoRA"}},
        RATES,
    ],
    ids=["memory", "windows", "together", "adapters", "rates"],
)
def test_a_compiled_model_scores_the_same(run, tmp_path, compiled, choices):
    assert run("plain", **choices)[0] == 0
    assert not compiled
    assert run("compiled", model={"compile": True}, **choices)[0] == 0
    assert compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["unimplemented"], "a shape ran uncompiled"
    plain, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("plain", "compiled"))
    assert other.nats.tolist() == pytest.approx(plain.nats.tolist(), rel=1e-5)
    exact = [column for column in plain if "nats" not in column]
    assert other[exact].equals(plain[exact])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, with which torch compiles for a CPU")
@pytest.mark.parametrize("how", [True, pytest.param("reduce-overhead", marks=pytest.mark.exhaustive)])
def test_a_model_compiled_by_inductor_scores_the_same(run, tmp_path, how):
    torch._dynamo.reset()
    choices = {"data": {"together": 2, "documents": 2, "max_tokens": 80}, "parameters": {"class_path": "LoRA"}}
    assert [run("plain", **choices)[0], run("compiled", model={"compile": how}, **choices)[0]] == [0, 0]
    plain, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("plain", "compiled"))
    assert other.nats.tolist() == pytest.approx(plain.nats.tolist(), rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_nats_and_memory_outlive_the_graph_that_made_them(run, tmp_path, compiled, monkeypatch):
    original, returned = torch.compile, []

    def writes_over(function, mode=None):
        """As a CUDA graph does: each call writes over what the last one returned."""
        call = original(function)

        def replay(*args):
            for tensor in returned:
                tensor.data.fill_(float("nan"))
            reading = call(*args)
            returned[:] = [reading.nats, *(tensor for layer in reading.memory for tensor in layer.values())]
            return reading

        return replay

    monkeypatch.setattr(torch, "compile", writes_over)
    choices = {"data": {"together": 2}}
    assert [run("plain", **choices)[0], run("graphed", model={"compile": "reduce-overhead"}, **choices)[0]] == [0, 0]
    assert returned
    plain, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("plain", "graphed"))
    assert other.nats.tolist() == pytest.approx(plain.nats.tolist(), rel=1e-5)


def test_parts_of_a_model_are_not_compiled_and_that_is_said(run, tmp_path):
    status, error = run(model={"compile": True}, **SHARDED)
    assert (status, error) == (2, "error: model.compile must be false with trainer.strategy model_parallel, got true\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("choices", [{"data": {"together": 2}}, RATES], ids=["together", "rates"])
def test_together_documents_are_read_by_the_kernel_that_was_chosen(run, tmp_path, choices):
    runs = [("sdpa", {}), ("eager", {"attention": "eager"})]
    assert [run(out, model=model, **choices)[0] for out, model in runs] == [0, 0]
    one, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("sdpa", "eager"))
    assert other.nats.tolist() == pytest.approx(one.nats.tolist(), rel=1e-4)
    assert other.nats.tolist() != one.nats.tolist(), "they add in another order"


def test_alone_a_document_is_read_by_the_kernel_that_was_chosen(run, tmp_path):
    assert run("sdpa")[0] == run("eager", model={"attention": "eager"})[0] == 0
    one, other = (pd.read_parquet(tmp_path / name / "segments.parquet") for name in ("sdpa", "eager"))
    assert other.nats.tolist() == pytest.approx(one.nats.tolist(), rel=1e-4)
    assert other.nats.tolist() != one.nats.tolist(), "they add in another order"
