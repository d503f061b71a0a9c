"""`python -m experiments`: the paper's claims, measured.

python -m experiments                      lists the experiments
python -m experiments run NAME [--small]   measures each point of its grid that isn't done yet; --small: a few tokens
python -m experiments point NAME --a=b …   measures one point: what W&B's agent calls
python -m experiments figure NAME          draws its figure and writes table and verdict into its notes, from results.csv
python -m experiments verdicts             prints the table of README.md, from all results.csv
"""

import os
import sys
import time
from importlib import import_module
from typing import Any

import pandas as pd

from experiments import grid, results


def main(arguments: list[str]) -> int:
    """Does what the command line says; returns the exit status, 2 where it can't be done (one line says why)."""
    try:
        match arguments:
            case [] | ["-h"] | ["--help"]:
                print(__doc__)
                print("\n".join(f"    {name:20} {question_of(name)}" for name in grid.names()))
            case ["run", name]:
                run(name, small=False)
            case ["run", name, "--small"]:
                run(name, small=True)
            case ["point", name, *settings]:
                point(name, grid.point_of(settings))
            case ["figure", name]:
                figure(name)
            case ["verdicts"]:
                print(verdicts())
            case _:
                raise ValueError(f"the command must be run, point, figure or verdicts, got {' '.join(arguments)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def question_of(name: str) -> str:
    """The first line of the experiment."""
    return str(import_module(f"experiments.{name}.experiment").__doc__).splitlines()[0]


def measure(name: str, settings: dict[str, Any], small: bool) -> pd.DataFrame:
    """The rows of one point, by the experiment's own `measure` or, where it has none, the protocol's."""
    from experiments import protocol

    protocol.threads()
    own = getattr(import_module(f"experiments.{name}.experiment"), "measure", None)
    return own(settings, small) if own else protocol.measure(name, settings, small)


def run(name: str, small: bool) -> None:
    """Measures all points that aren't done yet, then says what was found."""
    points = grid.points(name)
    if small:
        points = points[:: max(1, len(points) - 1)]  # the first and the last
    waiting = [point for point in points if small or not results.path_of(name, point).exists()]
    print(f"{name}: {len(points) - len(waiting)} points done, {len(waiting)} to go", flush=True)
    began = time.perf_counter()
    missing: list[str] = []
    for number, settings in enumerate(waiting, start=1):
        try:
            results.keep(name, settings, measure(name, settings, small), small)
        except ValueError as error:
            missing.append(f"{error}")  # as a model that `make ladder` has yet to make; other points may do without
        seconds = time.perf_counter() - began
        left = seconds / number * (len(waiting) - number)
        described = " ".join(grid.arguments(settings))
        print(f"{number}/{len(waiting)}  {seconds:6,.0f} s, {left:6,.0f} s left  {described}", flush=True)
    rows = results.join(name, small)
    if len(rows):
        print(results.markdown(results.totals(rows, [*points[0], "role"])))
    if missing:
        raise ValueError(f"{len(missing)} points could not be measured, the first as {missing[0]}")


def point(name: str, settings: dict[str, Any]) -> None:
    """Measures one point and keeps its rows; under `wandb agent` its totals go to W&B too."""
    rows = measure(name, settings, small=False)
    results.keep(name, settings, rows)
    table = results.totals(rows, ["role"]).set_index("role")
    print(results.markdown(table.reset_index()))
    if "WANDB_SWEEP_ID" in os.environ:
        import wandb

        with wandb.init(config=settings) as dashboard:
            for role, found in table.iterrows():
                prefix = "" if role == "adapted" else f"{role}_"
                dashboard.summary.update({f"{prefix}{key}": value for key, value in found.items()})


def figure(name: str) -> None:
    """Draws the picture, and writes what was found into the notes."""
    from experiments.pictures import save

    experiment = import_module(f"experiments.{name}.experiment")
    rows = results.load(name)
    save(experiment.figure(rows), grid.folder_of(name))
    found = f"**{experiment.verdict(rows)}**\n\n![](figure.svg)\n\n{results.markdown(experiment.table(rows))}"
    results.note(name, found)
    print(found)


def verdicts() -> str:
    """One line an experiment: its question, what was found, the command."""
    lines = ["| experiment | question | verdict | command |", "|---|---|---|---|"]
    for name in grid.names():
        experiment = import_module(f"experiments.{name}.experiment")
        measured = (grid.folder_of(name) / "results.csv").exists()
        verdict = experiment.verdict(results.load(name)) if measured else "not measured yet"
        command = f"`python -m experiments run {name}`"
        lines.append(f"| [{name}]({name}/notes.md) | {question_of(name)} | {verdict} | {command} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
