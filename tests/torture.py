"""Kills runs at random moments, goes on with them, and compares what they leave byte for byte: `make torture`.

A moment is a point in time, or a point in the code that is hard to hit by chance: in the middle of a write, before or
after a file takes the place of its draft, between the files that a run ends with. Between two sessions files are damaged. Each
session of a run is a fork of this process, so that nothing has to be imported again. The same seed kills at the same points
in the code. At the end come a run in two processes, a full disk, and bad input (`fuzz.py`).
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as its threads don't come along into a fork

import pyarrow.parquet as pq
import torch
import yaml
from conftest import make_byte_tokenizer
from folders import configuration, save_model
from fuzz import fuzz

from dynlight import fit
from dynlight.learning.flops import EmptyModel
from dynlight.recording import checkpoint, resume, sealed
from dynlight.recording.ledger import line_of
from dynlight.recording.receipt import Receipt
from dynlight.recording.report import files as report

# Ragged: documents that end within a segment, with others, in the middle of a wave; an empty one.
LENGTHS = (900, 333, 5, 0, 900, 64, 640, 16, 17)
SAME = ("segments.parquet", "tokens.parquet", "documents.csv", "receipt.json", "config.yaml", "experts.parquet")
RUNS: dict[str, dict[str, Any]] = {
    "one at a time": {"update": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}},
    "together": {
        "together": 3,
        "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}},
        "update": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
    },
    "mixture": {"together": 2, "update": {"class_path": "AdamW", "init_args": {}}, "rates": [0.001, 0.01, 0.03]},
    "carried on": {"reset": {"every": "never"}, "reference": None, "clip": 0.5},
}
TWO_PROCESSES = {"context": {"class_path": "TransformerXL", "init_args": {"segment": 2, "memory": 8}}}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Faults: each arms this process to be killed at the n-th time that it comes to a point.


def before(holder: Any, name: str, n: int) -> None:
    _countdown(holder, name, n, lambda call, *arguments: die())


def after(holder: Any, name: str, n: int) -> None:
    def at_last(call: Callable, *arguments: Any) -> None:
        call(*arguments)
        die()

    _countdown(holder, name, n, at_last)


def half_written(holder: Any, name: str, n: int) -> None:
    _countdown(
        holder, name, n, lambda call, file, data: (call(file, bytes(data)[: len(data) // 2]), file.flush(), die())
    )


def half_a_row(holder: Any, name: str, n: int) -> None:
    def at_last(call: Callable, receipt: Receipt, commit: list) -> None:
        receipt._lines.write(line_of([*commit, "…"])[:20])
        die()

    _countdown(holder, name, n, at_last)


def _countdown(holder: Any, name: str, n: int, at_last: Callable) -> None:
    call, left = getattr(holder, name), n

    def counting(*arguments: Any, **settings: Any) -> Any:
        nonlocal left
        left -= 1
        return call(*arguments, **settings) if left else at_last(call, *arguments)

    setattr(holder, name, counting)


# Where, and how often a session comes there at most.
POINTS: list[tuple[str, Callable[[Any, str, int], None], Any, str, int]] = [
    ("after a segment", before, checkpoint.Checkpoint, "on_train_batch_end", 60),
    ("before a checkpoint", before, checkpoint.Checkpoint, "save", 5),
    ("after a checkpoint", after, checkpoint.Checkpoint, "save", 5),
    ("in a sealed file", half_written, sealed._Hashing, "write", 300),
    ("before a file is synced", before, os, "fsync", 30),
    ("after a file is synced", after, os, "fsync", 30),
    ("before a draft takes its place", before, os, "replace", 30),
    ("after a draft took its place", after, os, "replace", 30),
    ("in a row of the ledger", half_a_row, Receipt, "_add", 60),
    ("while rows are joined", before, pq.ParquetWriter, "write_table", 20),
    ("between the last files", before, report, "write", 1),
    ("when all is there", after, report, "write", 1),
]


# What may happen to files while nothing runs; the bool says whether a checkpoint is lost by it, which must be told.
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], bool]] = {
    "a byte of a checkpoint flipped": ("unfinished/rank0-*.sealed", lambda data: data[:-9] + b"?" + data[-8:], True),
    "a checkpoint cut short": ("unfinished/rank0-*.sealed", lambda data: data[: len(data) // 2], True),
    "a torn row of the ledger": ("rows/ledger.*.jsonl", lambda data: data + b"[3, 7, 16, 41.", False),
}


class Torture:
    """Runs in a folder of their own, killed as a random number generator says."""

    def __init__(self, root: Path, seed: int, minutes: float) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.minutes = minutes
        self.kills: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()
        self.sessions = 0
        self.model = save_model(root / "model", make_byte_tokenizer(), num_hidden_layers=1)
        (root / "documents").mkdir()
        for number, length in enumerate(LENGTHS):
            text = "".join(self.random.choice("the old house by a river ") for _ in range(length))
            (root / f"documents/{number}.txt").write_text(text)

    def torture(self, name: str, kills: int) -> int:
        """One run, killed at most so often; returns how often. What it leaves equals what it leaves undisturbed."""
        out, whole = self.root / "out", self.root / f"{name}, undisturbed"
        self.write_configuration(name, out)
        if not whole.exists():
            assert self.session(name, [])[0] == 0
            out.rename(whole)
        began = sum(self.kills.values())
        while sum(self.kills.values()) < began + kills:
            lost = self.damage(out) if self.random.random() < 0.3 else None
            status, output = self.session(name, self.fault() if lost is None else self.fault_after_the_start())
            assert lost is None or f"resume: {lost} cannot be used: " in output, output
            if not status:
                break
            assert status == -signal.SIGKILL, output
        if (out / "unfinished").exists() or not (out / "summary.json").exists():
            status, output = self.session(name, [])
            assert status == 0, output
        self.compare(whole, out)
        shutil.rmtree(out)
        return sum(self.kills.values()) - began

    def write_configuration(self, name: str, out: Path) -> None:
        config = configuration(self.model, f"{self.root}/documents/*.txt", out) | RUNS.get(name, TWO_PROCESSES)
        config["data"]["together"] = config.pop("together", 1)
        (self.root / "run.yaml").write_text(yaml.safe_dump(config | {"checkpoint": {"minutes": self.minutes}}))

    def fault(self) -> list[Any]:
        """A random one: most are points in the code, the others points in time."""
        if self.random.random() < 0.25:
            return ["at some time", self.random.uniform(0.2, 3.0)]
        name, fault, holder, attribute, most = self.random.choice(POINTS)
        return [name, fault, holder, attribute, self.random.randint(1, most)]

    def fault_after_the_start(self) -> list[Any]:
        """One that lets a session say from where it goes on."""
        return [*POINTS[0][:4], self.random.randint(1, 20)]

    def damage(self, out: Path) -> Path | None:
        """Damages a file of a run that was cut short; the checkpoint that is lost by it."""
        name = self.random.choice(list(DAMAGES))
        pattern, change, loses = DAMAGES[name]
        goes_on = resume.is_unfinished(out) and not resume.is_read(out)
        if not goes_on or not (files := sorted(out.glob(pattern))):
            return None
        files[-1].write_bytes(change(files[-1].read_bytes()))
        self.damages[name] += 1
        return files[-1] if loses else None

    def session(self, name: str, fault: list[Any]) -> tuple[int, str]:
        """Begins the run or goes on with it until it ends or is killed; returns its status and what it wrote."""
        out, log = self.root / "out", self.root / "log.txt"
        resumes = (out / "unfinished/origin.sealed").exists()
        arguments = ["--resume", out] if resumes else ["--config", self.root / "run.yaml", "--overwrite", "true"]
        self.sessions += 1
        with log.open("w") as file:
            if not (pid := os.fork()):
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os._exit(self._run(name, fault, [str(argument) for argument in arguments]))
        if len(fault) == 2:
            time.sleep(fault[1])
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            self.kills[fault[0]] += 1
        return status, log.read_text()

    def _run(self, name: str, fault: list[Any], arguments: list[str]) -> int:
        try:
            self._remember_flops(name)
            if len(fault) > 2:
                fault[1](*fault[2:])
            return fit.main(arguments)
        except BaseException:  # it must not go back into the code of its parent
            import traceback

            traceback.print_exc()
            return 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _remember_flops(self, name: str) -> None:
        """Shapes are measured once for all sessions: it takes longer than the run."""
        file, measure = self.root / f"{name} flops.pickle", EmptyModel.measure
        known = pickle.loads(file.read_bytes()) if file.exists() else {}

        def remembered(copied: EmptyModel, *shape: Any) -> Any:
            if shape not in known:
                known[shape] = measure(copied, *shape)
                draft = file.with_suffix(".draft")
                draft.write_bytes(pickle.dumps(known))
                draft.rename(file)
            return known[shape]

        EmptyModel.measure = remembered

    def compare(self, whole: Path, out: Path, files: Sequence[str] = SAME) -> None:
        assert {file.name for file in whole.iterdir()} == {file.name for file in out.iterdir()}, list(out.iterdir())
        for name in files:
            if (whole / name).exists():
                assert (whole / name).read_bytes() == (out / name).read_bytes(), f"{name} differs"

    def two_processes(self, kills: int) -> str:
        """A run in two processes, of which one or the other is killed; the other one ends by itself within a minute."""
        out, name = self.root / "out", "two processes"
        self.write_configuration(name, out)
        assert self.session(name, [])[0] == 0, (self.root / "log.txt").read_text()  # in one process
        whole = out.rename(self.root / name)
        config = yaml.safe_load((self.root / "run.yaml").read_text())
        config["trainer"] |= {"devices": 2, "strategy": "document_parallel"}
        (self.root / "run.yaml").write_text(yaml.safe_dump(config))
        slowest = 0.0
        for number in range(kills + 1):
            begun = (out / "unfinished/origin.sealed").exists()
            arguments = ["--resume", out] if begun else ["--config", self.root / "run.yaml", "--overwrite", "true"]
            command = [sys.executable, "-m", "dynlight.fit", *map(str, arguments)]
            self.sessions += 1
            if number == kills:
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                break
            before = set((out / "unfinished").glob("rank*"))
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(self.root / "log.txt").open("w"))
            while run.poll() is None and not set((out / "unfinished").glob("rank*")) - before:
                time.sleep(0.02)
            time.sleep(self.random.uniform(0, 0.5))
            other = Path(f"/proc/{run.pid}/task/{run.pid}/children")
            processes = [run.pid, *map(int, other.read_text().split())] if other.exists() else [run.pid]
            killed = self.random.choice(processes[:2])
            os.kill(killed, signal.SIGKILL)
            self.kills[f"process {processes.index(killed)} of two"] += 1
            moment = time.monotonic()
            run.wait(60)
            while any(_runs(process) for process in processes):
                assert time.monotonic() < moment + 60, "a process outlives the other for more than a minute"
                time.sleep(0.1)
            slowest = max(slowest, time.monotonic() - moment)
        self.compare(whole, out, SAME[:3])
        shutil.rmtree(out)
        return (
            f"{name}: killed {kills} times, ends the same as in one; the other one ended within {slowest:.0f} seconds"
        )

    def fill_the_disk(self) -> str:
        """A run on a disk too small for it ends with one line, and goes on when there is room."""
        small = self.root / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            return "a full disk: left out, as it needs the right to mount one"
        try:
            out = small / "out"
            self.write_configuration("together", out)
            (self.root / "out").symlink_to(out, target_is_directory=True)
            status, output = self.session("together", [])
            line = f"error: out must be where there is room, got {out}: No space left on device"
            assert status == 1 and output.splitlines()[-1] == line, output
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
            status, output = self.session("together", [])
            assert status == 0, output
            self.compare(self.root / "together, undisturbed", out, SAME[:3])
            return "a full disk: told in one line; with more room it goes on and ends the same"
        finally:
            subprocess.run(["umount", str(small)], check=True)


def _runs(process: int) -> bool:
    """Whether a process is there, and no mere entry in the table of processes."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kills-of-two", type=int, default=4, help="of a run in two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--inputs", type=int, default=200, help="that are bad, of every kind")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dynlight-") as folder:
        torture = Torture(Path(folder), settings.seed, minutes=0.002)
        turn = 0
        while (left := settings.kills - sum(torture.kills.values())) > 0:
            name = settings.runs[turn % len(settings.runs)]
            turn += 1
            most = min(left, -(-settings.kills // len(settings.runs)))
            print(f"{name}: killed {torture.torture(name, most)} times, ends the same")
        if settings.kills_of_two:
            print(torture.two_processes(settings.kills_of_two))
        if "together" in settings.runs:
            print(torture.fill_the_disk())
        seconds = time.monotonic() - began
        for point, count in (*torture.kills.most_common(), *torture.damages.most_common()):
            print(f"{count:4}  {point}")
        print(
            f"{sum(torture.kills.values())} kills in {torture.sessions} sessions, {seconds:.0f} seconds, all end the same"
        )
        return bad_input(Path(folder) / "inputs", settings.seed, settings.inputs) if settings.inputs else 0


def bad_input(folder: Path, seed: int, cases: int) -> int:
    """Tries inputs of every kind, most of them settings; 1 if one of them ended as none should."""
    folder.mkdir()
    began = time.monotonic()
    others = cases // 4
    found = fuzz(folder, seed, {"settings": cases - 2 * others, "model": others, "data": others})
    for fault in found.faults:
        print(fault, end="\n\n")
    ends = ", ".join(f"{count} with status {status}" for status, count in sorted(found.ends.items()))
    seconds = time.monotonic() - began
    print(f"{cases} bad inputs, {seconds:.0f} seconds: {ends}; {len(found.faults)} not as they should")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
