"""The grid of an experiment: its `sweep.yaml`, in W&B's format, as the list of its points.

A point is a dictionary of settings of `dynlight.fit`, which W&B's agent hands over as `--setting=value`.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The experiments, those that have a grid."""
    return sorted(path.parent.name for path in FOLDER.glob("*/sweep.yaml"))


def folder_of(name: str) -> Path:
    """Its folder.

    Raises:
        ValueError: if there is no such experiment.
    """
    if name not in names():
        raise ValueError(f"the experiment must be one of {', '.join(names())}, got {name}")
    return FOLDER / name


def points(name: str) -> list[dict[str, Any]]:
    """Every combination of the values of the sweep's parameters, the last parameter changing fastest."""
    parameters = yaml.safe_load((folder_of(name) / "sweep.yaml").read_text("utf-8"))["parameters"]
    values = [setting.get("values", [setting.get("value")]) for setting in parameters.values()]
    return [dict(zip(parameters, combination, strict=True)) for combination in itertools.product(*values)]


def arguments(point: dict[str, Any]) -> list[str]:
    """The point as W&B's agent writes it on the command line."""
    return [f"--{setting}={value}" for setting, value in point.items()]


def run_of(name: str, point: dict[str, Any]) -> list[str]:
    """The point as arguments of `dynlight.fit`: the experiment's `run.yaml`, overridden by its settings."""
    return ["--config", str(folder_of(name) / "run.yaml"), *arguments(point)]


def point_of(arguments: list[str]) -> dict[str, Any]:
    """The point that arguments `--setting=value` describe.

    Raises:
        ValueError: if an argument is no such thing.
    """
    point = {}
    for argument in arguments:
        setting, equals, value = argument.removeprefix("--").partition("=")
        if not (argument.startswith("--") and equals):
            raise ValueError(f"a setting must be given as --setting=value, got {argument}")
        point[setting] = value
    return point


def key_of(point: dict[str, Any]) -> str:
    """A file's name for the point, the same for the same settings."""
    text = json.dumps({setting: str(value) for setting, value in sorted(point.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:16]
