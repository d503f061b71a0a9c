"""Whether two commits find the same numbers: their runs are compared byte for byte, but for times and memory.

    python tests/same_numbers.py 8006926 HEAD [--keep folder]

Each commit runs in a work tree of its own: the quickstart, the mixture, adapters of four documents together, and a run
that is stopped by a signal and resumed. `--keep` leaves the runs in a folder, where a commit that was run before is not run
again. Exit status: 0 equal, 1 not.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLAIN = ["--trainer.logger=false"]
WAVE = '--parameters={"class_path": "LoRA", "init_args": {"rank": 8}}'
ADAM = '--update={"class_path": "AdamW", "init_args": {"lr": 0.001}}'
STOP = '--trainer.callbacks=[{"class_path": "meddling.StopOnce"}]'
# As the quickstart was in 0.1.0, so that commits can be compared whose own is another.
ALL = '--parameters={"class_path": "All"}'
SGD = '--update={"class_path": "SGD", "init_args": {"lr": 0.07}}'
QUICKSTART = ["--config", "configs/quickstart.yaml", ALL, SGD, *PLAIN]
RUNS = {
    "quickstart": QUICKSTART,
    "mixture": ["--config", "configs/mixture.yaml"],
    "lora_wave": [*QUICKSTART, WAVE, ADAM, "--data.together=4"],
    "resumed": [*QUICKSTART, "--data.documents=4", STOP],
}
COMPARED = ("segments.parquet", "documents.csv", "summary.json")
STOPPED_AFTER = 150  # segments: in the second document


def main() -> int:
    """Runs both commits and says which files differ."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commits", nargs=2)
    options.add_argument("--keep", type=Path)
    given = options.parse_args()
    differ = 0
    with contextlib.ExitStack() as stack:
        kept = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before, after = (runs_of(commit, kept.absolute()) for commit in given.commits)
        for run in RUNS:
            for name in COMPARED:
                equal = contents(before / run / name) == contents(after / run / name)
                differ += not equal
                print(f"{run:12} {name:18} {'equal' if equal else 'DIFFERS'}")
    return 1 if differ else 0


def runs_of(commit: str, kept: Path) -> Path:
    """The folder of a commit's runs, which are made unless they are there."""
    full = subprocess.run(
        ["git", "rev-parse", commit], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with work_tree(full) as tree:
        for name, arguments in RUNS.items():
            if not (kept / full / name / "summary.json").exists():
                run(tree, [*arguments, f"--out={kept / full / name}"], stops=name == "resumed")
    return kept / full


def run(tree: Path, arguments: list[str], stops: bool) -> None:
    """One run of `dynlight.fit`; one that stops is resumed."""
    environment = os.environ | {"PYTHONPATH": f"{tree}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dynlight.fit"]
    if stops:
        (tree / "stop").write_text(str(STOPPED_AFTER))
    done = subprocess.run([*command, *arguments], cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    if stops:
        assert done.returncode == 128 + 15, f"the run was to be stopped, got status {done.returncode}"
        folder = arguments[-1].partition("=")[2]
        done = subprocess.run([*command, "--resume", folder], cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    done.check_returncode()


@contextlib.contextmanager
def work_tree(commit: str) -> Iterator[Path]:
    """The files of a commit, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def contents(file: Path) -> object:
    """What is compared of a file: all of it, but of the summary neither times nor memory."""
    if file.suffix != ".json":
        return file.read_bytes()
    return without_times(json.loads(file.read_text("utf-8")))


def without_times(found: object) -> object:
    if not isinstance(found, dict):
        return found
    timed = ("seconds", "per_second", "peak_memory_bytes")
    return {name: without_times(value) for name, value in found.items() if not name.endswith(timed)}


if __name__ == "__main__":
    sys.exit(main())
