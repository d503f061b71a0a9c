"""The commands that use what was learned: dynlight.generate, dynlight.watch, dynlight.compress and decompress."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import threading
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from folders import configuration, save_model

from dynlight import DynamicEvaluation, Reader, compress, decompress, fit, generate, watch
from dynlight.using import lines, packed
from dynlight.using.lines import Line, Surprising, lines_of

DOORS = {"compress": compress, "decompress": decompress, "generate": generate, "watch": watch}
TEXT = "".join(f"It was a fine day, the {i}th, and the old house stood still. ✓\n" for i in range(12))


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_tokenizer):
    return save_model(tmp_path_factory.mktemp("models") / "model", byte_tokenizer, num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, byte_tokenizer):
    return save_model(tmp_path_factory.mktemp("models") / "teacher", byte_tokenizer, num_hidden_layers=1)


@pytest.fixture
def config(model, library, tmp_path, monkeypatch):
    """Writes run.yaml with these changes."""
    monkeypatch.chdir(tmp_path)

    def config(**changes):
        settings = configuration(model, f"{library}/documents/*.txt", tmp_path / "out") | changes
        Path("run.yaml").write_text(yaml.safe_dump(settings))
        return "run.yaml"

    return config


@pytest.mark.parametrize("name", DOORS)
def test_help_is_short_and_needs_nothing(name, capsys):
    assert DOORS[name].main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) <= 90
    assert text == import_module(f"dynlight.{name}").HELP


# Compressing


CHOICES = {
    "all weights": {},
    "static": {"update": None},
    "adapters in windows": {
        "context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 40, "prefix": True}},
        "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}},
        "update": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
    },
    "a mixture of rates": {
        "context": {"class_path": "TransformerXL", "init_args": {"segment": 16, "memory": 32, "sinks": 2}},
        "update": {"class_path": "AdamW"},
        "rates": [0.001, 0.02],
        "clip": 1.0,
        "seed": 3,
    },
}
CHOICES["taught"] = {"objective": {"class_path": "Distilled", "init_args": {"share": 0.5}}, "teacher": ...}
CHOICES["memories"] = CHOICES["a mixture of rates"] | {
    "memories": [
        {"class_path": "NGrams", "init_args": {"order": 4, "concentration": 3.0}},
        {"class_path": "NeuralCache", "init_args": {"size": 30, "flatness": 0.3, "share": 0.2, "over": "static"}},
    ]
}
FILES = {
    "text": TEXT.encode(),
    "nothing": b"",
    "one byte": b"\xff",
    "bytes": random.Random(0).randbytes(300),
    "line ends": b"a\r\nb\rc\n\n\x00\x1a\x1a1a\xc3\x28 </s><s> \xf0\x9f\x98\x80" * 3,
}


def round_trip(config, data, **changes):
    """The file that compress leaves, once it was decompressed and compared."""
    Path("file").write_bytes(data)
    assert compress.main(["file", "--config", config(**changes)]) == 0
    assert decompress.main(["file.dyn", "--to", "back"]) == 0
    assert Path("back").read_bytes() == data
    return Path("file.dyn").read_bytes()


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_any_bytes_come_back(config, data):
    round_trip(config, data)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_size_is_the_score(config, choices, teacher, capsys):
    """Within 0.1% and 64 bytes of the nats that it reports, and 1% of those of dynlight.fit."""
    changes = dict(choices)
    if "teacher" in changes:
        changes["teacher"] = {"class_path": "Pretrained", "init_args": {"pretrained": str(teacher)}}
    seen = {}
    pack = packed.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "pack", lambda *arguments: seen.setdefault("packed", pack(*arguments)))
        round_trip(config, TEXT.encode(), **changes)
    result = seen["packed"]
    bytes_of_nats = result.nats / np.log(2) / 8
    assert bytes_of_nats <= result.code + 4 and result.code <= 1.001 * bytes_of_nats + 64
    assert result.header <= 400
    assert f"a code of {result.code:,} behind a header of {result.header:,}" in capsys.readouterr().out
    Path("file.txt").write_bytes(TEXT.encode())
    assert fit.main(["--config", config(**changes, data={"path": "text", "data_files": "file.txt"})]) == 0
    assert result.nats == pytest.approx(json.loads(Path("out/summary.json").read_text())["nats"], rel=1e-5)
    static = json.loads(Path("out/summary.json").read_text())["static"]
    assert result.static_nats == pytest.approx(static["nats"], rel=1e-5)


def test_settings_and_the_model_are_found_again_from_another_folder(config, model, tmp_path, monkeypatch):
    Path("file").write_bytes(TEXT.encode())
    assert compress.main(["file", "--config", config(), "--update.lr", "0.1", "--data.documents", "1"]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move("file.dyn", tmp_path / "elsewhere/file.dyn")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert decompress.main(["file.dyn"]) == 0
    assert Path("file").read_bytes() == TEXT.encode()


def test_a_model_that_lies_elsewhere_is_named(config, model, capsys):
    shutil.copytree(model, "here")
    Path("file").write_bytes(TEXT.encode()[:100])
    assert compress.main(["file", "--config", config(model={"pretrained": "here"})]) == 0
    Path("here").rename("there")
    assert decompress.main(["file.dyn", "--to", "back"]) == 2
    assert "error: model.pretrained must be" in capsys.readouterr().err
    assert decompress.main(["file.dyn", "--to", "back", "--model.pretrained", "there"]) == 0
    assert Path("back").read_bytes() == TEXT.encode()[:100]


def test_a_model_of_this_folder_is_found_from_another(config, model, tmp_path, monkeypatch):
    shutil.copytree(model, "here")
    Path("file").write_bytes(TEXT.encode()[:200])
    assert compress.main(["file", "--config", config(model={"pretrained": "here"})]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert decompress.main(["../file.dyn", "--to", "file"]) == 0
    assert Path("file").read_bytes() == TEXT.encode()[:200]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("settings"),
        lambda header: header.update(made=[]),
        lambda header: header["made"].__setitem__(2, 0),
        lambda header: header.update(tokens=-1),
        lambda header: header.update(tokens=1.5),
        lambda header: header["made"].__setitem__(2, 10**9),
        lambda header: header["settings"].update(update={"class_path": "some_module.Rule"}),
        lambda header: header["settings"]["model"].update(trust_remote_code=True),
        lambda header: header.update(settings=[1]),
    ],
)
def test_a_header_that_was_made_up_is_told(dyn, capsys, change):
    header, code = packed._header_of(dyn.read_bytes())
    change(header)
    made_up = packed._packed_header(header)
    dyn.write_bytes(packed.MAGIC + len(made_up).to_bytes(2, "little") + made_up + code)
    assert decompress.main([str(dyn)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: file must have a whole header") and error.count("\n") == 1


def test_code_of_a_users_own_is_seen_wherever_it_is_named():
    own = {"class_path": "mine.Rule"}
    for settings in (
        {"update": own},
        {"update": [own]},
        {"parameters": {"class_path": "dynlight.Pruned", "init_args": {"of": own}}},
    ):
        assert packed._foreign(settings) == ["mine.Rule"]
    assert packed._foreign({"update": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}) == []


def test_a_header_asks_for_nothing_but_what_decides_predictions(dyn):
    header, code = packed._header_of(dyn.read_bytes())
    header["settings"] |= {"trainer": {"callbacks": [{"class_path": "no.such.Class"}]}, "out": "elsewhere"}
    made_up = packed._packed_header(header)
    dyn.write_bytes(packed.MAGIC + len(made_up).to_bytes(2, "little") + made_up + code)
    assert decompress.main([str(dyn)]) == 0
    assert Path("file").read_bytes() == TEXT.encode()[:200]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("folder", "to must be a file that can be replaced, got folder"),
        ("/dev/null", "to must be a file that can be replaced, got /dev/null"),
        ("link", "to must be a file that can be replaced, got link"),
        ("nowhere/file.dyn", "to must lie in a folder that can be written to, got nowhere/file.dyn"),
        ("file", "to must be another file than is read, got file"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_read(config, capsys, monkeypatch, target, message):
    Path("file").write_bytes(b"text")
    Path("folder").mkdir()
    Path("link").symlink_to("file")
    monkeypatch.setattr(packed, "pack", None)
    assert compress.main(["file", "--config", config(), "--to", target, "--force"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert Path("file").read_bytes() == b"text"


def test_ctrl_c_leaves_what_was_there(config, capsys, monkeypatch):
    Path("file").write_bytes(TEXT.encode())
    Path("file.dyn").write_bytes(b"old")
    step = DynamicEvaluation.training_step

    def stops(self, segment, batch_idx):
        if segment.cut.index == 1:
            raise KeyboardInterrupt
        return step(self, segment, batch_idx)

    monkeypatch.setattr(DynamicEvaluation, "training_step", stops)
    assert compress.main(["file", "--config", config(), "--force"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; nothing was written"
    assert Path("file.dyn").read_bytes() == b"old"


@pytest.fixture
def dyn(config):
    Path("file").write_bytes(TEXT.encode()[:200])
    assert compress.main(["file", "--config", config()]) == 0
    Path("file").unlink()
    return Path("file.dyn")


@pytest.mark.parametrize("what", ["versions", "machine"])
def test_another_machine_is_named(dyn, monkeypatch, capsys, what):
    here = packed._here
    place = {"versions": 0, "machine": 1}[what]

    def elsewhere(reader):
        made = here(reader)
        made[place] += " of another kind"
        return made

    monkeypatch.setattr(packed, "_here", elsewhere)
    assert decompress.main([str(dyn)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {what} must be ") and "as where the file was compressed" in error
    assert error.count("\n") == 1
    assert not Path("file").exists()


def test_another_model_is_named(dyn, model, tmp_path, byte_tokenizer, capsys):
    aside = model.with_name("aside")
    model.rename(aside)
    try:
        save_model(model, byte_tokenizer, num_hidden_layers=2, initializer_range=0.5)
        assert decompress.main([str(dyn)]) == 2
        assert "error: model.pretrained must be the one by which the file was compressed" in capsys.readouterr().err
    finally:
        shutil.rmtree(model)
        aside.rename(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"XZ" + data[2:], "file must begin with DYN1"),
        (lambda data: data[:20], "file must have a whole header"),
        (lambda data: data[:-24], "file must come out with the SHA-256"),
        (lambda data: data[: -len(packed._header_of(data)[1])] + b"\xff" * 80, "code must be of this model, and whole"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "file must come out with the SHA-256"),
    ],
    ids=["magic", "header", "cut short", "no code", "a bit"],
)
def test_a_damaged_file_is_told(dyn, capsys, damage, message):
    dyn.write_bytes(damage(dyn.read_bytes()))
    assert decompress.main([str(dyn)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("file").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"pretrained": ..., "compile": True}}, "model.compile must be false"),
        ({"update": {"class_path": "SGD", "init_args": {"lr": 1e9}}}, "error: "),
        (
            {"trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}, "reset": {"every": "never"}},
            "trainer.strategy",
        ),
        ({"on_failure": "static"}, "on_failure must be stop, as a code ends where numbers go wrong, got static"),
        (
            {"model": {"pretrained": ..., "trust_remote_code": True}},
            "model.trust_remote_code must name what comes with",
        ),
        ({"trainer": {"accelerator": "cpu", "plugins": ["lightning.pytorch.plugins.precision.Precision"]}}, "plugins"),
    ],
    ids=["compile", "rate", "one set of weights", "failure", "code", "plugins"],
)
def test_what_cannot_be_coded_is_refused(config, model, capsys, changes, message):
    if changes.get("model"):
        changes["model"]["pretrained"] = str(model)
    Path("file").write_bytes(TEXT.encode())
    assert compress.main(["file", "--config", config(**changes)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not Path("file.dyn").exists()


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, word_tokenizer, config, capsys):
    save_model(tmp_path / "words", word_tokenizer, num_hidden_layers=1)
    Path("file").write_bytes(b"a fine  day\n")
    assert compress.main(["file", "--config", config(model={"pretrained": str(tmp_path / "words")})]) == 2
    assert "error: model.tokenizer must give a text back from its tokens, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("door", "arguments", "message"),
    [
        (compress, ["nothing", "--config", "run.yaml"], "FILE must be a file, got nothing"),
        (compress, ["--config", "run.yaml"], "FILE must come first, got --config"),
        (compress, ["file", "--config", "run.yaml", "--to"], "to must be given a value, got nothing"),
        (compress, ["file", "--config", "run.yaml", "--to", "there"], "to must be a new file, got there; set --force"),
        (compress, ["file"], "model.pretrained"),
        (decompress, ["file"], "to must be given where a file is not named .dyn, got nothing"),
        (decompress, ["file", "--seed", "1"], "seed must be left out, as the file has its settings, got --seed 1"),
        (decompress, ["gone.dyn"], "FILE.dyn must be a file, got gone.dyn"),
    ],
)
def test_what_is_asked_wrongly_is_told(config, capsys, door, arguments, message):
    config()
    for name in ("file", "there"):
        Path(name).write_bytes(b"text")
    assert door.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert Path("there").read_bytes() == b"text"


def test_a_file_is_replaced_by_force_alone(config):
    Path("file").write_bytes(b"It was a fine day.")
    Path("file.dyn").write_bytes(b"old")
    arguments = ["file", "--config", config()]
    assert compress.main(arguments) == 2
    assert compress.main([*arguments, "--force"]) == 0
    assert decompress.main(["file.dyn"]) == 2
    assert decompress.main(["file.dyn", "--force"]) == 0


# Generating


@pytest.mark.parametrize("keep", [None, "weights"])
def test_what_a_run_has_taught_is_generated_beside_the_initial_weights(config, capsys, keep, library):
    update = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    Path("documents").mkdir()
    Path("documents/a.txt").write_text("It was a fine day. " * 30)
    Path("documents/b.txt").write_text("def read(line):\n    return line\n\n\n" * 40)
    data = {"path": "text", "data_files": "documents/*.txt"}
    assert fit.main(["--config", config(keep=keep, update=update, data=data)]) == 0
    capsys.readouterr()
    assert Path("out/kept").is_dir() == (keep is not None)
    texts = {}
    for document in ("b.txt", "0"):
        arguments = ["--run", "out", "--document", document, "--prompt", "def ", "--tokens", "30", "--temperature", "0"]
        assert generate.main(arguments) == 0
        head, _, *lines = capsys.readouterr().out.splitlines()
        assert [part.strip() for part in head.split("│")] == ["static", "adapted"]
        columns = zip(*(line.split(" │") for line in lines if " │" in line), strict=True)
        texts[document] = ["".join(part.strip() for part in column) for column in columns]
    assert texts["b.txt"][0] == texts["0"][0]  # the initial weights have read neither
    assert "read(line)" in texts["b.txt"][1]
    assert "read(line)" not in texts["0"][1]


def test_what_is_not_forgotten_is_not_read_alone(config, capsys):
    assert fit.main(["--config", config(reset={"every": "never"})]) == 0
    capsys.readouterr()
    assert generate.main(["--run", "out"]) == 2
    message = "error: run must have kept what a document taught where it is not forgotten, got nothing"
    assert capsys.readouterr().err.startswith(message)


def test_kept_or_read_again_it_is_the_same(config, capsys):
    shown = []
    for keep in (None, "weights"):
        assert fit.main(["--config", config(keep=keep), "--overwrite", "true"]) == 0
        capsys.readouterr()
        assert generate.main(["--run", "out", "--document", "a.txt", "--prompt", "It was", "--seed", "5"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "a.txt"], "run must be given, got nothing"),
        (["--run", "nothing"], "run must be the folder of a run, got nothing; it has no config.yaml"),
        (["--run", "out", "--document", "c.txt"], "document must be one of 2, as a.txt, got c.txt"),
        (["--run", "out", "--tokens", "0"], "tokens must be a whole number from 1 to 100000, got 0"),
        (["--run", "out", "--tokens", "x"], "tokens must be a whole number from 1 to 100000, got x"),
        (["--run", "out", "--temperature", "-1"], "temperature must be a number from 0 to 100, got -1"),
        (
            ["--run", "out", "--lr", "1"],
            "an option must be one of --run, --document, --prompt, --tokens, --temperature, --behind, --seed, got --lr",
        ),
    ],
)
def test_what_cannot_be_generated_is_told(config, capsys, arguments, message):
    Path("out").mkdir(exist_ok=True)
    shutil.copy(config(), "out/config.yaml")
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


# Watching


def lines_from(text, monkeypatch):
    """Makes a text the standard input."""
    reading, writing = os.pipe()
    os.write(writing, text.encode(errors="surrogateescape"))
    os.close(writing)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(os.fdopen(reading, "rb")))


def test_the_line_that_is_not_like_the_others_is_printed(config, capsys, monkeypatch):
    usual = [f"2026-01-{1 + i % 28:02} 12:00:{i % 60:02} worker {i % 7} done" for i in range(120)]
    usual[100] = "Traceback: KeyError \x1b[31m in ✗ zone"
    lines_from("\n".join(usual), monkeypatch)
    settings = {"update": {"class_path": "AdamW", "init_args": {"lr": 0.01}}}
    assert watch.main(["--config", config(**settings)]) == 0
    head, *told = capsys.readouterr().out.splitlines()
    assert head.split() == ["line", "adapted", "static", "bits", "per", "byte"]
    printed = told[: told.index("")]
    assert [line.split()[0] for line in printed if "Traceback" in line] == ["101"]
    assert len(printed) < 12
    assert all("\x1b" not in line for line in told)
    assert told[told.index("") + 1].startswith("120 lines, ")
    assert told[told.index("") + 2] == "the most surprising:"
    assert told[told.index("") + 3].split()[0] == "101"
    assert len(told[told.index("") + 3 :]) == 10
    assert min(int(line.split()[0]) for line in told[told.index("") + 3 :]) > 50  # learned from alone


def test_lines_are_those_of_grep_and_bytes_those_of_the_input(config, capsys, monkeypatch):
    lines_from("a\fb\rc\u2028d\ne\n\udce9\udce9", monkeypatch)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            lines, "lines_of", lambda *arguments: [seen.append(line) or line for line in lines_of(*arguments)]
        )
        assert watch.main(["--config", config()]) == 0
    assert [(line.number, line.bytes) for line in seen] == [(1, 10), (2, 2), (3, 2)]
    assert "\n3 lines, " in capsys.readouterr().out


@pytest.mark.parametrize("when", ["reading", "waiting"])
def test_a_watch_that_is_stopped_keeps_what_it_has_learned(config, capsys, monkeypatch, when):
    settings = config(update={"class_path": "AdamW", "init_args": {"lr": 0.01}})
    if when == "reading":
        lines_from("It was a fine day.\n" * 400, monkeypatch)
        read = Reader.read

        def stops(self, text):
            signal.raise_signal(signal.SIGTERM)
            return read(self, text)

        monkeypatch.setattr(Reader, "read", stops)
    else:
        reading, writing = os.pipe()
        os.write(writing, b"It was a fine day.\n" * 20)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(os.fdopen(reading, "rb")))
        # To the main thread, as a signal from outside comes: one that another thread raises wakes nobody.
        main = threading.main_thread().ident
        threading.Timer(4, signal.pthread_kill, [main, signal.SIGTERM]).start()
    status = watch.main(["--config", settings, "--state", "kept", "--wait", "0.1"])
    assert status == 128 + signal.SIGTERM
    told = capsys.readouterr().out
    assert re.search(r"\n(20|[12]\d\d) lines, ", told)
    assert Path("kept/reader.sealed").exists()


@pytest.mark.parametrize(("state", "message"), [("run.yaml", "File exists"), ("/proc/nothing", "No such file")])
def test_a_state_that_cannot_be_kept_is_told_before_anything_is_read(config, capsys, monkeypatch, state, message):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert watch.main(["--config", config(), "--state", state]) == 2
    assert message in capsys.readouterr().err


def test_a_watch_goes_on_where_the_last_one_ended(config, capsys, monkeypatch):
    settings = config(update={"class_path": "AdamW", "init_args": {"lr": 0.01}})
    scores = []
    for _ in range(2):
        lines_from("It was a fine day.\n" * 20, monkeypatch)
        assert watch.main(["--config", settings, "--state", "kept"]) == 0
        scores.append(float(capsys.readouterr().out.split("→ ")[1].split()[0]))
    assert scores[1] < 0.5 * scores[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"context": {"class_path": "TransformerXL", "init_args": {"segment": 16, "memory": 32, "refresh": 2}}},
        {"objective": {"class_path": "Replayed", "init_args": {"segments": 2}}},
    ],
)
def test_what_looks_back_by_segments_is_refused_at_the_start(config, capsys, changes):
    assert watch.main(["--config", config(**changes)]) == 2
    assert "where what is read ends in the middle of a segment" in capsys.readouterr().err


def test_where_numbers_go_wrong_a_watch_says_so(config, capsys, monkeypatch):
    lines_from("It was a fine day.\n" * 20, monkeypatch)
    wild = config(update={"class_path": "SGD", "init_args": {"lr": 1e12}}, on_failure="static")
    assert watch.main(["--config", wild]) == 0
    assert "warning: read by the initial weights from where numbers went wrong" in capsys.readouterr().out


def test_a_line_has_the_nats_of_the_tokens_that_begin_in_it():
    table = pd.DataFrame(
        {"text": ["ab", "c\nd", "e\n", "\n", "f"], "nats": [1.0, 2, 4, 8, 16], "static_nats": [1.0] * 5}
    )
    lines = list(lines_of("abc\nde\n\nf", table, first=5))
    assert [(line.number, line.text, line.bytes, line.nats, line.static_nats) for line in lines] == [
        (5, "abc", 4, 3.0, 2.0),
        (6, "de", 3, 4.0, 1.0),
        (7, "", 1, 8.0, 1.0),
        (8, "f", 1, 16.0, 1.0),
    ]


def test_few_lines_surprise_more_than_most():
    exact, numbers = Surprising(0.05), random.Random(1)
    for i in range(300):  # no more than five of a hundred before may surprise more
        value, before = numbers.random(), list(exact._last)
        told = exact.sees(Line(i, "", 1, value * math.log(2), None))
        assert told == (len(before) >= 50 and sum(each > value for each in before) <= 0.05 * len(before))
    surprising, numbers = Surprising(0.02), random.Random(0)
    told = [surprising.sees(Line(i, "", 1, numbers.random(), None)) for i in range(2000)]
    assert not any(told[:50])
    assert 10 < sum(told) < 80
    assert surprising.sees(Line(0, "", 1, 9.0, None))
    assert not surprising.sees(Line(0, "", 1, 0.5, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "2"], "share must be a number from 1e-06 to 1, got 2"),
        (["--wait", "soon"], "wait must be a number from 0.001 to 3600, got soon"),
        (["--confg", "x"], "confg"),
    ],
)
def test_what_cannot_be_watched_is_told(config, capsys, arguments, message):
    config()
    assert watch.main(["--config", "run.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
