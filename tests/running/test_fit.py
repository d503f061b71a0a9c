"""The command line: its help, its configurations, what a run leaves, and the line that shows how far it is."""

import itertools
import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from folders import DOCUMENTS, configuration
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from lightning.pytorch import Trainer
from models import tiny
from peft import LoraConfig, get_peft_model
from running import TRAINER, document, random_tokens
from transformers import AutoModelForCausalLM

from dynlight import DocumentProgress, DocumentStream, DynamicEvaluation, Pretrained, TransformerXL, fit
from dynlight.pretraining import __main__ as pretraining
from dynlight.recording import progress
from dynlight.running import fitting
from dynlight.running.configuration import parse, parser
from dynlight.running.help import help_text
from dynlight.running.messages import setting_names

ROOT = Path(__file__).parents[2]
SAME_IN_EVERY_RUN = ["segments.parquet", "tokens.parquet", "documents.csv"]


@pytest.fixture
def run(library, tmp_path, monkeypatch, capsys):
    """Runs a configuration with these changes of whole sections, and these arguments behind it."""
    monkeypatch.chdir(tmp_path)

    def run(changes=None, arguments=()):
        config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / "out") | (changes or {})
        Path("first.yaml").write_text(yaml.safe_dump(config))
        status = fit.main(["--config", "first.yaml", *map(str, arguments)])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def printed(capsys):
    """What `--print_config` prints behind these arguments, as text."""

    def printed(*arguments):
        with pytest.raises(SystemExit) as exit:
            fit.main([*arguments, "--print_config"])
        assert not exit.value.code
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return printed


QUICKSTART = ["--config", str(ROOT / "configs/quickstart.yaml")]


def parsed(arguments):
    config = parse(arguments).as_dict()
    del config["config"]  # where it was read from
    return config


def leaves(tree, above=""):
    for name, value in tree.items():
        path = f"{above}{name}"
        if isinstance(value, dict) and name != "init_args":
            yield from leaves(value, f"{path}.")
        elif isinstance(value, dict):
            yield from leaves(value, above)  # --update.lr, not --update.init_args.lr
        else:
            yield path, value


# Help and configurations


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], [*QUICKSTART, "--help"]])
def test_help_is_short_and_names_every_section(capsys, arguments):
    assert fit.main(arguments) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert output.err == ""
    settings = {name.split(".")[0] for name in setting_names(parser())}
    assert settings >= {"model", "context", "update", "out"}
    words = set(re.findall(r"[a-z_]+", "\n".join(line[:20] for line in lines if line.startswith("  "))))
    assert settings <= words, f"not in the help: {settings - words}"


def test_the_help_names_settings_that_exist():
    names = setting_names(parser())
    for section in ("model", "data", "schedule", "reset", "trainer"):
        (text,) = re.findall(rf"^  {section} [^:]*: (.*(?:\n {{20}}.*)*)$", help_text(), re.MULTILINE)
        words = re.findall(r"[a-z_]+", re.sub(r"\([^)]*\)", "", text))
        assert words
        for word in words:
            assert f"{section}.{word}" in names


def test_the_printed_configuration_is_whole_and_parses_back_to_itself(printed, tmp_path):
    text = printed(*QUICKSTART)
    sections = yaml.safe_load(text)
    assert {name.split(".")[0] for name in setting_names(parser())} == set(sections)
    assert sections["update"] == {"class_path": "torch.optim.Adam"} | {"init_args": sections["update"]["init_args"]}
    (tmp_path / "printed.yaml").write_text(text)
    again = ["--config", str(tmp_path / "printed.yaml")]
    assert parsed(again) == parsed(QUICKSTART)
    assert printed(*again) == text


def test_every_value_can_be_given_behind_the_file(printed):
    config = yaml.safe_load(printed(*QUICKSTART, "--trainer.logger", "false"))
    values = list(leaves(config))
    assert len(values) > 40
    arguments = []
    for path, value in values:
        if not path.endswith("class_path") and path != "trainer.devices":  # where the text 1 is another value
            arguments += [f"--{path}", json.dumps(value) if not isinstance(value, str) else value]
    assert parsed([*QUICKSTART, "--trainer.logger", "false", *arguments]) == parsed(
        [*QUICKSTART, "--trainer.logger", "false"]
    )


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--update.lr", "1e-3"], "update.init_args.lr", 1e-3),
        (["--update", "null"], "update", None),
        (["--update", "AdamW", "--update.lr", "1"], "update.init_args.lr", 1.0),
        (["--update", "dynlight.RMSDynamic", "--update.lr", "1"], "update.class_path", "dynlight.RMSDynamic"),
        (["--context.segment", "3"], "context.init_args.segment", 3),
        (["--context=Overlapping", "--context.segment=3", "--context.window=9"], "context.init_args.window", 9),
        (["--parameters", "LoRA", "--parameters.rank", "2"], "parameters.init_args.rank", 2),
        (["--parameters", "Matching", "--parameters.blocks", "[-1, -1]"], "parameters.init_args.blocks", [-1, -1]),
        (["--schedule.every", "{0: 1, 4: 2}"], "schedule.every", {0: 1, 4: 2}),
        (["--schedule.every", "never"], "schedule.every", "never"),
        (["--reference", "null"], "reference", None),
        (["--clip", "1"], "clip", 1.0),
        (["--data.data_files", "[a.txt, b.txt]"], "data.data_files", ["a.txt", "b.txt"]),
        (["--trainer.logger", "false"], "trainer.logger", False),
        (["--out", "there"], "out", "there"),
    ],
)
def test_the_command_line_overrides_the_file(arguments, path, value):
    found = parsed([*QUICKSTART, *arguments])
    for name in path.split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=[str(file.relative_to(ROOT)) for file in CONFIGS])
def test_every_shipped_configuration_parses_by_the_command_in_its_first_line(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = file.read_text("utf-8").splitlines()[0]
    command, question = re.fullmatch(r"# python -m (dynlight\.\w+ .+?) — (.+)", first).groups()
    module, *arguments = shlex.split(command)
    assert arguments[:2] == ["--config", str(file.relative_to(ROOT))]
    assert "?" in question or "methods" in file.parts, "the methods are named instead"
    parsers = {"dynlight.fit": parse, "dynlight.pretraining": pretraining.parse}
    config = parsers[module](arguments)
    assert config.out is None or config.out.startswith(("runs/", "experiments/ladder/"))


# What a run leaves


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {
            "context": {"class_path": "Overlapping", "init_args": {"segment": 16, "window": 32}},
            "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "update": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
            "schedule": {"every": {0: 1, 2: 2}},
        },
        {
            "parameters": {"class_path": "Matching", "init_args": {"names": "mlp", "blocks": [-2, -1]}},
            "schedule": {"passes": 2},
            "reset": {"every": "never"},
            "reference": None,
            "clip": 0.5,
        },
        {
            "gradient": [
                {"class_path": "Sparse", "init_args": {"share": 0.2}},
                {"class_path": "Compressed", "init_args": {"bits": 4}},
            ]
        },
        {"update": None},
    ],
    ids=["all", "lora", "matching", "gradient", "static"],
)
def test_the_configuration_that_a_run_leaves_gives_the_same_numbers_again(run, tmp_path, choices):
    assert run(choices)[0] == 0
    first, second = tmp_path / "out", tmp_path / "again"
    # Other random numbers were drawn in between, as in another process.
    torch.manual_seed(1)
    assert fit.main(["--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    for name in SAME_IN_EVERY_RUN:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second))
    assert (old.pop("out"), new.pop("out")) == (str(first), str(second))
    assert old == new


def test_another_configuration_gives_other_numbers(run, tmp_path):
    # What the test above compares can differ.
    assert run()[0] == 0
    assert run(arguments=["--out", tmp_path / "other", "--update.lr", "0.04"])[0] == 0
    for name in SAME_IN_EVERY_RUN:
        assert (tmp_path / "out" / name).read_bytes() != (tmp_path / "other" / name).read_bytes(), name


def test_a_run_is_named_by_its_configuration_and_replaced_when_asked(run, tmp_path):
    assert run({"out": None})[0] == 0
    folder = tmp_path / "runs/first"
    assert {*SAME_IN_EVERY_RUN, "config.yaml", "summary.json", "report.html"} <= {
        file.name for file in folder.iterdir()
    }
    (folder / "left.txt").write_text("from before")
    assert run({"out": None})[0] == 2
    assert (folder / "left.txt").exists()
    assert run({"out": None}, ["--overwrite", "true"])[0] == 0
    assert not (folder / "left.txt").exists()


def test_nothing_is_printed_but_the_table_and_the_paths(run, tmp_path):
    status, output = run()
    assert status == 0
    lines = output.out.splitlines()
    assert lines[0].split() == ["document", "tokens", "static", "adapted", "gain", "%", "FLOPs"]
    assert [line.split()[0] for line in lines[2:4]] == list(DOCUMENTS)
    assert lines[-1] == f"report  {tmp_path}/out/report.html"
    (shown,) = output.err.splitlines()
    assert re.fullmatch(
        r"█{12} 100% · 2/2 documents · [\d,]+ tok/s · bits per byte static \d\.\d\d → adapted \d\.\d\d · 0:00 left",
        shown,
    )


def test_a_folder_that_cannot_be_finished_is_removed_and_one_with_rows_kept(run, tmp_path, monkeypatch):
    def fail(self, trainer, pl_module, *batch):
        raise ValueError("a bug")

    monkeypatch.setattr(fitting.FlopsLogger, "on_train_batch_end", fail)
    with pytest.raises(ValueError, match="a bug"):
        run()
    assert (tmp_path / "out/rows").is_dir()
    monkeypatch.setattr(fitting.FlopsLogger, "on_train_start", fail)
    with pytest.raises(ValueError, match="a bug"):
        run({"out": str(tmp_path / "second")})
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_download_is_shown_on_a_terminal_alone(library, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    Pretrained(str(library / "model")).load_tokenizer()
    assert are_progress_bars_disabled() is not is_terminal
    disable_progress_bars()


# The line that shows how far it is


def shown(monkeypatch, capsys, *, columns, documents=3, seconds=0.5, **choices):
    """What a run writes to a standard error that is a terminal of so many columns, or none."""
    clock = itertools.count(0, seconds)  # it goes on by so much each time it is looked at
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: columns is not None, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = DocumentStream.of([document(random_tokens(320, i), i) for i in range(documents)])
    update = partial(torch.optim.SGD, lr=0.1)
    module = DynamicEvaluation(tiny(), None, context=TransformerXL(16, 32), **({"update": update} | choices))
    settings = {name: value for name, value in TRAINER.items() if name != "enable_progress_bar"}
    Trainer(callbacks=[DocumentProgress()], **settings).fit(module, stream)
    monkeypatch.undo()
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_shows_one_line_that_does_not_wrap(monkeypatch, capsys, columns):
    text = shown(monkeypatch, capsys, columns=columns)
    assert text.endswith("\n")
    assert text.count("\n") == 1
    lines = [line.removesuffix("\x1b[K") for line in text.removesuffix("\n").split("\r")[1:]]
    assert len(lines) > 10
    assert all(len(line) < columns for line in lines)
    assert "100%" in lines[-1]
    if columns >= 80:
        pattern = r"3/3 documents · [\d,]+ tok/s · .*static (\d+\.\d\d) → adapted (\d+\.\d\d) · 0:00 left"
        static, adapted = map(float, re.search(pattern, lines[-1]).groups())
        assert static > adapted > 0
        assert "1/3 documents" in text
        assert (": " in text) is False
    assert ("bits per byte" in lines[-1]) is (columns >= 100)


def test_elsewhere_a_line_comes_every_ten_seconds_and_at_the_end(monkeypatch, capsys):
    # 60 segments, at each of which the clock is looked at once, and once more for the line itself.
    lines = shown(monkeypatch, capsys, columns=None, seconds=2.0).splitlines()
    assert all(line.count("documents") == 1 for line in lines)
    assert not any(sign in "".join(lines) for sign in "\r\x1b")
    segments_a_line = 60 / (len(lines) - 1)
    assert 4 <= segments_a_line <= 5
    assert "3/3 documents" in lines[-1]
    assert len(shown(monkeypatch, capsys, columns=None, seconds=0.01).splitlines()) == 1


def test_without_a_reference_there_is_one_number(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, columns=120, reference=None)
    assert "static" not in text
    assert re.search(r"bits per byte \d+\.\d\d · ", text)


def test_the_time_left_follows_from_the_tokens_left(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, columns=120, seconds=60.0, documents=2)
    shares = [int(share) for share in re.findall(r"(\d+)% · ", text)]
    assert shares == sorted(shares)
    left = [int(h or 0) * 60 + int(m) for h, m in re.findall(r"(?:(\d+):)?(\d+):00 left", text)]
    assert left[0] > left[len(left) // 2] > left[-1] == 0
    assert max(left) > 60, "hours are shown where there are some"


def test_an_adapter_saved_beside_the_weights_is_part_of_the_model(run, library, tmp_path):
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(library / "model"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    both = shutil.copytree(library / "model", tmp_path / "both")
    adapted.save_pretrained(both)
    merged = shutil.copytree(library / "model", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(merged)

    def nats(model, **changes):
        assert run({"model": {"pretrained": str(model)}, **changes}, ["--overwrite", "true"])[0] == 0
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        return summary["static"]["nats"], summary["nats"]

    lora = {"class_path": "LoRA", "init_args": {"rank": 2}}
    for changes in ({}, {"update": {"class_path": "SGD", "init_args": {"lr": 0.3}}}, {"parameters": lora}):
        assert nats(both, **changes) == pytest.approx(nats(merged, **changes), rel=1e-6)
    assert nats(both)[0] != pytest.approx(nats(library / "model")[0], rel=1e-3)


def test_an_adapter_that_cannot_be_merged_is_refused(run, library, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"])
    both = shutil.copytree(library / "model", tmp_path / "both")
    get_peft_model(AutoModelForCausalLM.from_pretrained(library / "model"), config).save_pretrained(both)
    status, output = run({"model": {"pretrained": str(both)}})
    must = "model.pretrained must hold no adapter but of a kind that can be merged into its weights"
    line = f"error: {must}, got {both}; merge it yourself (merge_and_unload of peft) and save that"
    assert (status, output.err.splitlines()[-1]) == (2, line)
