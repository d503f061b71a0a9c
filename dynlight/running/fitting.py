"""Fitting: a run of `dynlight.fit` from its configuration to its report."""

import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from dynlight.durable import draft_of
from dynlight.errors import SettingError
from dynlight.learning.checks import warn_of_imitated_bf16
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.board import ProcessFailedError
from dynlight.learning.processes.processes import may_checkpoint, share_of, way_of
from dynlight.learning.stream import DocumentStream
from dynlight.recording.checkpoint import Checkpoint
from dynlight.recording.loggers import close_loggers, open_loggers, place_loggers
from dynlight.recording.origin import Origin, settings_of
from dynlight.recording.progress import DocumentProgress
from dynlight.recording.receipt import Receipt
from dynlight.recording.records import Records
from dynlight.recording.report import files, terminal
from dynlight.recording.resume import find_start, how_to_resume, is_read, is_unfinished, remove_unfinished
from dynlight.recording.series import FlopsLogger
from dynlight.recording.signals import Interrupted, Signals
from dynlight.running.configuration import folder_of, save, told_settings
from dynlight.running.run import Run
from dynlight.running.together import Trial, choose, does_not_fit, most_to_read
from dynlight.running.trainer import make_trainer


def fit(config: Namespace, resumes: bool = False, signals: Signals | None = None) -> dict[str, Any]:
    """Reads the documents that a configuration describes and returns the summary of what they scored.

    Whatever can be known to be wrong is found before weights are loaded, and before anything is written.

    Args:
        config: the configuration.
        resumes: whether the run in its folder goes on, where it was cut short.
        signals: what tells it to stop.

    Raises:
        SettingError: if the configuration cannot be run.
        Interrupted: if a signal said so.
    """
    fitting = _Fitting(config, resumes, signals or Signals())
    if resumes and is_read(fitting.folder):
        return fitting.finish()
    stream = fitting.prepare()
    fitting.read(stream)
    return fitting.finish()


class _Fitting:
    """A run on its way: prepared, read, finished."""

    def __init__(self, config: Namespace, resumes: bool, signals: Signals) -> None:
        self.config = config
        self.folder = folder = folder_of(config)
        self._resumes = resumes
        self._earlier = Origin.read(folder) if resumes else None
        if self._earlier is not None:
            self._earlier.check_settings(folder, settings_of(config.as_dict()))
        self._run = Run(_with_loggers(config, folder, self._earlier))
        command = f"python -m dynlight.fit --config {folder / 'config.yaml'}"
        self._records = Records(folder, {"name": folder.name, "command": command}, resumes)
        receipt = Receipt(folder, resumes)
        self._checkpoint = Checkpoint(folder, receipt, self._run.choices.checkpoint, signals)
        meters = [FlopsLogger(folder, resumes), self._records, receipt, DocumentProgress(), self._checkpoint]
        self._trainer = make_trainer(self._run.choices.trainer, meters, folder)
        if not resumes and self._trainer.is_global_zero:  # the others come when it is there
            _check_folder(folder, config.overwrite)

    def prepare(self) -> DocumentStream:
        """The documents of the run, as many together as fit, from where it goes on."""
        run, trainer = self._run, self._trainer
        run.check(trainer)
        stream = DocumentStream.of(run.documents, run.choices.data.together)
        if stream.together == "auto" and trainer.is_global_zero:  # the others take the number from it
            choice = choose(self._trial, most_to_read(stream.loaded, trainer.world_size, run.outline))
            stream.together = self.config.data.together = choice.together
            print(choice)
        share = share_of(trainer)
        settings = settings_of(self.config.as_dict())
        if self._earlier is None:
            self._origin, self._start = Origin.of_run(settings, stream.loaded, stream.together, share[1]), None
            return stream
        self._earlier.check_documents(self.folder, stream.loaded)
        context, carries_over = run.choices.context, run.choices.reset.carries_over
        has_checkpoints = may_checkpoint(way_of(trainer.strategy))
        self._start = find_start(self.folder, self._earlier, stream, context, carries_over, share, has_checkpoints)
        self._origin = self._start.origin
        return stream.after(self._start.position)

    def read(self, stream: DocumentStream) -> None:
        """Reads all documents; what was written is all that is left where that fails."""
        warn_of_imitated_bf16(self._trainer)
        module = self._run.module(digests=True)
        with _said_by_the_first(self._trainer), self._nothing_left_of_nothing():
            if self._trainer.is_global_zero:
                self._make_folder()
                versions = open_loggers(self._trainer.loggers, told_settings(self.config))
                self._origin = self._origin.logged_as(versions)
            self._checkpoint.prepare(self._origin, self._start)
            try:
                self._trainer.fit(module, stream)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, module, int(stream.together)) from error

    def finish(self) -> dict[str, Any]:
        """What is made of the run's rows, by its first process; returns the summary."""
        if not self._trainer.is_global_zero:
            return {"failed": [], "finished_static": []}  # the first process says which
        summary = files.write(self.folder)
        print(terminal.printed_table(self.folder))
        print(f"\nreport  {self.folder / 'report.html'}")
        close_loggers(self._trainer.loggers, self.folder, summary)
        remove_unfinished(self.folder)
        return summary

    def _make_folder(self) -> None:
        """Makes the run's folder, with the configuration in it."""
        if self.folder.exists() and not self._resumes:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with draft_of(self.folder / "config.yaml") as draft:
            save(self.config, draft)

    @contextmanager
    def _nothing_left_of_nothing(self) -> Iterator[None]:
        """Removes the folder again of a run that fails before it has read anything."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except BaseException:
            has_begun = self._resumes or self._records.has_begun
            if self._trainer.is_global_zero and not has_begun and self.folder.exists():
                shutil.rmtree(self.folder)
            raise

    def _trial(self) -> Trial:
        """What the run does, in small, on the same device."""
        processes = getattr(self._trainer.strategy, "num_processes", 1)
        return Trial(self._run, self._trainer.strategy.root_device, processes)

    def _out_of_memory(self, error: Exception, module: DynamicEvaluation, together: int) -> SettingError:
        """What to say where memory ran out: how many documents would have fitted."""
        _release(error, module, self._trainer)
        if way_of(self._trainer.strategy) != "sharded":
            return does_not_fit(together, self._trial)
        return SettingError(
            "trainer.devices",
            "be as many as the parts of the model, its gradients and the optimizer's state fit on",
            got=f"{self._trainer.world_size}, where memory ran out",
            advice="choose more, LoRA, or a shorter context.segment",
        )


@contextmanager
def _said_by_the_first(trainer: Trainer) -> Iterator[None]:
    """Ends a process of `document_parallel` without a word where the first one says why."""
    try:
        yield
    except (ProcessFailedError, Interrupted, SettingError, torch.OutOfMemoryError):
        if way_of(trainer.strategy) == "documents" and not trainer.is_global_zero:
            sys.exit(2)
        raise


def _with_loggers(config: Namespace, folder: Path, earlier: Origin | None) -> Namespace:
    """The same configuration, with the settings of loggers that follow from the run; what it leaves has the user's."""
    config = config.clone()
    place_loggers(config.trainer, folder, earlier.loggers if earlier is not None else [], earlier is not None)
    return config


def _release(error: Exception, module: DynamicEvaluation, trainer: Trainer) -> None:
    """Lets go of all that fills the device's memory after a run has failed there."""
    traceback.clear_frames(error.__traceback__)
    trainer.strategy.optimizers = []
    module.release()


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite and is_unfinished(folder):
        raise SettingError(
            "out",
            "be a new folder",
            got=f"{folder}, a run that was cut short",
            advice=f"go on with {how_to_resume(folder)}, or set overwrite: true",
        )
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise SettingError("out", "be a new folder", got=folder, advice="choose another or set overwrite: true")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise SettingError("out", "be a folder that can be made", got=folder, advice=f"{above} cannot be written to")
