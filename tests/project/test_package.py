"""The package as it leaves this folder: what the wheel holds, what is declared, what importing does."""

import ast
import importlib.metadata
import inspect
import os
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dynlight

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PACKAGE = ROOT / "dynlight"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
WINGS = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def run(*command: str, folder: Path, **environment: str) -> str:
    """Runs a command in a folder and returns what it printed; a failure shows it."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_in_git() -> list[Path]:
    """Every file that is tracked, or would be by `git add .`."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


# The wheel

DATA = {f"dynlight/assets/tiny-books/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
DATA |= {"dynlight/py.typed", "dynlight/pretraining/card.md.jinja"}
DATA |= {f"dynlight/recording/{name}.html.jinja" for name in ("report/frame", "report/report", "comparison/compare")}


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    script = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    name = run(sys.executable, "-c", script, str(tmp_path), folder=ROOT).split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        inside = set(wheel.namelist())
    described = {each for each in inside if each.startswith("dynlight-0.1.0.dist-info/")}
    package = {str(path.relative_to(ROOT)) for path in files_in_git() if path.is_relative_to(PACKAGE)}
    assert inside - described == package
    assert inside >= DATA
    assert "dynlight-0.1.0.dist-info/licenses/LICENSE" in described


def test_assets_are_small():
    files = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 8_000_000


def test_version_is_said_once():
    assert PYPROJECT["project"]["version"] == importlib.metadata.version("dynlight")
    assert f"## [{PYPROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# Public names


@pytest.mark.parametrize("name", dynlight.__all__)
def test_public_names_are_documented(name):
    # A subclass would show its parent's docstring, so its own is asked for.
    value = getattr(dynlight, name)
    own = value.__dict__["__doc__"] if isinstance(value, type) else value.__doc__  # not that of a parent
    assert inspect.cleandoc(own or "")


def test_public_names_are_listed():
    assert set(dynlight.__all__) <= set(dir(dynlight))
    assert dynlight.__all__ == sorted(dynlight.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dynlight.Nothing


def test_public_names_are_the_same_to_a_type_checker():
    (block,) = (
        node for node in ast.parse(FILES[MODULES.index("dynlight")].read_text("utf-8")).body if isinstance(node, ast.If)
    )
    checked = {alias.name: each.module for each in block.body for alias in each.names}
    assert {name: f"dynlight.{module}" for name, module in dynlight._MODULES.items()} == checked


@pytest.mark.parametrize("path", WINGS, ids=lambda path: path.parent.name)
def test_a_wing_says_what_it_is_and_nothing_else(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1, "who needs a name of a wing imports it from its file"


def _private_uses(path: Path) -> Iterator[str]:
    """Names with a leading underscore that a file takes from a module of dynlight."""
    modules, files = set(), {path.stem for path in FILES}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dynlight":
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names if _is_private(alias.name))
        # `self._x` is a class's own; `module._x` is not.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_private(node.attr):
            yield from (f"{name}.{node.attr}" for name in modules & files if name == node.value.id)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_module():
    files = [*FILES, *(ROOT / "experiments").rglob("*.py")]
    assert {path.name: list(_private_uses(path)) for path in files if any(_private_uses(path))} == {}


# Importing


def _imported() -> set[str]:
    """The top-level modules that dynlight imports and that are no part of Python."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


LIBRARIES = f"import {', '.join(sorted(_imported() - {'dynlight'}))}, lightning.pytorch"


@pytest.mark.slow
def test_importing_leaves_no_trace(tmp_path):
    script = f"""
        import importlib, logging, os, sys, warnings
        import dynlight
        assert "torch" not in sys.modules, "import dynlight must not wait for torch"
        {LIBRARIES}
        def state():
            return {{
                "environment": dict(os.environ),
                "folder": sorted(os.listdir()),
                "random state": torch.get_rng_state().tolist(),
                "threads": torch.get_num_threads(),
                "dtype": torch.get_default_dtype(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "backend": matplotlib.rcParams["backend"],
                "log handlers": list(logging.root.handlers),
                "path": list(sys.path),
            }}
        before = state()
        for name in {MODULES}:
            importlib.import_module(name)
        after = state()
        changed = [key for key in before if before[key] != after[key]]
        assert not changed, changed
    """
    run(sys.executable, "-c", textwrap.dedent(script), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_module_may_be_imported_first(tmp_path):
    """Each in a process of its own, that has the libraries already and nothing of dynlight."""
    script = f"""
        import importlib, os, sys, traceback
        {LIBRARIES}
        assert "dynlight" not in sys.modules
        failed = []
        for name in {MODULES}:
            if (child := os.fork()) == 0:
                try:
                    importlib.import_module(name)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                failed.append(name)
        assert not failed, failed
    """
    run(sys.executable, "-c", textwrap.dedent(script), folder=tmp_path)


@pytest.mark.slow
def test_texts_in_memory_are_read_without_wandb_and_datasets(tmp_path):
    script = """
        import sys
        sys.modules |= {"wandb": None, "datasets": None}  # as if they were not installed
        from functools import partial
        import torch
        from lightning.pytorch import Trainer
        from dynlight import All, DocumentStream, DynamicEvaluation, Pretrained, Records, TransformerXL
        tiny, context = Pretrained("tiny-books"), TransformerXL(segment=16, memory=32)
        update = partial(torch.optim.SGD, lr=0.02)
        module = DynamicEvaluation(tiny.load(), tiny.load_tokenizer(), context=context, parameters=All(), update=update)
        records = Records()
        trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[records])
        trainer.fit(module, DocumentStream.from_texts(["It was a fine day. " * 9, "It rained. " * 9]))
        print(len(records.documents))
    """
    assert run(sys.executable, "-c", textwrap.dedent(script), folder=tmp_path).splitlines()[-1] == "2"


def test_the_help_is_there_at_once(tmp_path):
    """In less than a CPU second, the interpreter's start included; the quicker of two, as the first may read from disk."""
    seconds = []
    for _ in range(2):
        command = [sys.executable, "-X", "importtime", "-m", "dynlight.fit", "--help"]
        with (tmp_path / "imports").open("w+") as imports:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=imports)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 1
    imported = {line.rpartition("|")[2].strip() for line in (tmp_path / "imports").read_text().splitlines()}
    assert "dynlight.running.help" in imported
    assert {"torch", "transformers"}.isdisjoint(imported)


# What is declared


def test_dependencies_are_what_is_imported():
    distributions = importlib.metadata.packages_distributions()
    needed = {canonicalize_name(distributions[name][0]) for name in _imported() - {"dynlight"}}
    declared = {canonicalize_name(Requirement(each).name) for each in PYPROJECT["project"]["dependencies"]}
    optional = {
        canonicalize_name(Requirement(each).name)
        for extra in ("wandb", "compress", "lm-eval")
        for each in EXTRAS[extra]
    }
    assert declared == needed - optional
    assert optional < needed


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert [name for name, _ in pins] == sorted({name for name, _ in pins}, key=str.lower)
    return {canonicalize_name(name): version for name, version in pins}


def _requirements() -> list[Requirement]:
    lines = [*PYPROJECT["project"]["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    return [requirement for line in lines if (requirement := Requirement(line)).name != "dynlight"]


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_what_was_tested_is_within_the_bounds(requirement):
    assert requirement.specifier.contains(_pins("constraints.txt")[canonicalize_name(requirement.name)])
    assert ">=" in str(requirement.specifier), "a lower bound"


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    requirements = [Requirement(each) for each in PYPROJECT["project"]["dependencies"]]
    bounds = {
        canonicalize_name(requirement.name): bound.version
        for requirement in requirements
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    pins = _pins("constraints-oldest.txt")
    assert {name: pins[name] for name in bounds} == bounds


def test_the_oldest_versions_have_the_names_of_the_newest():
    """By these `make test-oldest` puts one in the place of the other."""
    newest, oldest = (
        {line.partition("==")[0] for line in (ROOT / file).read_text("utf-8").splitlines()}
        for file in ("constraints.txt", "constraints-oldest.txt")
    )
    by_name = {canonicalize_name(name): name for name in newest}
    assert {name for name in oldest if name not in newest and canonicalize_name(name) in by_name} == set()


def test_all_that_gets_installed_is_pinned():
    pins = _pins("constraints.txt") | _pins("constraints-oldest.txt")
    open_, seen, missing = [(each, "dynlight") for each in _requirements()], set(), []
    while open_:
        requirement, parent = open_.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins and parent != "torch":  # torch itself pins its CUDA libraries
            missing.append(f"{name} (for {parent})")
        if name not in pins or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that this environment goes without
        for need in map(Requirement, needs):
            extras = requirement.extras | {""}
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                open_.append((need, name))
    assert missing == []


# What must not be in a file

# In pieces, so that this file is not one of those that hold them.
MACHINE = ["/" + "work/", "/" + "root/", "/" + "home/"]
INDEX = ["py" + "pi.org", "python" + "hosted", "--index" + "-url", "find" + "-links", "download." + "pytorch"]


@pytest.mark.parametrize("text", [*MACHINE, *INDEX])
def test_no_file_names_a_machine_or_an_index(text):
    assert [str(path.relative_to(ROOT)) for path in files_in_git() if text.encode() in path.read_bytes()] == []
