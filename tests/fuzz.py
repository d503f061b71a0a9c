"""Bad input at random: each case ends in a right result, or in one line and status 2.

A case is a configuration with some values exchanged, or a model or a data set with some bytes exchanged. What is right
about a result is checked from outside: every byte of every document is counted, and every sum is finite.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd
import yaml
from conftest import make_byte_tokenizer
from folders import configuration, save_documents, save_model
from shortcuts import shortcuts

from dynlight import fit

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**70), 10**400),
    *(0.5, -0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan, "1e3", "0x10", "1_000"),
    *(
        "",
        " ",
        "x",
        "null",
        "never",
        "static",
        "document",
        "all",
        "ü",
        "🙂",
        "\x00",
        "\x1b[31m",
        "a\nb",
        "‮",
        "../..",
        "/",
        "~",
    ),
    *(
        "{",
        "[",
        "%s",
        "{0}",
        "$HOME",
        "a" * 5000,
        "torch.optim.SGD",
        "os.system",
        "dynlight.LoRA",
        "collections.Counter",
    ),
    *([], [1], [None], ["a", 1], [[]], [-1, -1], [0, 10**9], {}, {"a": 1}, {0: 1}, {-1: 1}, {"class_path": "x"}),
    *({"class_path": None}, {"class_path": "SGD"}, {"class_path": "SGD", "init_args": {"lr": "x"}}, {"init_args": {}}),
    *({"class_path": "builtins.print"}, {1: {2: {3: []}}}, b"bytes", {"lr": 1}),
]


class Fuzz:
    """Cases from one seed, in a folder of their own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []
        self.documents = save_documents(root / "documents")
        self.model = save_model(root / "model", make_byte_tokenizer(), num_hidden_layers=1)

    def configuration(self) -> dict[str, Any]:
        """One that runs, with most of the settings in it."""
        config = copy.deepcopy(configuration(self.model, self.documents, self.root / "out"))
        config |= {"schedule": {"every": 1}, "reset": {"every": "document"}, "clip": 1.0, "seed": 0}
        config |= {"rates": None, "mixture": None, "checkpoint": {"minutes": 5}, "on_failure": "stop"}
        config["data"] |= {"max_tokens": 20, "documents": 2, "together": 1, "split": None, "streaming": False}
        return config

    def settings(self) -> None:
        """A configuration in which one or two values are others."""
        config = self.configuration()
        for _ in range(self.random.choice([1, 1, 1, 2])):
            *sections, last = self.random.choice(paths(config))
            section = config
            for name in sections:
                section = section[name]
            section[last] = self.random.choice(VALUES)
            if sections[:1] == ["trainer"] or last in ("out", "trainer"):
                section[last] = self.random.choice([None, True, 0, -1, "", "x", [], {}, [1], 1.5])
        self.try_case(config, str(config))

    def folder(self, kind: str) -> None:
        """A model or a data set of which one file is damaged."""
        folder = self.root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        config = configuration(self.model, self.documents, self.root / "out")
        if kind == "model":
            shutil.copytree(self.model, folder)
            config["model"]["pretrained"] = str(folder)
        else:
            name = self.random.choice(["rows.jsonl", "rows.csv", "rows.parquet"])
            folder.mkdir()
            _rows(folder / name)
            config["data"] = {"path": name.split(".")[1].replace("jsonl", "json"), "data_files": f"{folder}/{name}"}
        file = self.random.choice(sorted(folder.iterdir()))
        what = self._damage(file)
        self.try_case(config, f"{file.name} {what}")

    def _damage(self, file: Path) -> str:
        data = bytearray(file.read_bytes())
        place = self.random.randrange(len(data))
        what = self.random.choice(["removed", "emptied", "cut", "flipped", "doubled", "zeroed"])
        if what == "removed":
            file.unlink()
            return what
        changed = {
            "emptied": b"",
            "cut": data[:place],
            "flipped": data[:place] + bytes([data[place] ^ (1 << self.random.randrange(8))]) + data[place + 1 :],
            "doubled": data + data,
            "zeroed": data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :],
        }
        file.write_bytes(changed[what])
        return f"{what} at {place}"

    def try_case(self, config: dict[str, Any], case: str) -> None:
        """Runs a case and takes down how it ends."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            (self.root / "run.yaml").write_text(yaml.dump(config, allow_unicode=True), "utf-8")
            output, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _at_most(120):
                status = fit.main(["--config", str(self.root / "run.yaml")])
            self.ends[str(status)] += 1
            fault = self.fault_of(status, errors.getvalue(), out)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.ends["traceback"] += 1
            fault = "".join(traceback.format_exception(error)[-4:])
        if fault:
            self.faults.append(f"{case}\n  → {fault}")

    def fault_of(self, status: int, errors: str, out: Path) -> str | None:
        """What is wrong with how a case ended."""
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        if status == 2:
            if len(lines) != 1 or errors.count("\n") != 1:
                return f"not one line: {errors!r}"
            return "a folder is left" if out.exists() else None
        if status not in (0, 3):
            return f"status {status}: {errors}"
        if not out.exists():  # the configuration said another
            return None
        summary = json.loads((out / "summary.json").read_text())
        if status == 0 and summary["failed"]:
            return "failed documents, and status 0"
        if summary["nats"] is None or not math.isfinite(summary["nats"]):
            return f"nats {summary['nats']}"
        documents, tokens = pd.read_csv(out / "documents.csv"), pd.read_parquet(out / "tokens.parquet")
        texts = tokens.groupby("document").text.sum()
        for document in documents[documents.failed.isna()].itertuples():
            if document.bytes != len(texts.get(document.document, "").encode()):
                return f"document {document.name}: not all bytes are scored"
        return None


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"a case takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def paths(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of each setting the names of the sections above it, and its own."""
    found = []
    for name, value in tree.items():
        found.append((*above, name))
        if isinstance(value, dict):
            found += paths(value, (*above, name))
    return found


def _rows(file: Path) -> None:
    rows = pd.DataFrame({"title": ["a", "b", "ü"], "text": ["It was a fine day.", "x", "день 🙂 " * 5]})
    if file.suffix == ".jsonl":
        rows.to_json(file, orient="records", lines=True)
    elif file.suffix == ".csv":
        rows.to_csv(file, index=False)
    else:
        rows.to_parquet(file)


@contextlib.contextmanager
def quickly(root: Path) -> Iterator[None]:
    """In this folder, and without what takes most of the time of a short run and isn't tried here."""
    cwd = Path.cwd()
    os.chdir(root)
    try:
        with shortcuts.taken():
            yield
    finally:
        os.chdir(cwd)


def fuzz(root: Path, seed: int, cases: dict[str, int]) -> Fuzz:
    """So many cases of each kind: settings, model, data."""
    found = Fuzz(root, seed)
    with quickly(root):
        for _ in range(cases.get("settings", 0)):
            found.settings()
        for kind in ("model", "data"):
            for _ in range(cases.get(kind, 0)):
                found.folder(kind)
    return found
