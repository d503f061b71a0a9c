"""The grid of an experiment: its `sweep.yaml`, in W&B's format, as the list of its points; and the scales it is measured at.

A point is a dictionary of settings of `dynlight.fit`, which W&B's agent hands over as `--setting=value`.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from dynlight.running.pretrained import ASSETS

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """Models and documents that an experiment is measured with: one of `scales/*.yaml`.

    Args:
        name: of the file.
        choice: settings of the documents that learning rates are chosen on.
        wrong: settings of the book of the wrong-document control.
        statistics: arguments of DocumentStream, of what RMSDynamic's statistics are taken from.
        test: settings of the documents that are scored, where they are not those of `run.yaml`.
        models: for a model of `run.yaml` or of the grid, the one in its place.
        quick: whether the first and the last point must do, and a learning rate out of those of `run.yaml`.
    """

    name: str
    choice: dict[str, Any]
    wrong: dict[str, Any]
    statistics: dict[str, Any]
    test: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    quick: bool = False

    @classmethod
    def read(cls, name: str = "books") -> "Scale":
        """The scale of this name.

        Raises:
            ValueError: if there is none.
        """
        names = sorted(path.stem for path in (FOLDER / "scales").glob("*.yaml"))
        if name not in names:
            raise ValueError(f"the scale must be one of {', '.join(names)}, got {name}")
        return cls(name, **yaml.safe_load((FOLDER / "scales" / f"{name}.yaml").read_text("utf-8")))


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
    """Every combination of the values of the sweep's parameters, the last parameter changing fastest.

    An experiment that has a function `is_wanted` keeps those of which it is true.
    """
    parameters = yaml.safe_load((folder_of(name) / "sweep.yaml").read_text("utf-8"))["parameters"]
    values = [setting.get("values", [setting.get("value")]) for setting in parameters.values()]
    found = [dict(zip(parameters, combination, strict=True)) for combination in itertools.product(*values)]
    is_wanted = getattr(import_module(f"experiments.{name}.experiment"), "is_wanted", lambda point: True)
    return [point for point in found if is_wanted(point)]


def arguments(point: Mapping[str, Any]) -> list[str]:
    """The point as W&B's agent writes it on the command line."""
    return [f"--{setting}={_written(value)}" for setting, value in point.items()]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def run_of(name: str, point: Mapping[str, Any], scale: Scale) -> list[str]:
    """The point as arguments of `dynlight.fit`: the experiment's `run.yaml`, overridden by its settings and the scale's."""
    model = model_of(name, point, scale)
    overrides = {**point, "model.pretrained": model, **scale.test}
    return ["--config", str(folder_of(name) / "run.yaml"), *arguments(overrides)]


def model_of(name: str, point: Mapping[str, Any], scale: Scale) -> str:
    """The model that the point reads with."""
    chosen = str(point.get("model.pretrained") or _run(name)["model"]["pretrained"])
    return scale.models.get(chosen, chosen)


def point_of(arguments: Sequence[str]) -> dict[str, Any]:
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


def key_of(name: str, point: Mapping[str, Any], scale: Scale) -> str:
    """A short name for what the point measures: another one as soon as its settings or the model's weights are others."""
    model = model_of(name, point, scale)
    described = {
        "run": _run(name),
        "point": {setting: _written(value) for setting, value in point.items()},
        "test": scale.test,
        "model": model,
        "weights": weights_of(model),
    }
    return digest(described)


def weights_of(model: str) -> str:
    """The digest of a model's weights, where they lie here."""
    folder = ASSETS / model if model == "tiny-books" else Path(model)
    path = next((path for path in [folder / "model.safetensors", *folder.glob("*.gguf")] if path.exists()), None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def digest(described: Any) -> str:
    """Ten hex digits of a description."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _run(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((folder_of(name) / "run.yaml").read_text("utf-8")))
