"""Private names of libraries: each that is used stands in CONTRIBUTING.md with its reason, and is still there."""

import ast
import re
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from wandb_workspaces.workspaces import Workspace

ROOT = Path(__file__).parents[2]
TABLE = re.findall(r"^\| `(\S+)` \| `(\S+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
MADE = {each.__name__: each for each in (DDPStrategy, ModelParallelStrategy)}
MADE["Workspace"] = partial(Workspace, entity="entity", project="project")
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in (ROOT / "dynlight").rglob("*.py")
}


def private_names(tree):
    """Private names that are looked up in something, as `x._name` or `getattr(x, "_name")`, or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dynlight"):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]


def own_names(tree):
    """Names that a file defines: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def foreign_names():
    """Of each private name of a library that is used, the name and the file."""
    own = {name for tree in TREES.values() for name in own_names(tree)} - {"_data_parallel_size", "_internal_name"}
    documented = {"_replace"}  # of named tuples
    return {
        (name, path)
        for path, tree in TREES.items()
        for name in private_names(tree)
        if re.match(r"_[^_]", name) and name not in own | documented
    }


def test_each_one_that_is_used_stands_in_the_table_and_no_other():
    rows = [(name.rpartition(".")[2], path) for name, path in TABLE]
    unlisted = {
        (name, path)
        for name, path in foreign_names()
        if not any(fnmatch(name, pattern) and path == file for pattern, file in rows)
    }
    assert not unlisted
    unused = {
        (pattern, file)
        for pattern, file in rows
        if not any(fnmatch(name, pattern) and path == file for name, path in foreign_names())
    }
    assert not unused


@pytest.mark.parametrize("name", [name for name, _ in TABLE])
def test_it_is_still_there(name):
    first, *attributes = name.split(".")
    value = MADE[first]() if first in MADE else torch
    for attribute in attributes:
        names = dir(value) if attribute.endswith("*") else [attribute]
        assert any(fnmatch(each, attribute) and hasattr(value, each) for each in names), f"{name} is gone"
        value = getattr(value, attribute, None)
