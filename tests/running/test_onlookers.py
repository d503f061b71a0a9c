"""What only looks on costs no result: loggers, callbacks, the counter of FLOPs, the page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import wandb
import yaml
from folders import configuration

from dynlight import fit, report
from dynlight.learning.flops import EmptyModel
from dynlight.recording.report import page
from dynlight.running.onlookers import _HOOKS

CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}


@pytest.fixture
def run(library, tmp_path, monkeypatch, capsys):
    """Runs a configuration with these settings of the trainer; returns the exit status and what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def run(*arguments, out="out", checkpoint=..., **trainer):
        config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / out)
        config["trainer"] |= trainer
        config |= {} if checkpoint is ... else {"checkpoint": checkpoint}
        Path("run.yaml").write_text(yaml.safe_dump(config))
        status = fit.main([*(arguments or ("--config", "run.yaml"))])
        return status, capsys.readouterr().err

    return run


def summary(out="out"):
    return json.loads(Path(out, "summary.json").read_text())


@pytest.mark.page
def test_flops_that_cannot_be_counted_are_null_and_the_scores_as_ever(run, monkeypatch):
    assert run()[0] == 0
    monkeypatch.setattr(EmptyModel, "measure", lambda *shape: _no_such_kernel())
    with pytest.warns(UserWarning, match="FLOPs are not counted.*no such kernel") as said:
        status, _ = run(out="unknown", logger=CSV)
    assert status == 0
    assert len([each for each in said if "FLOPs" in str(each.message)]) == 1
    known, unknown = summary(), summary("unknown")
    assert [unknown[name] for name in ("flops", "forward_flops", "update_flops")] == [None, None, None]
    assert unknown["static"]["flops"] is None and known["static"]["flops"] > 0
    assert unknown["nats"] == known["nats"]
    rows = [pd.read_parquet(f"{out}/segments.parquet") for out in ("out", "unknown")]
    costs = [name for name in rows[0] if name.endswith("flops")]
    assert rows[1][costs].isna().all(axis=None) and not rows[0][costs].isna().any(axis=None)
    pd.testing.assert_frame_equal(*(each.drop(columns=costs) for each in rows))
    assert pd.read_csv("unknown/documents.csv").flops.isna().all()
    assert "not counted" in Path("unknown/report.html").read_text()
    assert "against FLOPs" not in Path("unknown/report.html").read_text()
    (logged,) = Path("logs").rglob("metrics.csv")
    assert "bits_per_byte" in (columns := pd.read_csv(logged).columns)
    assert not {"flops", "cost/update_flops"} & set(columns)


def _no_such_kernel():
    raise RuntimeError("no such kernel")


BEFORE = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start"]
DURING = ["on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward", "state_dict"]
AFTER = ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"]


def raising(hook):
    return [{"class_path": "onlookers.Raises", "init_args": {"hook": hook}}]


@pytest.fixture(scope="module")
def whole(library, tmp_path_factory):
    """A run without any callback."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = configuration(library / "model", f"{library}/documents/*.txt", folder)
    (file := folder.with_suffix(".yaml")).write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(file)]) == 0
    return folder


def assert_same_results(whole, out="out"):
    for name in ("segments.parquet", "tokens.parquet", "documents.csv"):
        assert (whole / name).read_bytes() == Path(out, name).read_bytes()
    assert summary(whole)["nats"] == summary(out)["nats"]
    assert {"report.html", "receipt.json"} <= {file.name for file in Path(out).iterdir()}


def test_these_are_all_hooks_in_which_a_callback_may_raise():
    others = {"on_sanity", "on_validation", "on_test", "on_predict", "checkpoint", "zero_grad", "optimizer_step"}
    hooks = {name for name in _HOOKS if not any(other in name for other in others)}
    assert hooks == {*BEFORE, *DURING, *AFTER, "on_exception"} - {"state_dict"}


@pytest.mark.parametrize("hook", BEFORE)
def test_what_raises_before_the_first_segment_is_refused(run, hook):
    status, said = run(callbacks=raising(hook))
    assert status == 2
    assert said.count("\n") == 1
    assert (
        f"error: trainer.callbacks must be what can run here, got Raises.{hook}: KeyError: 'no' (onlookers.py" in said
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("hook", DURING)
def test_what_raises_while_segments_are_read_stops_a_run_that_goes_on_without_it(run, whole, hook):
    status, said = run(callbacks=raising(hook), checkpoint={"minutes": 0.0001})
    resume, error = said.splitlines()
    assert status == 1
    assert resume == f"go on with: python -m dynlight.fit --resume {Path.cwd()}/out"
    assert error.startswith(
        f"error: trainer.callbacks must not raise, got Raises.{hook}: KeyError: 'no' (onlookers.py, "
    )
    assert error.endswith("; leave it out (--trainer.callbacks null)")
    status, _ = run("--resume", "out", "--trainer.callbacks", "null")
    assert status == 0
    assert_same_results(whole)


def test_a_callback_that_exits_and_a_state_that_no_checkpoint_holds_stop_the_run_too(run, whole):
    exits = [{"class_path": "onlookers.Raises", "init_args": {"hook": "on_train_batch_end", "exits": True}}]
    status, said = run(callbacks=exits)
    assert (status, "got Raises.on_train_batch_end: SystemExit: 0 (onlookers.py" in said) == (1, True)
    assert run("--resume", "out", "--trainer.callbacks", "null")[0] == 0
    assert_same_results(whole)
    status, said = run(out="second", callbacks=[{"class_path": "onlookers.Remembers"}], checkpoint={"minutes": 0.0001})
    must = "got Remembers.state_dict: TypeError: a checkpoint holds plain data and tensors, got float64 (sealed.py"
    assert (status, must in said) == (1, True)
    assert run("--resume", "second", "--trainer.callbacks", "null")[0] == 0
    assert_same_results(whole, "second")


def test_results_are_whole_where_nobody_reads_what_is_printed(library, tmp_path):
    config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dynlight.fit", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, "Error" in done.stderr) == (0, False)
    assert {"report.html", "summary.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out/unfinished").exists()


def test_a_callback_may_be_left_out_but_no_other_put_in(run, whole):
    stop, look = raising("on_train_batch_end")[0], raising("on_validation_end")[0]
    assert run(callbacks=[stop, look])[0] == 1
    status, said = run("--resume", "out", f"--trainer.callbacks={raising('on_fit_end')}")
    assert (status, said.startswith("error: trainer.callbacks must be [{'class_path': ")) == (2, True)
    assert run("--resume", "out", f"--trainer.callbacks={[look]}")[0] == 0
    assert_same_results(whole)


def test_without_checkpoints_it_goes_on_at_a_document(run, whole):
    status, said = run(callbacks=raising("on_train_batch_end"), checkpoint=None)
    assert (status, "must not raise, got Raises.on_train_batch_end" in said) == (1, True)
    assert run("--resume", "out", "--trainer.callbacks", "null")[0] == 0
    assert_same_results(whole)


@pytest.mark.parametrize("hook", AFTER)
def test_what_raises_after_the_last_segment_leaves_all_results(run, whole, hook):
    status, said = run(callbacks=raising(hook))
    assert status == 1
    line = f"error: trainer.callbacks must not raise, got Raises.{hook}: KeyError: 'no' (onlookers.py, line "
    assert said.splitlines()[-1].startswith(line)
    assert said.splitlines()[-1].endswith("; all results are there")
    assert "go on with" not in said
    assert_same_results(whole)


@pytest.mark.parametrize("method", ["log_metrics", "save", "finalize", "log_hyperparams"])
def test_a_logger_that_raises_is_told_no_more(run, whole, method):
    status, said = run(logger={"class_path": "onlookers.Breaks", "init_args": {"method": method}})
    assert status == 0
    warnings = [line for line in said.splitlines() if line.startswith("warning:")]
    expected = "warning: trainer.logger must not raise, got Breaks: RuntimeError: gone (onlookers.py, line "
    assert all(line.startswith(expected) and line.endswith("; the run goes on without it") for line in warnings)
    assert len(warnings) == 1
    assert_same_results(whole)


def test_wandb_that_breaks_costs_nothing(run, whole, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", _gone)
    status, said = run(logger={"class_path": "WandbLogger"})
    assert status == 0
    assert said.count("warning: trainer.logger must not raise, got WandbLogger: RuntimeError: gone (") == 1
    assert_same_results(whole)


def _gone(*arguments, **settings):
    raise RuntimeError("gone")


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (
            {"logger": {"class_path": "WandbLogger", "init_args": {"offline": True, "log_model": True}}},
            "trainer.logger must be what can be made here, got WandbLogger, which says: Providing log_model=True and offline",
        ),
        (
            {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "sideways"}}]},
            "trainer.callbacks must be what can be made here, got EarlyStopping, which says: `mode` can be ",
        ),
        (
            {"callbacks": [{"class_path": "LearningRateMonitor"}]},
            "trainer.callbacks must be what can run here, got LearningRateMonitor.on_train_start: MisconfigurationException",
        ),
        (
            {"logger": {"class_path": "onlookers.Breaks", "init_args": {"method": "version"}}},
            "trainer.logger must be what can log here, got one that raises: RuntimeError: gone (onlookers.py, line ",
        ),
    ],
)
def test_what_lightning_refuses_is_one_line(run, trainer, expected):
    status, said = run(**trainer)
    assert status == 2
    assert said.startswith(f"error: {expected}")
    assert said.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.page
def test_a_page_that_cannot_be_drawn_costs_nothing(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(page, "render", _gone)
        status, said = run()
    assert status == 0
    assert "warning: report.html must be drawn, got a page: RuntimeError: gone (test_onlookers.py, line " in said
    assert said.strip().endswith(f"; try python -m dynlight.report {Path.cwd()}/out")
    assert summary()["documents"] == 2
    assert not Path("out/report.html").exists()
    assert report.main(["out"]) == 0
    assert Path("out/report.html").stat().st_size > 10_000


def test_a_callback_that_fails_at_the_end_does_not_hide_a_document_that_failed(library, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out")
    config["trainer"] |= {"callbacks": raising("on_train_end")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "run.yaml"), "--update.lr", "1e30"]) == 3
    said = capsys.readouterr().err
    assert "error: document a.txt must be read to its end, got stopped in segment 1" in said
    assert "error: trainer.callbacks must not raise, got Raises.on_train_end" in said
