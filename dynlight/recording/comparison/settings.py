"""In which settings runs differ: those of their config.yaml, and what run.json says of versions and device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dynlight.errors import SettingError
from dynlight.recording.report.text import one_line

# Where a run goes and who looks on: they change none of its numbers.
ASIDE = ("out.", "overwrite.", "checkpoint.", "keep.", "trainer.logger.", "trainer.profiler.")
DESCRIBED = ("device", "processes", "versions")  # of run.json
ABSENT = object()


def read_settings(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings by their names in the YAML, `update.lr`; a class is the value of its section, `update`.

    Args:
        folder: of the run.
        described: what run.json holds.
    """
    path, loader = folder / "config.yaml", getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is quicker
    try:
        config = yaml.load(path.read_bytes(), loader) if path.exists() else {}
        sections = dict(config)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise SettingError("folder", "have a whole config.yaml", got=folder, advice=str(error)) from error
    flat = _flat("", sections | {name: described.get(name) for name in DESCRIBED})
    return {name: value for name, value in flat.items() if not f"{name}.".startswith(ASIDE)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and "class_path" in value:
        kind = str(value["class_path"]).rpartition(".")[2]
        return {name: kind} | _flat(name, value.get("init_args") or {})
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(place): each for place, each in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    return {key: each for part in inner for key, each in part.items()}


def differing(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings in which runs differ.

    A setting that only some have, as an argument of their class, counts if it asks for something there: not null,
    false, zero or empty.
    """
    names = dict.fromkeys(name for run in runs for name in run)
    return [name for name in names if _differs([run.get(name, ABSENT) for run in runs])]


def _differs(values: list[Any]) -> bool:
    there = [value for value in values if value is not ABSENT]
    if any(value != there[0] for value in there):
        return True
    return len(there) < len(values) and bool(there[0])


def shown(value: Any) -> str:
    """Write a setting as in the YAML.

    >>> [shown(value) for value in (None, True, 0.002, ["a", 1])]
    ['null', 'true', '0.002', '[a, 1]']
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else one_line(str(value))


def words(settings: dict[str, Any], others: dict[str, Any]) -> str:
    """Say a run's values of those settings in which it differs from another: `update SGD, update.lr 0.1`."""
    return ", ".join(f"{name} {shown(settings[name])}" for name in differing([settings, others]) if name in settings)
