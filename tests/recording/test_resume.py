"""A run that is cut short goes on as if nothing had happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from folders import configuration, save_model
from lightning.pytorch import Callback
from meddling import StopAt

from dynlight import fit
from dynlight.recording import ledger, pieces, sealed
from dynlight.running import fitting

SAME = ["segments.parquet", "tokens.parquet", "documents.csv", "receipt.json"]
# Ragged: some end within the first segment, some together, one is empty.
TEXTS = [
    "It was a fine day, and the house " * 9,
    "def read(line):\n    return line\n\n" * 5,
    "short",
    "",
    "The old house stood. " * 9,
    "x" * 40,
]


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    root = tmp_path_factory.mktemp("library")
    (root / "documents").mkdir()
    for number, text in enumerate(TEXTS):
        (root / f"documents/{number}.txt").write_text(text)
    for architecture in ("llama", "gpt2"):
        save_model(root / architecture, byte_tokenizer, architecture, num_hidden_layers=1)
    save_model(root / "teacher", byte_tokenizer, "llama", num_hidden_layers=2)
    return root


@pytest.fixture
def run(library, tmp_path, monkeypatch, capsys):
    """Runs a configuration, or goes on with one, and stops it after so many segments."""
    monkeypatch.chdir(tmp_path)
    make_trainer = fitting.make_trainer

    def run(*arguments, changes=None, stop=None, out="out", model="llama"):
        callbacks = [] if stop is None else [stop if isinstance(stop, Callback) else StopAt(stop)]
        monkeypatch.setattr(
            fitting, "make_trainer", lambda settings, meters, folder: make_trainer(settings, callbacks + meters, folder)
        )
        if "--resume" not in arguments:
            config = configuration(library / model, f"{library}/documents/*.txt", tmp_path / out) | (changes or {})
            Path("run.yaml").write_text(yaml.safe_dump(config))
            arguments = ["--config", "run.yaml", *arguments]
        status = fit.main([str(argument) for argument in arguments])
        return status, capsys.readouterr()

    return run


def assert_same(one, other, files=SAME):
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    old, new = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    timed = {name for name in old if "second" in name} | {"peak_memory_bytes", "name"}
    for summary in (old, new):
        for name in ("static", "teacher"):
            if summary[name]:
                summary[name].pop("seconds")
    assert {key: value for key, value in old.items() if key not in timed} == {
        key: value for key, value in new.items() if key not in timed
    }
    assert not (other / "unfinished").exists()
    assert not (other / "rows").exists()


CHOICES = {
    "one at a time": {},
    "together": {"data.together": 3},
    "adapters": {
        "data.together": 4,
        "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}},
        "update": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "schedule": {"every": {0: 1, 2: 2}},
        "keep": "adapters",
    },
    "carried on": {
        "update": {"class_path": "SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
        "schedule": {"passes": 2},
        "reset": {"every": "never"},
        "reference": None,
        "clip": 0.5,
    },
    "static": {"update": None, "data.together": 2},
    "compressed": {
        "gradient": [{"class_path": "Compressed", "init_args": {"share": 0.1}}],
        "data.together": 3,
    },
    "replayed": {"objective": {"class_path": "Replayed", "init_args": {"segments": 2}}, "data.together": 2},
    "anchored": {"objective": {"class_path": "Anchored", "init_args": {"weight": 0.5}}, "data.together": 2},
    "surprising": {
        "objective": {"class_path": "Surprising", "init_args": {"threshold": 2.0, "weight": 0.1, "of": "tokens"}},
        "update": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "schedule": {"above_mean": 0.98},
        "data.together": 3,
    },
    "compressed, one at a time": {
        "gradient": [{"class_path": "Compressed", "init_args": {"bits": 2}}],
        "update": {"class_path": "SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
        "reset": {"every": "never"},
    },
    "mixture": {
        "update": {"class_path": "AdamW", "init_args": {}},
        "rates": [0.001, 0.01],
        "keep": {"what": "weights", "at": 3},
        "data.together": 2,
    },
    "teacher": {
        "teacher": ...,
        "objective": {"class_path": "Distilled", "init_args": {"share": 0.4}},
        "data.together": 3,
    },
    "partly reset": {"reset": {"every": "document", "keep": 0.5}},
    "pruned": {
        "parameters": {
            "class_path": "Pruned",
            "init_args": {"of": {"class_path": "LoRA", "init_args": {"rank": 4}}, "keep": 0.3, "every": 2},
        },
        "update": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "data.together": 3,
    },
    "pruned, one at a time": {
        "parameters": {
            "class_path": "Pruned",
            "init_args": {
                "of": {"class_path": "Matching", "init_args": {"names": "mlp|attn"}},
                "keep": 0.3,
                "every": 1,
            },
        },
        "update": {"class_path": "Adam", "init_args": {"lr": 0.002}},
    },
    "refresh": {
        "context": {
            "class_path": "TransformerXL",
            "init_args": {"segment": 16, "memory": 40, "sinks": 3, "refresh": 2},
        },
        "data.together": 3,
    },
    "refresh, one at a time": {
        "context": {"class_path": "TransformerXL", "init_args": {"segment": 16, "memory": 40, "refresh": 2}},
    },
    "memories": {
        "update": {"class_path": "SGD"},
        "rates": [0.01, 0.1],
        "memories": [
            {"class_path": "NGrams", "init_args": {"order": 4, "concentration": 3.0}},
            {"class_path": "NeuralCache", "init_args": {"size": 30, "flatness": 0.3, "share": 0.2}},
            {"class_path": "OutputBias", "init_args": {"rate": 0.1, "over": "static"}},
        ],
        "data.together": 2,
    },
    "memories of all documents": {
        "update": None,
        "memories": [
            {"class_path": "NGrams", "init_args": {"order": 4, "concentration": 3.0}},
            {"class_path": "NeuralCache", "init_args": {"size": 30, "flatness": 0.3, "share": 0.2}},
        ],
        "reset": {"every": "never"},
    },
    "no memory": {
        "context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 32}},
        "parameters": {"class_path": "Matching", "init_args": {"names": "mlp"}},
    },
}


def whole(changes, library):
    """A configuration with `data.together` in its section, and without what a file would break: receipts name it."""
    changes = dict(changes)
    together = changes.pop("data.together", 1)
    if "teacher" in changes:
        changes["teacher"] = {"class_path": "Pretrained", "init_args": {"pretrained": str(library / "teacher")}}
    return changes | {"data": {"path": "text", "data_files": f"{library}/documents/*.txt", "together": together}}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(run, tmp_path, library, choices):
    changes = whole(choices, library)
    assert run(changes=changes, out="whole")[0] == 0
    status, output = run(changes=changes, stop=1)
    assert status == 128 + signal.SIGTERM
    assert output.err.splitlines()[-2:] == [
        "stopped by SIGTERM",
        f"go on with: python -m dynlight.fit --resume {tmp_path}/out",
    ]
    torch.manual_seed(1)  # other random numbers were drawn in between
    assert run("--resume", tmp_path / "out", stop=4)[0] == 143
    assert run("--resume", tmp_path / "out")[0] == 0
    kept = [str(file.relative_to(tmp_path / "whole")) for file in tmp_path.glob("whole/kept/**/*.*") if file.is_file()]
    assert bool(kept) == ("keep" in changes)
    experts = ["experts.parquet"] * ("rates" in changes)
    assert_same(tmp_path / "whole", tmp_path / "out", [*SAME[:3], *experts, *kept])


@pytest.fixture
def stopped(run, library, tmp_path):
    """A whole run, and one that was stopped twice and has a checkpoint from each time."""
    changes = whole({"data.together": 2}, library)
    assert run(changes=changes, out="whole")[0] == 0
    assert run(changes=changes, stop=5)[0] == 143
    assert run("--resume", tmp_path / "out", stop=4)[0] == 143
    assert [file.name for file in checkpoints(tmp_path)] == ["rank0-000000000005.sealed", "rank0-000000000009.sealed"]
    return tmp_path / "out"


def checkpoints(tmp_path):
    return sorted((tmp_path / "out/unfinished").glob("rank*"))


def flip(file, place=-40):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped byte": (flip, "its checksum is another"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "its checksum is another"),
    "cut to nothing": (lambda file: file.write_bytes(b""), "cut short"),
    "another file": (lambda file: file.write_bytes(b"x" * 1000), "cut short"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_older_one_used(run, stopped, tmp_path, damage, message):
    older, newer = checkpoints(tmp_path)
    damage(newer)
    status, output = run("--resume", stopped, stop=1)
    assert status == 143
    assert f"resume: {newer} cannot be used: {message}" in output.err.splitlines()
    assert [file.name for file in checkpoints(tmp_path)] == [older.name, "rank0-000000000006.sealed"]
    assert run("--resume", stopped)[0] == 0
    assert_same(tmp_path / "whole", stopped, SAME[:3])


def test_without_a_checkpoint_what_is_finished_is_kept(run, stopped, tmp_path):
    for file in checkpoints(tmp_path):
        flip(file)
    kept = sorted((stopped / "rows").glob("*.part"))
    status, output = run("--resume", stopped)
    assert status == 0
    assert output.err.count("cannot be used") == 2
    # The first wave: the two longest.
    assert "resume: 2 of 6 documents are kept, and the others read from their start" in output.err
    assert len(kept) > 2
    assert_same(tmp_path / "whole", stopped, SAME[:3])


def test_with_other_waves_what_is_finished_is_kept_and_the_rest_read_from_its_start(run, stopped, tmp_path):
    status, output = run("--resume", stopped, "--data.together", 3, stop=2)
    assert status == 143
    assert "documents are kept" in output.err
    assert run("--resume", stopped)[0] == 0
    old, new = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", stopped))
    for name in ("documents", "tokens", "bytes", "words", "flops", "updates"):
        assert old[name] == new[name]
    assert new["nats"] == pytest.approx(old["nats"], rel=1e-5)
    assert yaml.safe_load((stopped / "config.yaml").read_text())["data"]["together"] == 3
    assert ledger.faults_of(json.loads((stopped / "receipt.json").read_text())) == []


def test_a_folder_may_be_spelled_otherwise(run, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(stopped.parent)
    assert run("--resume", stopped.name, stop=2)[0] == 143
    assert run("--resume", stopped)[0] == 0
    assert_same(tmp_path / "whole", stopped, SAME[:3])
    assert ledger.faults_of(json.loads((stopped / "receipt.json").read_text())) == []


def test_no_checkpoints_when_none_are_wanted(run, library, tmp_path):
    changes = whole({"checkpoint": None}, library)
    assert run(changes=changes, out="whole")[0] == 0
    assert run(changes=changes, stop=6)[0] == 143
    assert checkpoints(tmp_path) == []
    assert run("--resume", tmp_path / "out")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out", SAME[:3])


@pytest.mark.parametrize("name", ["*.part", "ledger.0.jsonl"])
def test_rows_that_a_checkpoint_relies_on_are_looked_at(run, stopped, tmp_path, name):
    flip(sorted((stopped / "rows").glob(name))[0], place=60)
    status, output = run("--resume", stopped)
    assert status == 0
    assert output.err.count("cannot be used") == 2
    assert_same(tmp_path / "whole", stopped, SAME[:3])


def test_torn_files_behind_a_checkpoint_are_left_out(run, stopped, tmp_path):
    with (stopped / "rows/ledger.0.jsonl").open("ab") as ledger:
        ledger.write(b"[3, 7, 16, 41.")
    for document in (0, 1, 2, 4, 5):
        (stopped / f"rows/{document:08d}-00000099.part").write_bytes(b"torn")
        (stopped / f"rows/.{document:08d}-00000002.part.draft").write_bytes(b"torn")
    (stopped / ".config.yaml.draft").write_text("torn")
    assert run("--resume", stopped)[0] == 0
    assert_same(tmp_path / "whole", stopped, SAME[:3])


@pytest.mark.parametrize("stage", ["join", "report", "end"])
def test_a_run_that_was_cut_short_at_its_end(run, library, tmp_path, monkeypatch, stage):
    changes = whole({"data.together": 2}, library)
    assert run(changes=changes, out="whole")[0] == 0
    module, name = {
        "join": (fitting.Records, "on_train_end"),
        "report": (fitting.files, "write_tables"),
        "end": (fitting, "remove_unfinished"),
    }[stage]

    def stop(*arguments):
        raise fitting.Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert run(changes=changes)[0] == 130
    assert run("--resume", tmp_path / "out")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out", SAME[:3])


CHANGES = {
    "update.lr must be 0.05 as when OUT began, got 0.1; change it back, or begin another run": ["--update.lr", "0.1"],
    "seed must be 0 as when OUT began, got 1; change it back, or begin another run": ["--seed", "1"],
    "data.max_tokens must be None as when OUT began, got 9; change it back, or begin another run": [
        "--data.max_tokens",
        9,
    ],
    "resume must stand without config and out, as a run has its own, got both; leave one out": ["--out", "there"],
    "checkpoint.minutes must be above 0, got 0.0; choose checkpoint: null for none": ["--checkpoint.minutes", 0],
}


@pytest.mark.parametrize(
    ("message", "arguments"), CHANGES.items(), ids=[arguments[0] for arguments in CHANGES.values()]
)
def test_another_configuration_is_refused(run, stopped, message, arguments):
    before = tree(stopped)
    status, output = run("--resume", stopped, *arguments)
    assert status == 2
    assert output.err == f"error: {message.replace('OUT', str(stopped))}\n"
    assert tree(stopped) == before


def tree(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def another_text(library):
    (library / "documents/1.txt").write_text("another")


def another_file(library):
    (library / "documents/6.txt").write_text("one more")


def invalid(library):
    (library / "documents/3.txt").write_bytes("café".encode("latin-1"))


def missing(library):
    shutil.rmtree(library / "documents")


def other_weights(library):
    weights = sealed.torch.zeros(1)
    from safetensors.torch import load_file, save_file

    weights = load_file(library / "llama/model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, library / "llama/model.safetensors", metadata={"format": "pt"})


def no_weights(library):
    (library / "llama/model.safetensors").unlink()


FAULTS = {
    another_text: "data must hold '1.txt' as it was when OUT began, got another text; begin another run",
    another_file: "data must hold 6 document(s) as when OUT began, got 7; begin another run",
    invalid: "data.data_files must be data that can be read, got ",
    missing: "data.data_files must match at least one file, got ",
    other_weights: "model.pretrained must have the weights it had when OUT began, got others; begin another run",
    no_weights: "model.pretrained must be a causal language model ",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_other_data_and_another_model_are_refused(run, library, tmp_path, fault, message):
    own = tmp_path / "library"
    shutil.copytree(library, own)
    changes = whole({"model": {"pretrained": str(own / "llama")}}, own)
    assert run(changes=changes, stop=3)[0] == 143
    fault(own)
    before = tree(tmp_path / "out")
    status, output = run("--resume", tmp_path / "out")
    assert status == 2
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert line.removeprefix("error: ").startswith(message.replace("OUT", str(tmp_path / "out")))
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("what", ["nothing", "finished", "origin"])
def test_what_is_no_unfinished_run_is_refused(run, library, tmp_path, what):
    if what == "nothing":
        reason = "it has no config.yaml"
    elif what == "finished":
        assert run(changes=whole({}, library))[0] == 0
        reason = "it is finished"
    else:
        assert run(changes=whole({}, library), stop=3)[0] == 143
        flip(tmp_path / "out/unfinished/origin.sealed")
        reason = "its origin.sealed is damaged (its checksum is another), so begin it again with overwrite: true"
    status, output = run("--resume", tmp_path / "out")
    assert status == 2
    assert output.err == f"error: resume must be the folder of an unfinished run, got {tmp_path}/out; {reason}\n"


def test_a_run_that_is_begun_again_says_how_it_could_go_on(run, library, tmp_path):
    changes = whole({}, library)
    assert run(changes=changes, stop=3)[0] == 143
    status, output = run(changes=changes)
    assert status == 2
    assert output.err == (
        f"error: out must be a new folder, got {tmp_path}/out, a run that was cut short; go on with python -m "
        f"dynlight.fit --resume {tmp_path}/out, or set overwrite: true\n"
    )
    assert run("--overwrite", "true", changes=changes)[0] == 0


def test_a_signal_before_anything_is_read_leaves_nothing(run, library, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dynlight.running.run.seed_everything", lambda *arguments, **settings: os.kill(os.getpid(), signal.SIGINT)
    )
    status, output = run(changes=whole({}, library))
    assert status == 130
    assert output.err == "stopped by SIGINT\n"
    assert not (tmp_path / "out").exists()


class Full:
    """A disk with room for so many files more."""

    def __init__(self, files):
        self.files = files

    def __call__(self, descriptor):
        self.files -= 1
        if self.files < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("files", [4, 9])
def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on(run, library, tmp_path, monkeypatch, files):
    changes = whole({"data.together": 2, "checkpoint": {"minutes": 1e-6}}, library)
    assert run(changes=changes, out="whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Full(files))
        status, output = run(changes=changes)
    assert status == 1
    assert output.err.splitlines()[-2:] == [
        f"go on with: python -m dynlight.fit --resume {tmp_path}/out",
        f"error: out must be where there is room, got {tmp_path}/out: No space left on device",
    ]
    assert run("--resume", tmp_path / "out")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out", SAME[:3])


def test_long_documents_come_in_groups_wherever_they_were_cut(run, library, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "GROUP", 4)
    monkeypatch.setattr("dynlight.recording.records.BUFFERED", 2)
    changes = whole({"context": {"class_path": "TransformerXL", "init_args": {"segment": 8, "memory": 8}}}, library)
    assert run(changes=changes, out="whole")[0] == 0
    assert run(changes=changes, stop=4)[0] == 143
    assert run("--resume", tmp_path / "out", stop=4)[0] == 143
    assert run("--resume", tmp_path / "out")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out", SAME[:3])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same():
    command = [sys.executable, str(Path(__file__).parents[1] / "torture.py"), "--kills", "5", "--runs", "together"]
    command += ["--kills-of-two", "0", "--inputs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills in" in done.stdout
