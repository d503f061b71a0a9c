"""`model_parallel`: a model in parts in two processes scores and learns as it does whole in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from folders import configuration, save_model, save_sentences
from processes import run_all

from dynlight import fit
from dynlight.auditing.replay import replay
from dynlight.learning.digests import sums_of_bits
from dynlight.recording.ledger import faults_of

TEXTS = {"a": 22, "b": 5, "c": 13, "d": 0, "e": 1}  # sentences in each file
TWO = {"accelerator": "cpu", "devices": 2, "strategy": "model_parallel"}


def lora(rank):
    return {"class_path": "LoRA", "init_args": {"rank": rank}}


def rule(name, **settings):
    return {"class_path": name, "init_args": settings}


CASES = {
    "sgd": {},
    "adam_w": {"update": rule("AdamW", lr=0.003), "clip": 0.5, "schedule": {"every": 2}},
    "never": {"update": rule("SGD", lr=0.1, momentum=0.5), "clip": 0.3, "reset": {"every": "never"}},
    "passes": {
        "parameters": {"class_path": "Matching", "init_args": {"names": "mlp", "blocks": [-2, -1]}},
        "update": rule("SGD", lr=1.0),
        "schedule": {"every": {0: 1, 3: 2}, "passes": 2},
        "on_failure": "static",
    },
    "lora": {"parameters": lora(1), "update": rule("Adam", lr=0.01)},  # of one row, so one process has nothing of it
    "half": {"model": {"dtype": "bfloat16"}, "parameters": lora(2), "update": rule("SGD", lr=1.0)},
    "static": {"update": None},
    "failing": {"update": rule("SGD", lr=1e6)},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    root = tmp_path_factory.mktemp("library")
    # 301 rows cannot be cut in two equal parts.
    save_model(root / "model", byte_tokenizer, rows=301)
    save_sentences(root / "documents", TEXTS)
    return root


@pytest.fixture(scope="module")
def runs(library, tmp_path_factory):
    """Each case in two processes and in one: the folder of all, and the exit statuses of both, by name."""
    folder = tmp_path_factory.mktemp("runs")
    configs, alone = {}, {}
    for name, changes in CASES.items():
        config = configuration(library / "model", f"{library}/documents/*.txt", folder / "two" / name)
        for setting, value in changes.items():
            config[setting] = config["model"] | value if setting == "model" else value
        held = {"class_path": "meddling.CountHeld", "init_args": {"folder": str(folder), "name": name}}
        one = config | {"trainer": {"accelerator": "cpu", "callbacks": [held]}, "out": str(folder / "one" / name)}
        (folder / "one.yaml").write_text(yaml.safe_dump(one))
        alone[name] = fit.main(["--config", str(folder / "one.yaml")])
        configs[name] = config | {"trainer": TWO | {"callbacks": [held]}}
    return folder, alone, run_all(folder, 2, configs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(runs, name):
    folder, alone, statuses = runs
    assert [each[name] for each in statuses] == [alone[name], 0]
    two, one = (pd.read_parquet(folder / kind / name / "segments.parquet") for kind in ("two", "one"))
    exact = [column for column in one.columns if "nats" not in column]
    assert two[exact].equals(one[exact])
    for column in ("nats", "static_nats"):
        assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-5)
    if name not in ("static", "failing"):
        assert two.nats.sum() < 0.999 * two.static_nats.sum(), "what is learned must matter"


@pytest.mark.slow
def test_summaries_are_those_of_one_process(runs):
    folder, _, _ = runs
    for name in CASES:
        two, one = (json.loads((folder / kind / name / "run.json").read_text()) for kind in ("two", "one"))
        assert (two.pop("processes"), one.pop("processes")) == (2, 1)
        for key in ("parameters", "learned_parameters", "documents", "protocol", "together"):
            assert two[key] == one[key], key
        files = [{file.name for file in (folder / kind / name).iterdir()} for kind in ("two", "one")]
        assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "never"])
def test_each_process_holds_half(runs, name):
    folder, _, _ = runs
    (one,) = (json.loads(file.read_text()) for file in folder.glob(f"{name}.0.1.held"))
    for rank in range(2):
        held = json.loads((folder / f"{name}.{rank}.2.held").read_text())
        for kind in ("weights", "initial", "optimizer"):
            assert 0.4 * one[kind] <= held[kind] <= 0.6 * one[kind] + 64, kind
        kept = one["weights"] + one["initial"] + one["optimizer"]
        assert held["all"] < 0.62 * kept, "no gathered weight is left: beside its half there is but memory"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "never", "lora", "half"])
def test_the_receipt_is_that_of_one_process(runs, name):
    folder, _, _ = runs
    two, one = (json.loads((folder / kind / name / "receipt.json").read_text()) for kind in ("two", "one"))
    assert two["hashes"]["model"] == one["hashes"]["model"]
    assert faults_of(two) == []
    assert [row[:3] for row in two["ledger"]] == [row[:3] for row in one["ledger"]]
    assert two["ledger"][0][4] == one["ledger"][0][4], "a digest of parts is that of the whole"
    assert len({row[5] for row in two["ledger"]}) > 5


@pytest.mark.slow
def test_the_receipt_can_be_played_again_on_one_device(runs):
    folder, _, _ = runs
    assert replay(folder / "two" / "sgd", documents="1").agrees


def test_what_parts_add_to_a_digest_is_that_of_the_whole():
    weight = torch.randn(1, 301)
    for cuts in ([150, 151], [1, 300], [101, 101, 99], [301, 0]):
        starts = torch.tensor([0, *cuts]).cumsum(0).tolist()
        parts = zip(weight.split(cuts, dim=1), starts, strict=False)
        assert sum(sums_of_bits(part.flatten().clone()[None], start) for part, start in parts) == sums_of_bits(weight)


@pytest.mark.slow
def test_one_process_prints(runs):
    folder, _, _ = runs
    assert (folder / "0.out").read_text().count("report  ") == len(CASES)
    assert (folder / "1.out").read_text() == " ".join(["0"] * len(CASES)) + "\n"
    assert (folder / "1.err").read_text() == ""


# The command itself, which starts the other process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "every", "kept"),
    [(1, "document", 2), pytest.param(0, "never", 0, marks=pytest.mark.exhaustive)],
)
def test_a_run_that_was_cut_short_goes_on(library, tmp_path, rank, every, kept):
    callback = {"class_path": "meddling.FailIn", "init_args": {"rank": rank, "segment": 25}}
    config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out")
    config |= {"trainer": TWO | {"callbacks": [callback]}, "reset": {"every": every}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cut = command(tmp_path, "--config", "run.yaml")
    assert cut.returncode != 0
    assert (tmp_path / "failed").exists()
    done = command(tmp_path, "--resume", "out")
    assert done.returncode == 0, done.stderr
    assert f"resume: {kept} of 5 documents are kept, and the others read from their start" in done.stderr
    config |= {"trainer": {"accelerator": "cpu"}, "out": str(tmp_path / "one")}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "one.yaml")]) == 0
    two, one = (pd.read_parquet(tmp_path / out / "segments.parquet") for out in ("out", "one"))
    assert two[["document", "segment"]].equals(one[["document", "segment"]])
    assert two.nats.tolist() == pytest.approx(one.nats.tolist(), rel=1e-5)
    assert faults_of(json.loads((tmp_path / "out/receipt.json").read_text())) == []


def command(folder, *arguments):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    environment.pop("LOCAL_RANK", None)
    start = [sys.executable, "-m", "dynlight.fit", *arguments]
    return subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
