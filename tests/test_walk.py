"""Walk: a sample of the types that `python -m experiments families` reads, in its cheapest cells, as its page says."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import __main__ as command  # noqa: E402 # a folder beside the tests, not installed
from experiments.families import cells, page, rows, tiny, walk  # noqa: E402

README = page.README.read_text("utf-8")
PINNED = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]
pytestmark = pytest.mark.skipif(
    transformers.__version__ != PINNED, reason=f"the page is of transformers {PINNED}, which is not what is installed"
)
CHEAPEST = ["windows", "memory", "one forward", "together", "mixture"]
SAMPLE = [
    "llama", "gpt2", "gemma3_text", "mistral", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "falcon", "bloom",
    "mpt", "lfm2", "bamba", "falcon_h1", "qwen3_next", "mamba2", "mamba", "rwkv", "recurrent_gemma", "cohere2",
]  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """Of each type that the page has a row of, the mark in each column."""
    lines = re.findall(r"^\| (.*) \|$", README.partition("## Types")[2].partition("## Reasons")[0], re.M)
    head, *types = (line.split(" | ") for line in lines if not line.startswith("---"))
    return {name: dict(zip(head[1:], (mark.split()[0] for mark in marks), strict=True)) for name, *marks in types}


def test_the_page_is_of_the_installed_version_and_has_no_mistake():
    assert f"of transformers {transformers.__version__} knows" in " ".join(README.split())
    assert not {name: marks for name, marks in table().items() if any("**" in mark for mark in marks.values())}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_is_served_as_the_page_says(name):
    row = rows.row_of(name, CHEAPEST)
    assert not row.mistakes, walk.in_a_line(row)
    if row.loading.kind != "right":
        assert name not in table()
        return
    marks = {column: page.MARKS[outcome.kind] for column, outcome in row.cells.items()}
    assert marks == {column: table()[name][column] for column in CHEAPEST}


def test_weights_that_do_not_learn_would_be_seen(tmp_path):
    tiny.save("llama", tmp_path)
    subject = cells.Subject(tmp_path)
    subject.in_windows = subject.static
    assert cells.windows(subject).kind == "WRONG"
    assert cells.together(subject).kind == "WRONG"


def test_a_type_that_hangs_or_crashes_does_not_end_the_walk(monkeypatch):
    monkeypatch.setattr(rows, "row_of", lambda name, columns: os._exit(3))
    assert rows.in_process("llama").loading == cells.Outcome("TRACEBACK", "the process ended with exit status 3")
    monkeypatch.setattr(rows, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(rows, "row_of", lambda name, columns: time.sleep(60))
    assert rows.in_process("llama").loading == cells.Outcome("TRACEBACK", "took longer than 0.1 s")


def test_a_type_that_is_unknown_is_named(capsys):
    assert command.main(["families", "nonsense"]) == 2
    assert "the type must be one that AutoModelForCausalLM knows, got nonsense" in capsys.readouterr().err
