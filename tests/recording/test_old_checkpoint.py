"""A run that version 0.1.0 left unfinished goes on: its checkpoints kept the module's running sums thrice."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from folders import configuration
from meddling import StopAt

from dynlight import fit
from dynlight.errors import SettingError
from dynlight.recording.origin import Origin, settings_of
from dynlight.recording.sealed import seal, unseal
from dynlight.running import fitting

ROWS = ["segments.parquet", "tokens.parquet", "documents.csv", "receipt.json"]
SGD = {"class_path": "SGD", "init_args": {}}
CHOICES = {
    "alone": {},
    "together": {"together": 2, "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}}},
    "mixture": {"together": 2, "update": SGD, "rates": [0.02, 0.1]},
    "a document has stopped": {"update": {"class_path": "SGD", "init_args": {"lr": 1e6}}},
    "one is finished statically": {
        "update": {"class_path": "SGD", "init_args": {"lr": 1e6}},
        "together": 2,
        "on_failure": "static",
    },
}


@pytest.fixture
def run(library, tmp_path, monkeypatch, capsys):
    """Begins a run, or goes on with it, and stops it after so many segments; its status, and what was said."""
    monkeypatch.chdir(tmp_path)
    make_trainer = fitting.make_trainer

    def run(*arguments, stop=None):
        callbacks = [] if stop is None else [StopAt(stop)]
        monkeypatch.setattr(
            fitting, "make_trainer", lambda settings, meters, out: make_trainer(settings, [*callbacks, *meters], out)
        )
        return fit.main([*map(str, arguments)]), capsys.readouterr().err

    return run


def as_version_0_1_0_left_it(checkpoint, has_loggers):
    """Rewrites a checkpoint of today in the old form."""
    state = unseal(checkpoint)
    module, logged = state["module"], state["callbacks"]["FlopsLogger"]
    failures, totals = module.pop("failures"), module.pop("totals")
    module["log_weights"] = module.pop("predictor")
    module["failed"] = {document: each["segment"] for document, each in failures.items() if each["stopped"]}
    module["unlearned"] = {document: each["segment"] for document, each in failures.items() if not each["stopped"]}
    module["reasons"] = {document: each["reason"] for document, each in failures.items()}
    read = totals["read"]
    counts = {"tokens": read["tokens"], "bytes": read["bytes"]}
    if module["failed"]:  # it left nothing out of these sums
        counts = {name: count + 16 for name, count in counts.items()}
    module["adapted"] = {"nats": read["nats"]} | counts
    module["static"] = {"nats": read["static_nats"]} | counts
    nothing = dict.fromkeys(read, 0)
    logged |= totals if has_loggers else {"read": nothing, "whole": nothing, "running": {}}
    seal(checkpoint, state)


WITHOUT_LOGGERS = [("alone", False), ("a document has stopped", False)]


@pytest.mark.parametrize(("name", "has_loggers"), [*((name, True) for name in CHOICES), *WITHOUT_LOGGERS])
def test_a_run_of_version_0_1_0_goes_on_to_the_same_rows(run, library, tmp_path, name, has_loggers):
    choices, status = CHOICES[name], 3 if name == "a document has stopped" else 0
    config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out")
    config["data"]["together"] = choices.get("together", 1)
    config |= {setting: value for setting, value in choices.items() if setting != "together"}
    csv = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "csv"}}
    config["trainer"] = {"accelerator": "cpu", "logger": csv if has_loggers else False}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert run("--config", "run.yaml")[0] == status
    (tmp_path / "out").rename(tmp_path / "whole")
    if has_loggers:
        Path("logs").rename("logs of the whole")
    assert run("--config", "run.yaml", stop=6)[0] == 143
    (checkpoint,) = Path("out/unfinished").glob("rank0-*.sealed")
    as_version_0_1_0_left_it(checkpoint, has_loggers)
    assert run("--resume", tmp_path / "out", stop=2)[0] == 143  # what it writes then is of today's form
    ended, said = run("--resume", tmp_path / "out")
    assert (ended, "cannot be used" in said) == (status, False)
    for file in ROWS:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    summaries = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "out")]
    assert summaries[0]["nats"] == summaries[1]["nats"]
    if has_loggers:
        whole, out = (pd.read_csv(next(Path(logs).rglob("metrics.csv"))) for logs in ("logs of the whole", "logs"))
        series = [column for column in whole if "seconds" not in column]
        pd.testing.assert_frame_equal(whole[series], out[series], rtol=1e-12)


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_what_it_did(tmp_path):
    origin = Origin({"context.window": "40"}, [], 1, 1, done=[], hashes={}, loggers=[])
    origin.check_settings(tmp_path, {"context.window": "40", "context.prefix": "False"})
    with pytest.raises(SettingError, match="context.prefix must be False as when .* began, got True"):
        origin.check_settings(tmp_path, {"context.window": "40", "context.prefix": "True"})


def test_settings_that_came_since_have_no_say_in_whether_a_run_of_0_1_0_goes_on(tmp_path):
    added = {"context.sinks": "0", "model.gguf_file": "None"}
    origin = Origin({"context.memory": "256"}, [], 1, 1, done=[], hashes={}, loggers=[])
    origin.check_settings(tmp_path, {"context.memory": "256"} | added)
    with pytest.raises(SettingError, match="context.sinks must be 0 as when .* began, got 4"):
        origin.check_settings(tmp_path, {"context.memory": "256"} | added | {"context.sinks": "4"})


def test_a_class_without_settings_of_its_own_goes_on(tmp_path):
    given, read_back = {"class_path": "dynlight.All", "init_args": {}}, {"class_path": "dynlight.All"}
    began, goes_on = (settings_of({"parameters": section}) for section in (given, read_back))
    for earlier, later in ((began, goes_on), (goes_on, began)):
        Origin(earlier, [], 1, 1, done=[], hashes={}, loggers=[]).check_settings(tmp_path, later)
