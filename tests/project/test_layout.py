"""The house: its wings, the way imports go, and what stands at its top."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dynlight"
WINGS = ("documents", "choices", "learning", "recording", "running", "using", "auditing", "pretraining")
DOORS = ("fit", "audit", "report", "compare", "dashboard", "generate", "watch", "tasks", "compress", "decompress")


def test_no_import_runs_up_and_there_is_no_circle():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_at_the_top_are_wings_and_doors_and_what_they_all_stand_on():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert files == {"__init__", *DOORS, "arguments", "errors", "durable"}
    assert folders == set(WINGS)


@pytest.mark.parametrize("door", DOORS)
def test_the_help_of_a_door_imports_no_library_that_takes_long(door):
    code = f"import sys; from dynlight.{door} import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"python -m dynlight.{door}" in done.stdout
    assert {"torch", "transformers", "lightning", "numpy", "wandb"}.isdisjoint(done.stdout.splitlines()[-1].split())


def test_a_step_asks_nothing_of_mixtures_failures_shards_or_processes():
    """`training_step` and what it calls directly fit on one screen, and read as score, commit, learn."""
    source = (PACKAGE / "learning/module.py").read_text("utf-8")
    (module,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    steps = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name in ("training_step", "_score_and_learn")
    ]
    assert len(steps) == 2
    assert sum(step.end_lineno - step.lineno + 1 for step in steps) <= 45, "one screen"
    conditions = [
        ast.unparse(node.test)
        for step in steps
        for node in ast.walk(step)
        if isinstance(node, ast.If | ast.IfExp | ast.While)
    ]
    assert not [
        test for test in conditions if any(word in test for word in ("mixture", "on_failure", "way", "Stacked"))
    ]
