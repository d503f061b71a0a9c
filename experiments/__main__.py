"""`python -m experiments`: the paper's claims, measured.

python -m experiments                      lists the experiments
python -m experiments run NAME             measures each point of its grid that isn't done yet; at the same time in a second
                                           terminal, on another core: those points that the first is not at
    --scale small                          … in a few tokens (also --small), or at the paper's scale: --scale paper
    --again                                … each point, as if none were done
python -m experiments point NAME --a=b …   measures one point: what W&B's agent calls; --scale as above
python -m experiments figure NAME          draws its figure and writes table and verdict into its notes
python -m experiments verdicts             prints the table of README.md, from all results.csv
python -m experiments families [TYPE …]    reads a tiny model of every type that transformers knows beside a loop, and writes
                                           families/README.md; of these types alone: prints what came of them
"""

import argparse
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
            case ["run", name, *options]:
                scale, others = scale_of(options)
                if others not in ([], ["--again"]):
                    raise ValueError(f"the options of run must be --scale or --again, got {' '.join(others)}")
                run(name, scale, again=bool(others))
            case ["point", name, *options]:
                scale, settings = scale_of(options)
                point(name, grid.point_of(settings), scale)
            case ["figure", name]:
                figure(name)
            case ["verdicts"]:
                print(verdicts())
            case ["families", *types]:
                families(types)
            case _:
                commands = "run, point, figure, verdicts or families"
                raise ValueError(f"the command must be {commands}, got {' '.join(arguments)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def question_of(name: str) -> str:
    """The first line of the experiment."""
    return str(import_module(f"experiments.{name}.experiment").__doc__).splitlines()[0]


def scale_of(options: list[str]) -> tuple[grid.Scale, list[str]]:
    """The scale that the options name, and those that are left."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--scale", default=results.COMMITTED)
    flags.add_argument("--small", dest="scale", action="store_const", const="small")
    try:
        found, others = flags.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ValueError("scale must be given a name, got nothing") from error
    return grid.Scale.read(found.scale), others


def measure(name: str, settings: dict[str, Any], scale: grid.Scale) -> pd.DataFrame:
    """Measures one point, by the experiment's own `measure` or, where it has none, the protocol's, and keeps its rows."""
    from experiments import protocol

    protocol.threads()
    began = time.perf_counter()
    own = getattr(import_module(f"experiments.{name}.experiment"), "measure", None)
    rows = own(settings, scale) if own else protocol.measure(name, settings, scale)
    results.keep(name, settings, rows, scale, time.perf_counter() - began)
    return rows


def run(name: str, scale: grid.Scale, again: bool = False) -> None:
    """Measures all points that aren't done yet and that no other process is at, then says what was found."""
    points = grid.points(name)
    if scale.quick:
        points = points[:: max(1, len(points) - 1)]  # the first and the last
    began = time.time()
    since = began if again or scale.quick else None
    failed: dict[str, ValueError] = {}  # by the point as it is told

    def is_left(settings: dict[str, Any]) -> bool:
        return told(settings) not in failed and not results.is_done(name, settings, scale, since)

    waiting = [settings for settings in points if is_left(settings)]
    print(f"{name}: {len(points) - len(waiting)} points done, {len(waiting)} to go", flush=True)
    for settings in waiting:
        with results.claim(name, settings, scale) as is_mine:
            if not (is_mine and is_left(settings)):
                continue
            try:
                measure(name, settings, scale)
            except ValueError as error:  # as a model that isn't there; other points may do without
                failed[told(settings)] = error
        left = sum(map(is_left, waiting))
        done, seconds = len(waiting) - left, time.time() - began
        ahead = seconds / max(1, done) * left
        print(f"{done}/{len(waiting)}  {seconds:6,.0f} s, {ahead:6,.0f} s left  {told(settings)}", flush=True)
    rows = results.join(name, scale)
    if len(rows):
        print(results.markdown(results.totals(rows, [*points[0], "role"])))
    if left := sum(map(is_left, waiting)):
        print(f"points left to another process: {left}")
    if failed:
        raise ValueError(f"{len(failed)} points could not be measured, the first as {next(iter(failed.values()))}")


def told(settings: dict[str, Any]) -> str:
    """A point in one line."""
    return " ".join(grid.arguments(settings))


def point(name: str, settings: dict[str, Any], scale: grid.Scale) -> None:
    """Measures one point; under `wandb agent` its totals go to W&B too."""
    table = results.totals(measure(name, settings, scale), ["role"]).set_index("role")
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
    rows = results.join(name, grid.Scale.read())
    save(experiment.figure(rows), grid.folder_of(name))
    found = f"**{experiment.verdict(rows)}**\n\n![](figure.svg)\n\n{results.markdown(experiment.table(rows))}"
    results.note(name, found)
    print(found)


def verdicts() -> str:
    """One line an experiment: its question, what was found, the command, the commits that measured it and the hours it took."""
    lines = ["| experiment | question | verdict | command | commit | hours on one core |", "|---|---|---|---|---|---|"]
    for name in grid.names():
        verdict, commits, hours = "not measured yet", "", ""
        if (grid.folder_of(name) / "results.csv").exists():
            rows = results.load(name)
            verdict = import_module(f"experiments.{name}.experiment").verdict(rows)
            commits = ", ".join(rows["commit"].unique())
            hours = f"{rows.drop_duplicates('key').took.sum(min_count=1) / 3600:.1f}".replace("nan", "not kept")
        command = f"`python -m experiments run {name}`"
        lines.append(
            f"| [{name}]({name}/notes.md) | {question_of(name)} | {verdict} | {command} | {commits} | {hours} |"
        )
    return "\n".join(lines)


def families(types: list[str]) -> None:
    """How well dynlight serves each type of model, or these alone."""
    from experiments.families import walk

    walk.main(types)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
