"""Configuration: the settings of a run, parsed and made into what they name; nothing is read or loaded here."""

import inspect
import json
import pydoc
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from traceback import walk_tb
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from dynlight.choices import context  # noqa: F401 - its classes, which a YAML names without their module
from dynlight.choices.gradient import Gradient
from dynlight.choices.memories import DocumentMemory
from dynlight.choices.mixture import Mixture
from dynlight.choices.objective import Objective
from dynlight.choices.parameters import Parameters
from dynlight.choices.reset import ResetWeights
from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import Update
from dynlight.documents.segments import Context
from dynlight.errors import SettingError, require
from dynlight.learning.checks import check_precision
from dynlight.learning.stream import DocumentStream
from dynlight.recording.checkpoint import CheckpointPeriod
from dynlight.recording.kept import Keep
from dynlight.running.messages import ConfigFile, one_line, setting_names
from dynlight.running.pretrained import Pretrained

# The settings that DynamicEvaluation takes.
CHOICES = (
    "context",
    "parameters",
    "objective",
    "update",
    "schedule",
    "reset",
    "reference",
    "clip",
    "gradient",
    "rates",
    "rate_factors",
    "mixture",
    "memories",
    "on_failure",
)
# What a user may set of Lightning's Trainer; the rest follows from reading each document once.
_TRAINER_SETTINGS = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "deterministic",
    "benchmark", "profiler", "plugins",
}  # fmt: skip
_OF_TRAINER = {
    "trainer.logger": Logger,
    "trainer.callbacks": Callback,
    "trainer.strategy": Strategy,
    "trainer.profiler": Profiler,
}
# Settings that have their default where a YAML gives null, which the parser lets pass for any type.
_NOT_NULL = ("model.dtype", "schedule", "schedule.passes", "reset", "trainer", "seed")


def parser() -> ArgumentParser:
    """The parser of a run's settings: the keys of a section are the arguments of the class that the section makes."""
    set_parsing_settings(import_path_denylist=[])  # refuse, not warn of, a YAML that names os.system
    settings = ArgumentParser(prog="python -m dynlight.fit", exit_on_error=False, allow_abbrev=False)
    settings.add_argument("--config", action=ConfigFile)
    settings.add_class_arguments(Pretrained, "model")
    settings.add_class_arguments(DocumentStream, "data")
    settings.add_subclass_arguments(Context, "context", required=True)
    settings.add_subclass_arguments(Parameters, "parameters", default={"class_path": "dynlight.All"})
    settings.add_subclass_arguments(Objective, "objective", default={"class_path": "dynlight.NextToken"})
    settings.add_argument("--update", type=Update | list[Update] | None, default=None)
    settings.add_class_arguments(UpdateFrequency, "schedule")
    settings.add_class_arguments(ResetWeights, "reset")
    settings.add_argument("--reference", type=Literal["static"] | None, default="static")
    settings.add_argument("--clip", type=float | None, default=None)
    settings.add_argument("--gradient", type=list[Gradient] | None, default=None)
    settings.add_argument("--rates", type=list[float] | None, default=None)
    settings.add_argument("--rate_factors", type=dict[str, float] | None, default=None)
    settings.add_argument("--teacher", type=Pretrained | None, default=None)
    settings.add_argument("--mixture", type=Mixture | None, default=None)
    settings.add_argument("--memories", type=list[DocumentMemory] | None, default=None)
    others = set(inspect.signature(Trainer).parameters) - _TRAINER_SETTINGS
    settings.add_class_arguments(Trainer, "trainer", skip=others, instantiate=False)
    settings.set_defaults({"trainer.logger": False, "trainer.devices": 1})
    settings.add_argument("--on_failure", type=Literal["stop", "static"], default="stop")
    settings.add_argument("--checkpoint", type=CheckpointPeriod | None, default={"minutes": 5.0})
    settings.add_argument("--keep", type=Keep | Literal["adapters", "weights"] | None, default=None)
    settings.add_argument("--seed", type=int, default=0)
    settings.add_argument("--out", type=str | None, default=None)
    settings.add_argument("--overwrite", type=bool, default=False)
    return settings


def parse(arguments: Sequence[str]) -> Namespace:
    """The configuration that the arguments describe.

    Raises:
        SettingError: in one line, if the arguments describe no configuration.
    """
    settings = parser()
    try:
        config = settings.parse_args(list(arguments))
    except ArgumentError as error:
        raise _of_a_class(error) or SettingError.worded(one_line(str(error), setting_names(settings))) from error
    defaults = settings.get_defaults(skip_validation=True)
    for name in _NOT_NULL:
        if config.get(name, ...) is None:
            config[name] = defaults[name]
    return config


def instantiate(config: Namespace) -> Namespace:
    """The configuration with objects in the place of the settings that describe them.

    Raises:
        SettingError: if a class refuses its settings.
    """
    check_settings(config)
    try:
        return parser().instantiate(config)
    except Exception as error:  # whatever a class raises
        if (refusal := _of_a_class(error) or _of_lightning(error)) is None:
            raise
        raise refusal from error


def check_settings(config: Namespace) -> None:
    """Raises SettingError for what no class of a section checks: rates beside rules, the seed, the precision."""
    _check_rates(config)
    require(0 <= config.seed < 2**32, "seed", f"be from 0 to {2**32 - 1}", got=config.seed)
    check_precision(config.trainer.precision)  # on a CPU, Lightning would put bf16 in the place of fp16


def folder_of(config: Namespace) -> Path:
    """The run's folder."""
    name = Path(str(config.config[0])).stem if config.config else "run"
    return Path(config.out or Path("runs") / name)


def save(config: Namespace, path: Path) -> None:
    """Writes a configuration as YAML, every default in it."""
    try:
        parser().save(config, path, skip_unset=False, overwrite=True)
    except yaml.YAMLError as error:
        raise SettingError("trainer", "hold settings that a YAML can hold", got=error.args[-1]) from error


def minimal(config: Namespace) -> dict[str, Any]:
    """The settings of a configuration that are not at their defaults, as plain data."""
    settings: dict[str, Any] = json.loads(parser().dump(config, skip_default=True, skip_validation=True, format="json"))
    return settings


def told_settings(config: Namespace) -> dict[str, Any]:
    """The settings that W&B shows of a run."""
    settings = config.as_dict()
    return {name: settings[name] for name in ("model", "data", "teacher", "seed", *CHOICES)}


def _of_a_class(error: BaseException | None) -> SettingError | None:
    """The SettingError by which a class refused its settings, which the parser wraps into its own errors; else None."""
    while error is not None and not isinstance(error, SettingError):
        error = error.__cause__ or error.__context__
    return error


def _of_lightning(error: BaseException) -> SettingError | None:
    """The SettingError for a class of a trainer's setting whose constructor raised `error`; else None."""
    while (cause := error.__cause__ or error.__context__) is not None:  # the parser wraps what a class raises
        error = cause
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "__init__"]
    for made in (frame.f_locals.get("self") for frame in frames):
        for setting, kind in _OF_TRAINER.items():
            if isinstance(made, kind):
                got = " ".join(f"{type(made).__name__}, which says: {error}".split())
                return SettingError(setting, "be what can be made here", got=shorten(got, 300, placeholder=" …"))
    return None


def _check_rates(config: Namespace) -> None:
    """Raises SettingError where a rule has a learning rate of its own that a mixture would not use."""
    if config.rates is None and config.mixture is None and not config.memories:
        return
    chosen = config["update"]  # `config.update` is the namespace's own method
    for rule in chosen if isinstance(chosen, list) else [chosen] if chosen else []:
        usual = inspect.signature(pydoc.locate(rule.class_path)).parameters.get("lr")  # type: ignore[arg-type]
        if usual is not None and (given := rule.init_args.lr) != usual.default:
            raise SettingError(
                "update.lr",
                "be left out where there are rates, a mixture or memories",
                got=given,
                advice=f"set rates: [{given}]",
            )
