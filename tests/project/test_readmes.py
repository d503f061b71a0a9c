"""What README, CONTRIBUTING and the files beside the code say: commands, blocks, tables and links hold."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cheats import CHEATS, HONEST
from folders import configuration

from dynlight import audit, fit
from dynlight.recording.rows import MIXTURE_SCHEMAS, SCHEMAS
from dynlight.running.configuration import check_settings, parse, parser
from dynlight.running.messages import setting_names

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
AUDITING, RECORDING = ROOT / "dynlight/auditing/README.md", ROOT / "dynlight/recording/README.md"
CONFIGS = ROOT / "configs/README.md"
READMES = [README, CONTRIBUTING, AUDITING, RECORDING, CONFIGS]
IDS = [str(path.relative_to(ROOT)) for path in READMES]
# What a YAML block that shows a few sections leaves to the reader.
USUAL = {
    "model": {"pretrained": "tiny-books"},
    "data": {"path": "python-stdlib"},
    "context": {"class_path": "TransformerXL", "init_args": {"segment": 64, "memory": 256}},
}


def blocks(*languages):
    """The code blocks in these languages, named by where they stand."""
    return [
        pytest.param(code, id=f"{path.relative_to(ROOT)} {code.strip().splitlines()[0]}"[:60])
        for path in READMES
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
        if language in languages
    ]


def commands():
    """The commands of all blocks, and those within a sentence."""
    texts = [param.values[0].replace("\\\n", " ") for param in blocks("bash")]
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    spans = [span for path in READMES for span in re.findall(r"`((?:make|python -m) [^`]+)`", path.read_text("utf-8"))]
    return sorted({*filter(None, lines), *spans})


def table(path, heading):
    """The rows of the first table below a heading, each a list of its cells."""
    _, _, below = f"\n{path.read_text('utf-8')}".partition(f"\n{heading}\n")
    rows = re.search(r"(?:^\|.*\n)+", below, re.M)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("|---")]


def names(path, heading):
    """What the first column of a table names, without its head."""
    return [name for row in table(path, heading)[1:] for name in re.findall(r"`([^`]+)`", row[0])]


def anchor(heading):
    """The name under which a heading can be linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Blocks, commands, links


def test_every_block_is_tested_here_or_is_output():
    assert blocks("python") and blocks("bash") and blocks("yaml")
    languages = {language for path in READMES for language in re.findall(r"^```(\w+)$", path.read_text("utf-8"), re.M)}
    assert languages == {"python", "bash", "yaml"}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_is_a_run(code, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(USUAL | yaml.safe_load(code)), "utf-8")
    check_settings(parse(["--config", str(tmp_path / "run.yaml")]))


@pytest.mark.parametrize("line", commands())
def test_a_command_exists(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = shlex.split(line)
    if command[0] == "make":
        assert f"\n{command[1]}:" in Path("Makefile").read_text("utf-8")
    if "-m" in command and not command[0].startswith(".venv"):
        module = Path(command[command.index("-m") + 1].replace(".", "/"))
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    for argument in command:
        if argument.startswith(("configs/", "experiments/", "dynlight/", "tests/")):
            assert Path(argument).exists()
    file = command[command.index("--config") + 1] if "--config" in command else ""
    if command[:3] in (["python", "-m", "dynlight.fit"], ["python", "-m", "dynlight.audit"]) and Path(file).is_file():
        own = ("--print_config", "--decode")
        check_settings(parse([argument for argument in command[3:] if argument not in own]))


@pytest.mark.parametrize("path", READMES, ids=IDS)
def test_links_lead_somewhere(path):
    text = path.read_text("utf-8")
    wrong = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, part = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists():
            wrong.append(target)
        elif part:
            headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
            wrong += [target] * (part not in map(anchor, headings))
    assert wrong == []


@pytest.mark.parametrize("path", READMES, ids=IDS)
def test_lines_are_not_wider_than_120(path):
    lines = path.read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_readme_is_for_a_newcomer():
    assert len(README.read_text("utf-8").splitlines()) <= 200


# Configurations


def test_every_configuration_is_listed():
    listed = re.findall(r"\[(\w+)\]\(([\w/]+\.yaml)\)", CONFIGS.read_text("utf-8"))
    in_tables = {file for name, file in listed if name == Path(file).stem}
    assert in_tables == {str(path.relative_to(CONFIGS.parent)) for path in CONFIGS.parent.rglob("*.yaml")}


def test_every_setting_is_listed():
    settings = set(setting_names(parser()))
    assert set(names(CONFIGS, "## Sections")) == {setting.split(".")[0] for setting in settings}
    for name, text in table(CONFIGS, "## Sections")[1:]:
        words = re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text)))
        section = name.strip("`")
        if section in ("model", "data", "trainer", "schedule", "reset"):
            assert {setting.split(".")[1] for setting in settings if setting.startswith(f"{section}.")} <= set(words)


def test_the_choices_of_readme_are_sections():
    chosen = names(README, "## A run is these choices")
    assert chosen == [
        "context",
        "parameters",
        "objective",
        "update",
        "gradient",
        "schedule",
        "reset",
        "mixture",
        "memories",
    ]
    assert set(chosen) <= {setting.split(".")[0] for setting in setting_names(parser())}


# What a run leaves


@pytest.fixture(scope="module")
def left(tmp_path_factory, library):
    """The folder of a finished run of a mixture, which leaves every file there is."""
    folder = tmp_path_factory.mktemp("left") / "out"
    config = configuration(library / "model", f"{library}/documents/*.txt", folder)
    config |= {"update": None, "mixture": {}, "keep": "weights"}
    (folder.parent / "run.yaml").write_text(yaml.safe_dump(config), "utf-8")
    assert fit.main(["--config", str(folder.parent / "run.yaml")]) == 0
    return folder


def test_every_file_of_a_run_is_listed(left):
    assert sorted(names(RECORDING, "# What a run leaves")) == sorted(path.name for path in left.iterdir())


@pytest.mark.parametrize("name", [*SCHEMAS, "experts"])
def test_every_column_is_listed(name):
    schemas = SCHEMAS | MIXTURE_SCHEMAS
    assert names(RECORDING, f"## `{name}.parquet`") == schemas[name].names


def test_every_column_of_documents_is_listed(left):
    assert names(RECORDING, "## `documents.csv`") == [*pd.read_csv(left / "documents.csv").columns]


@pytest.mark.parametrize("name", ["summary.json", "run.json", "receipt.json"])
def test_every_key_is_listed(left, name):
    assert names(RECORDING, f"## `{name}`") == [*json.loads((left / name).read_text("utf-8"))]


# Audits


def test_every_check_is_listed():
    result = audit.audit(lambda documents: [[1.0] * len(each) for each in documents], [[1, 2], [0, 1]], vocabulary=3)
    checks = [check.name for check in result.checks]
    assert [row[0] for row in table(AUDITING, "## What each check proves")[1:]] == checks


def test_every_cheat_is_listed_and_caught_by_the_check_that_is_made_for_it():
    head, *rows = table(AUDITING, "## How often each check catches each cheat")
    honest, cheats = rows[: len(HONEST) + 1], rows[len(HONEST) + 1 :]
    assert [row[0] for row in honest] == [*HONEST, "state carried over"]
    assert {cell for row in honest for cell in row[2:]} == {"·"}
    assert [row[0] for row in cheats] == [*CHEATS]
    for name, policy, *caught in cheats:
        assert policy == CHEATS[name].policy
        assert caught[head.index(CHEATS[name].caught_by) - 2] == "20"
