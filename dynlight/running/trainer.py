"""Trainer: Lightning's Trainer for reading each document once, in order."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from dynlight.errors import SettingError, require
from dynlight.learning.processes.strategies import register
from dynlight.recording.checkpoint import Checkpoint
from dynlight.recording.progress import DocumentProgress

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_SETTLED = (
    ".*will run with no optimizer.*",  # static evaluation
    ".*in eval mode at the start of training.*",  # dropout would make scores random
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
)
TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
}


def make_trainer(settings: Namespace, meters: Sequence[Callback], folder: Path) -> Trainer:
    """A Trainer of the configuration's settings, with meters beside the user's callbacks.

    Raises:
        SettingError: if Lightning cannot run it here.
    """
    register()
    chosen = settings.as_dict()
    of_user = list(chosen.pop("callbacks") or [])
    require(
        not any(isinstance(callback, LightningCheckpoint) for callback in of_user),
        "trainer.callbacks",
        "hold no ModelCheckpoint, as a run writes its own",
        got="one",
        advice="set checkpoint",
    )
    is_kept = any(isinstance(meter, Checkpoint) for meter in meters)
    try:
        return Trainer(
            **chosen, **TRAINER, enable_checkpointing=is_kept, callbacks=[*meters, *of_user], default_root_dir=folder
        )
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        reason = shorten(" ".join(str(error).split()), 200, placeholder=" …")
        named = re.search(r"`(accelerator|devices|strategy|precision|num_nodes)\b", reason)
        setting = f"trainer.{named[1]}" if named else "trainer"
        raise SettingError(setting, "be what Lightning can run here", got=f"something else: {reason}") from error


def silent_trainer(settings: Namespace, meters: Sequence[Callback], folder: Path | None = None) -> Trainer:
    """A Trainer as from `make_trainer`, without a progress bar."""
    silent = DocumentProgress()
    silent.disable()
    return make_trainer(settings, [*meters, silent], folder or Path.cwd())


def on_one_device(settings: Namespace) -> Namespace:
    """The trainer's settings changed to read in this process alone, which changes no score.

    Raises:
        SettingError: if it would, as all processes of the strategy learn one set of weights.
    """
    if settings.strategy not in ("auto", "document_parallel", "model_parallel"):
        raise SettingError(
            "trainer.strategy", "be auto, document_parallel or model_parallel to be read again", got=settings.strategy
        )
    return Namespace(**(settings.as_dict() | {"strategy": "auto", "devices": 1, "num_nodes": 1}))


def quiet() -> None:
    """Silences messages of libraries about what is settled here, for the rest of a command."""
    for library in _LOGGERS:
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each failed attempt
    warnings.formatwarning = lambda message, *place: f"warning: {message}\n"
    for message in _SETTLED:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet_for_now() -> Iterator[None]:
    """Silences these messages within the block, in a program of the user's."""
    levels = {library: logging.getLogger(library).level for library in _LOGGERS}
    with warnings.catch_warnings():
        for message in _SETTLED:
            warnings.filterwarnings("ignore", message=message)
        try:
            for library in levels:
                logging.getLogger(library).setLevel(logging.WARNING)
            yield
        finally:
            for library, level in levels.items():
                logging.getLogger(library).setLevel(level)
