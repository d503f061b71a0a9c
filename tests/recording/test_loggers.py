"""What loggers are told: W&B online, offline and disabled, read back; CSV and TensorBoard."""

import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from folders import configuration
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynlight import fit
from dynlight.recording.checkpoint import Checkpoint
from dynlight.recording.names import SERIES
from dynlight.running.configuration import parse

CONFIGS = Path(__file__).parents[2] / "configs"
WANDB = {"class_path": "WandbLogger", "init_args": {"project": "a project"}}


def config_file(library, folder, logger, **sections):
    config = configuration(library / "model", f"{library}/documents/*.txt", folder / "out") | sections
    config["trainer"] = {"accelerator": "cpu", "logger": logger}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


@pytest.fixture
def run(library, tmp_path, capsys):
    """Runs with a logger (and other sections); returns the run's folder, its summary, and what was printed."""

    def run(logger, status=0, **sections):
        found = fit.main(["--config", config_file(library, tmp_path, logger, **sections)])
        output = capsys.readouterr()
        assert found == status, output.err
        summary = tmp_path / "out/summary.json"
        return tmp_path / "out", json.loads(summary.read_text()) if summary.exists() else None, output

    return run


def expected_series(folder):
    """The series by name, one value a segment, from the rows that the run left; NaN where there is none yet."""
    segments, timings = (pd.read_parquet(folder / f"{name}.parquet") for name in ("segments", "timings"))
    words = pd.read_csv(folder / "documents.csv").set_index("document").words
    sums = segments.cumsum()
    last = segments.segment == segments.groupby("document").segment.transform("max")
    whole = segments.index.to_series().where(last).ffill()  # the row at which the last document ended
    read_words = segments.document.map(words).where(last, 0).cumsum()
    series = {"tokens": sums.tokens, "flops": sums.flops}
    for name in ("static_nats", "nats"):
        prefix = name.removesuffix("nats")
        series[f"{prefix}bits_per_byte"] = sums[name] / sums.bytes / math.log(2)
        series[f"{prefix}nats_per_token"] = sums[name] / sums.tokens
        nats = whole.map(sums[name])
        series[f"{prefix}word_perplexity"] = np.exp(nats / read_words)
    series["gain_bits_per_byte"] = series["static_bits_per_byte"] - series["bits_per_byte"]
    series["segment_nats_per_token"] = segments.nats / segments.tokens
    series["segment_gain_nats_per_token"] = (segments.static_nats - segments.nats) / segments.tokens
    for part in ("update", "static"):
        series[f"{part}_flops"] = sums[f"{part}_flops"]
    for part in ("scoring", "learning", "static"):
        series[f"{part}_seconds"] = timings[f"{part}_seconds"].cumsum()
    assert set(SERIES) < set(series)
    return pd.DataFrame(series)


def assert_same(logged, expected):
    assert len(logged) == len(expected) > 10
    for name in expected:
        found = np.array([np.nan if row.get(name) is None else row[name] for row in logged], dtype=float)
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-9, equal_nan=True, err_msg=name)


# W&B


@pytest.fixture(scope="module")
def offline(library, tmp_path_factory):
    """A run as on a fresh machine: no account, a terminal to ask at, and a network that tells when it is used."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "home").mkdir()
    network = socket.create_server(("127.0.0.1", 0))
    network.settimeout(0)
    proxy = f"http://127.0.0.1:{network.getsockname()[1]}"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment["HF_HUB_OFFLINE"] = "1"  # datasets would count the loading of a file
    environment |= {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "dynlight.fit", "--config", config_file(library, folder, WANDB)]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment, cwd=folder, text=True
    )
    os.close(terminal)
    output, _ = process.communicate(timeout=240)
    shown = b""
    try:
        while piece := os.read(keyboard, 4096):
            shown += piece
    except OSError:  # Linux says so at the end of what a closed terminal holds
        pass
    os.close(keyboard)
    assert process.returncode == 0, shown.decode()
    with network, pytest.raises(BlockingIOError):
        network.accept()
    return folder, output, shown.decode()


@pytest.fixture(scope="module")
def records(offline):
    """The records of the offline run by kind, as W&B's own reader gives them."""
    folder, _, _ = offline
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder / "out/wandb/latest-run")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    records: dict[str, list] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records


@pytest.mark.slow
def test_without_an_account_nothing_is_asked_and_nothing_said(offline):
    folder, output, shown = offline
    lines = output.splitlines()
    assert lines[0].startswith("document ")
    assert lines[-3] == f"report  {folder}/out/report.html"
    (run,) = (folder / "out/wandb").glob("offline-run-*")
    assert lines[-2:] == [
        f"W&B     out/wandb/{run.name}",
        "        offline: `wandb leet` shows it, `wandb sync` uploads it",
    ]
    progress = [line.removesuffix("\x1b[K") for line in shown.replace("\r\n", "").split("\r")]
    assert progress.pop(0) == "", "before the first line of progress there is nothing"
    assert all(re.fullmatch(r" *\d+% · \d/2 documents · .*left", line) for line in progress), shown
    assert "wandb" not in shown
    assert not (folder / "home/.netrc").exists()


@pytest.mark.slow
def test_every_series_is_drawn_over_tokens_and_over_flops(records):
    metrics = {metric["name"]: metric for metric in records["metric"] if "name" in metric}
    for axis in ("tokens", "flops"):
        assert metrics[axis]["options"]["hidden"]
        for name in SERIES:
            assert metrics[f"by_{axis}/{name}"]["step_metric"] == axis
    costs = {name for name in metrics if name.startswith("cost/")}
    assert len(costs) == 5
    assert {metrics[name]["step_metric"] for name in costs} == {"tokens"}


@pytest.mark.slow
def test_the_offline_run_holds_every_series_after_every_segment(offline, records):
    history = [record["item"] for record in records["history"] if "tokens" in record["item"]]
    expected = expected_series(offline[0] / "out")
    axes = ["tokens", "flops"]
    for axis in axes:
        names = {name: name if name in axes else f"by_{axis}/{name}" for name in [*axes, *SERIES]}
        assert_same(history, expected[list(names)].rename(columns=names))
    costs = {name: f"cost/{name}" for name in expected if name not in [*axes, *SERIES]}
    assert_same(history, expected[list(costs)].rename(columns=costs))
    unknown = set().union(*history) - {f"by_{axis}/{name}" for axis in axes for name in SERIES} - set(costs.values())
    assert {name for name in unknown if not name.startswith("_")} <= {*axes, "trainer/global_step"}


@pytest.mark.slow
def test_the_offline_run_ends_with_the_summary_the_documents_and_the_report(offline, records):
    folder = offline[0] / "out"
    found = {}
    for record in records["summary"]:
        found |= record["update"]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("documents", "tokens", "bits_per_byte", "gain_bits_per_byte", "word_perplexity", "flops", "protocol"):
        assert found[name] == summary[name]
    assert found["static"]["bits_per_byte"] == summary["static"]["bits_per_byte"]
    assert found["by_tokens/bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    assert not any(name.startswith("by_flops/") for name in found), "the same value once is enough"
    files = folder / "wandb/latest-run/files"
    table = json.loads((files / found["results/documents.path"]).read_text())
    documents = pd.read_csv(folder / "documents.csv")
    assert set(documents) <= set(table["columns"])
    frame = pd.DataFrame(table["data"], columns=table["columns"])
    assert frame.name.tolist() == documents.name.tolist()
    assert frame.nats.tolist() == pytest.approx(documents.nats.tolist())
    assert (files / found["results/report.path"]).read_text() == (folder / "report.html").read_text()


@pytest.mark.slow
def test_the_offline_run_holds_the_configuration(records):
    (config,) = records["config"]
    settings = config["update"]
    assert settings["context"]["init_args"] == {"segment": 16, "memory": 32, "sinks": 0, "refresh": None}
    assert settings["update"]["class_path"] == "torch.optim.SGD"
    assert settings["update"]["init_args"]["lr"] == 0.05
    assert settings["data"]["path"] == "text"
    assert settings["seed"] == 0


@pytest.fixture
def online(monkeypatch):
    """An account, and a W&B that is not there: what it is told is kept."""
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    # The parser learns a logger's settings from wandb.init itself, and keeps what it learned.
    parse(["--config", str(CONFIGS / "quickstart.yaml")])
    monkeypatch.setattr(wandb, "login", lambda **settings: True)
    told = MagicMock(offline=False, url="https://wandb.invalid/a/run")
    monkeypatch.setattr(wandb, "init", told.init)
    told.init.return_value = told
    yield told
    wandb.teardown()


def test_online_the_address_is_printed_and_every_segment_logged(run, online):
    folder, summary, output = run(WANDB)
    assert output.out.splitlines()[0] == "W&B     https://wandb.invalid/a/run"
    settings = online.init.call_args.kwargs
    assert settings["project"] == "a project"
    assert settings["dir"] == str(folder)
    assert settings.get("mode") is None
    defined = {call.args[0]: call.kwargs.get("step_metric") for call in online.define_metric.call_args_list}
    assert {defined[f"by_{axis}/bits_per_byte"] for axis in ("tokens", "flops")} == {"tokens", "flops"}
    *segments, last = (call.args[0] for call in online.log.call_args_list)
    expected = expected_series(folder)
    assert_same(segments, expected[["tokens", "flops"]])
    assert segments[-1]["by_flops/bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    assert set(last) == {"results/documents", "results/report"}
    online.finish.assert_called_once_with()


def test_where_wandb_cannot_be_reached_one_line_says_so_and_no_folder_is_left(run, online):
    online.init.side_effect = wandb.errors.CommError("no such host\nwhile retrying")
    folder, _, output = run(WANDB, status=2)
    assert output.err == (
        "error: trainer.logger must be a WandbLogger that reaches W&B, got one that says: no such host while retrying; set "
        "WANDB_MODE=offline\n"
    )
    assert not folder.exists()


@pytest.mark.parametrize("how", ["environment", "setting"])
def test_disabled_it_writes_and_says_nothing(run, monkeypatch, how):
    wandb.teardown()
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        logger = WANDB
    else:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        logger = {"class_path": "WandbLogger", "init_args": {"mode": "disabled"}}
    folder, summary, output = run(logger)
    wandb.teardown()
    assert summary["documents"] == 2
    assert "W&B" not in output.out
    assert "wandb" not in output.err
    assert not (folder / "wandb").exists()


def test_the_configuration_keeps_where_wandb_writes(run, online, tmp_path):
    # Were the folder of this run written into it, the next run would log into this one's.
    folder, _, _ = run(WANDB)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "."
    run({"class_path": "WandbLogger", "init_args": {"save_dir": str(tmp_path)}}, overwrite=True)
    assert online.init.call_args.kwargs["dir"] == str(tmp_path)


# Others


def csv_logger(folder):
    return {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "csv"}}


def read_csv(folder):
    return pd.read_csv(folder / "csv/version_0/metrics.csv").to_dict("records")


def board_logger(folder):
    return {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(folder), "name": "board"}}


def read_board(folder):
    events = EventAccumulator(str(folder / "board/version_0"))
    events.Reload()
    return events


def test_csv_holds_every_series_after_every_segment(run, tmp_path):
    folder, summary, _ = run(csv_logger(tmp_path))
    rows = read_csv(tmp_path)
    assert_same(rows, expected_series(folder))
    assert [row["step"] for row in rows] == list(range(len(rows)))
    for name in ("bits_per_byte", "nats_per_token", "word_perplexity", "gain_bits_per_byte", "tokens", "flops"):
        assert rows[-1][name] == pytest.approx(summary[name])


def test_tensorboard_holds_every_series(run, tmp_path):
    folder, summary, _ = run(board_logger(tmp_path))
    events = read_board(tmp_path)
    expected = expected_series(folder)
    assert set(expected) <= set(events.Tags()["scalars"])
    for name in ("bits_per_byte", "static_bits_per_byte", "flops", "learning_seconds"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(expected[name].tolist(), rel=1e-5)
    assert events.Scalars("bits_per_byte")[-1].value == pytest.approx(summary["bits_per_byte"])


@pytest.mark.parametrize(("logger", "name"), [(csv_logger, "csv"), (board_logger, "board")])
def test_other_loggers_hold_the_configuration_too(run, tmp_path, logger, name):
    run(logger(tmp_path))
    settings = yaml.safe_load((tmp_path / name / "version_0/hparams.yaml").read_text())
    assert settings["update"] == {"class_path": "torch.optim.SGD", "init_args": settings["update"]["init_args"]}
    assert settings["update"]["init_args"]["lr"] == 0.05
    assert settings["data"]["path"] == "text"


def test_two_loggers_are_told_the_same(run, online, tmp_path):
    run([WANDB, csv_logger(tmp_path)])
    rows = read_csv(tmp_path)
    told = [call.args[0] for call in online.log.call_args_list if "tokens" in call.args[0]]
    assert [row["bits_per_byte"] for row in rows] == pytest.approx([row["by_tokens/bits_per_byte"] for row in told])


def test_without_a_reference_nothing_is_said_of_it(run, tmp_path):
    run(csv_logger(tmp_path), reference=None)
    row = read_csv(tmp_path)[-1]
    assert row["bits_per_byte"] > 0
    assert not [name for name in row if name in SERIES and name.startswith(("static", "gain", "segment_gain"))]


def test_documents_read_together_are_summed_apart(run, library, tmp_path):
    data = {"path": "text", "data_files": f"{library}/documents/*.txt", "together": 2}
    _, summary, _ = run(csv_logger(tmp_path), data=data)
    rows = read_csv(tmp_path)
    assert rows[-1]["tokens"] == summary["tokens"]
    assert rows[-1]["flops"] == summary["flops"]
    for name in ("bits_per_byte", "static_nats_per_token", "word_perplexity"):
        assert rows[-1][name] == pytest.approx(
            (summary | {f"static_{k}": v for k, v in summary["static"].items()})[name]
        )


def test_a_document_that_failed_is_taken_out_of_the_running_sums(run, library, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    data = {"path": "text", "data_files": [f"{library}/documents/a.txt", str(tmp_path / "short.txt")]}
    update = {"class_path": "SGD", "init_args": {"lr": 1e6}}
    _, summary, _ = run(csv_logger(tmp_path), status=3, data=data, update=update)
    assert summary["documents"] == 1
    rows = read_csv(tmp_path)
    assert len(rows) > 1, "the first document was read for a while"
    assert rows[-1]["bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    assert rows[-1]["tokens"] > summary["tokens"], "what was spent on it stays on the axes"


def assert_whole(folder):
    """Whether CSV and TensorBoard have one version, and in it every point once."""
    expected = expected_series(folder / "out")
    assert [len(list((folder / name).iterdir())) for name in ("csv", "board")] == [1, 1]
    rows = read_csv(folder)
    assert [row["step"] for row in rows] == list(range(len(expected)))
    assert_same(rows, expected)
    for name in ("tokens", "bits_per_byte", "learning_seconds"):
        points = read_board(folder).Scalars(name)
        assert [point.step for point in points] == list(range(len(expected)))
        assert [point.value for point in points] == pytest.approx(expected[name].tolist(), rel=1e-5)


@pytest.mark.parametrize("checkpoint", [{"minutes": 5}, None])
def test_a_run_that_goes_on_stays_in_its_version_and_tells_each_point_once(
    run, library, tmp_path, capsys, monkeypatch, checkpoint
):
    end, left = Checkpoint.on_train_batch_end, 8

    def stop(*arguments):
        nonlocal left
        left -= 1
        if left in (0, -5):
            os.kill(os.getpid(), signal.SIGTERM)
        end(*arguments)

    monkeypatch.setattr(Checkpoint, "on_train_batch_end", stop)
    run([csv_logger(tmp_path), board_logger(tmp_path)], status=143, checkpoint=checkpoint)
    (tmp_path / "csv/version_0/metrics.csv").unlink()  # as if it had not come to disk
    assert fit.main(["--resume", str(tmp_path / "out")]) == 143
    assert fit.main(["--resume", str(tmp_path / "out")]) == 0
    assert "exists and is not empty" not in capsys.readouterr().err
    assert_whole(tmp_path)
    assert "purge_step: null" in (tmp_path / "out/config.yaml").read_text()


def test_there_is_one_call_a_segment(run, monkeypatch, tmp_path):
    calls = []
    log = CSVLogger.log_metrics
    monkeypatch.setattr(
        CSVLogger, "log_metrics", lambda self, *told, **more: (calls.append(told), log(self, *told, **more))
    )
    folder, _, _ = run(csv_logger(tmp_path))
    assert len(calls) == len(pd.read_parquet(Path(folder) / "segments.parquet"))


KILLED = """
import os, signal, sys
from dynlight import fit
from dynlight.recording.checkpoint import Checkpoint
from dynlight.running.configuration import parse

left = int(sys.argv[1])
save, end = Checkpoint.save, Checkpoint.on_train_batch_end


def count(self, *arguments):
    global left
    end(self, *arguments)
    left -= 1
    if left == 5:
        self.save(arguments[1])
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


Checkpoint.on_train_batch_end = count
sys.exit(fit.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_runs_of_loggers_without_a_gap_or_a_doubled_point(library, tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    config = config_file(library, tmp_path, [WANDB, csv_logger(tmp_path), board_logger(tmp_path)])

    def session(segments, *arguments):
        command = [sys.executable, "-c", KILLED, str(segments), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    assert session(8, "--config", config).returncode == -9
    assert session(9, "--resume", "out").returncode == -9
    last = session(-1, "--resume", "out")
    assert last.returncode == 0, last.stderr
    folders = sorted((tmp_path / "out/wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime)
    assert len(folders) == 3
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    history = []
    for folder in folders:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
        items = [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]
        history += [item for item in items if "tokens" in item]
    expected = expected_series(tmp_path / "out")
    assert [item["_step"] for item in history] == list(range(len(expected)))
    assert_same(history, expected[["tokens", "flops"]])
    assert [item["by_tokens/bits_per_byte"] for item in history] == pytest.approx(expected.bits_per_byte.tolist())
    assert_whole(tmp_path)
