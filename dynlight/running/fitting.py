"""Fitting: a run of `dynlight.fit` from its configuration to its report."""

import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from dynlight.durable import draft_of, is_out_of_room
from dynlight.errors import CallbackFailedError, SettingError, told
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.board import ProcessFailedError
from dynlight.learning.processes.processes import may_checkpoint, share_of, way_of
from dynlight.learning.stream import DocumentStream
from dynlight.recording.checkpoint import Checkpoint
from dynlight.recording.kept import Keep, Kept
from dynlight.recording.loggers import close_loggers, open_loggers, place_loggers, watch
from dynlight.recording.origin import Origin, settings_of
from dynlight.recording.progress import DocumentProgress
from dynlight.recording.receipt import Receipt
from dynlight.recording.records import Records
from dynlight.recording.report import files, terminal
from dynlight.recording.resume import Start, find_start, how_to_resume, is_read, is_unfinished, remove_unfinished
from dynlight.recording.series import FlopsLogger
from dynlight.recording.signals import Interrupted, Signals
from dynlight.running.configuration import folder_of, save, told_settings
from dynlight.running.onlookers import Onlookers
from dynlight.running.run import Run
from dynlight.running.together import Trial, choose, does_not_fit, most_to_read
from dynlight.running.trainer import make_trainer


def fit(config: Namespace, resumes: bool = False, signals: Signals | None = None) -> dict[str, Any]:
    """Reads the documents that a configuration describes.

    What can be known to be wrong is refused before weights are loaded, and before anything is written.

    Args:
        config: the configuration.
        resumes: whether the run in the configuration's folder goes on, where it was cut short.
        signals: that stop the run.

    Returns:
        What summary.json holds, and `callbacks`: what callbacks of the user's raised after the last segment.

    Raises:
        SettingError: if the configuration cannot be run.
        Interrupted: if a signal stops the run.
        CallbackFailedError: if a callback of the user's stops it.
    """
    fitting = _Fitting(config, resumes, signals or Signals())
    if not (resumes and is_read(fitting.folder)):
        fitting.read(fitting.prepare())
    return fitting.finish() | {"callbacks": fitting.onlookers.failures}


class _Fitting:
    """A run on its way: it is prepared, read, and finished.

    Raises:
        SettingError: if its settings cannot be run, or its folder cannot be made.
    """

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
        self._keep = Keep.of(self._run.choices.keep)
        loads = self._run.choices.model.how_to_load()
        # First: a document whose rows are all on disk is not read again, so what it taught must be there by then.
        kept = [] if self._keep is None else [Kept(folder, self._keep, loads)]
        meters = [*kept, FlopsLogger(folder, resumes), self._records, receipt, DocumentProgress(), self._checkpoint]
        self._trainer = make_trainer(self._run.choices.trainer, meters, folder)
        self.onlookers = Onlookers(self._run.choices.trainer.callbacks or [], signals)
        watch(self._trainer.loggers)
        if not resumes and self._trainer.is_global_zero:  # when the other processes start, the folder is there
            _check_folder(folder, config.overwrite)

    def prepare(self) -> DocumentStream:
        """Checks the run, and returns its stream of documents, placed where the run begins or goes on.

        Nothing is written, and no weights are loaded but for a trial of how many documents fit together.
        """
        self._run.check(self._trainer)
        if self._keep is not None:
            self._keep.check(self._run.outline, self._trainer)
        stream = self._run.stream()
        if stream.together == "auto" and self._trainer.is_global_zero:  # the first process tells the others the number
            self._choose_together(stream)
        if self._earlier is None:
            settings, (_, ranks) = settings_of(self.config.as_dict()), share_of(self._trainer)
            self._origin, self._start = Origin.of_run(settings, stream.loaded, stream.together, ranks), None
            return stream
        self._start = self._find_start(self._earlier, stream)
        self._origin = self._start.origin
        return stream.after(self._start.position)

    def read(self, stream: DocumentStream) -> None:
        """Reads all documents; of a run that fails on the way, what was written by then stays."""
        module = self._run.module(digests=True)
        with _only_the_first_explains(self._trainer), self._no_empty_folder_left():
            if self._trainer.is_global_zero:
                self._make_folder()
                self._open_loggers()
            self._checkpoint.prepare(self._origin, self._start)
            try:
                self._trainer.fit(module, stream)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, module, int(stream.together)) from error

    def finish(self) -> dict[str, Any]:
        """Makes the report of the run's rows in the first process, and returns the summary."""
        if not self._trainer.is_global_zero:
            return {"failed": [], "finished_static": []}  # the first process lists them
        table, summary = files.write_tables(self.folder)
        terminal.show(terminal.printed_table(self.folder))
        self._draw_page(table, summary)
        close_loggers(self._trainer.loggers, self.folder, summary)
        remove_unfinished(self.folder)
        return summary

    def _draw_page(self, table: pd.DataFrame, summary: dict[str, Any]) -> None:
        """Draws report.html; where that fails, all results are there, and it can be tried again."""
        try:
            files.write_page(self.folder, table, summary)
            terminal.show(f"\nreport  {self.folder / 'report.html'}")
        except Exception as error:
            if is_out_of_room(error):
                raise
            again = f"python -m dynlight.report {self.folder}"
            print(f"warning: report.html must be drawn, got {told('a page', error)}; try {again}", file=sys.stderr)

    def _choose_together(self, stream: DocumentStream) -> None:
        """Sets how many documents are read together to as many as fit into memory."""
        choice = choose(self._trial, most_to_read(stream.loaded, self._trainer.world_size, self._run.outline))
        stream.together = self.config.data.together = choice.together
        print(choice)

    def _find_start(self, earlier: Origin, stream: DocumentStream) -> Start:
        """Finds where the run that `earlier` describes goes on in this process, if it still has the same documents."""
        earlier.check_documents(self.folder, stream.loaded)
        choices, strategy = self._run.choices, self._trainer.strategy
        return find_start(
            self.folder,
            earlier,
            stream,
            choices.context,
            choices.reset.carries_over,
            share_of(self._trainer),
            may_checkpoint(way_of(strategy)),
        )

    def _make_folder(self) -> None:
        """Makes the run's folder, with the configuration in it."""
        config, path = self.config.clone(), self.folder / "config.yaml"
        if self._resumes:  # by another spelling perhaps: the receipt has a hash of the file
            config.out = yaml.safe_load(path.read_text("utf-8")).get("out", config.out)
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with draft_of(path) as draft:
            save(config, draft)

    def _open_loggers(self) -> None:
        """Opens the loggers, and notes in the origin the versions with which they can go on."""
        versions = open_loggers(self._trainer.loggers, told_settings(self.config))
        self._origin = self._origin.logged_as(versions)

    @contextmanager
    def _no_empty_folder_left(self) -> Iterator[None]:
        """Removes the folder of a run that fails before it has read anything; it stays where memory ran out."""
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
        """A trial of the run on its own device."""
        processes = getattr(self._trainer.strategy, "num_processes", 1)
        return Trial(self._run, self._trainer.strategy.root_device, processes)

    def _out_of_memory(self, error: Exception, module: DynamicEvaluation, together: int) -> SettingError:
        """The error where memory ran out, with how many documents would have fitted."""
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
def _only_the_first_explains(trainer: Trainer) -> Iterator[None]:
    """Ends every process of `document_parallel` but the first without a message, as the first one says why."""
    try:
        yield
    except (ProcessFailedError, Interrupted, SettingError, CallbackFailedError, torch.OutOfMemoryError):
        if way_of(trainer.strategy) == "documents" and not trainer.is_global_zero:
            sys.exit(2)
        raise


def _with_loggers(config: Namespace, folder: Path, earlier: Origin | None) -> Namespace:
    """A copy of the configuration with loggers placed for this run; config.yaml keeps the user's settings of them."""
    config = config.clone()
    place_loggers(config.trainer, folder, earlier.loggers if earlier is not None else [], earlier is not None)
    return config


def _release(error: Exception, module: DynamicEvaluation, trainer: Trainer) -> None:
    """Frees the device's memory after a run has failed there."""
    traceback.clear_frames(error.__traceback__)
    trainer.strategy.optimizers = []
    module.release()


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raises SettingError unless the folder of a new run can be made, or replaced where that is allowed."""
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
