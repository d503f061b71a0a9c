"""Rows: how well dynlight serves one type, found out in a process of its own, which may crash or hang."""

import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from dynlight.errors import SettingError
from dynlight.running.trainer import quiet
from experiments.families import cells, tiny
from experiments.families.cells import CELLS, Outcome, Subject

MOST_SECONDS = 120  # of one type
_MISTAKES = ("WRONG", "TRACEBACK")


@dataclass(frozen=True)
class Row:
    """How well dynlight serves a type.

    Args:
        name: of the type.
        loading: right, or untried where no tiny model can be made, or what came of loading it.
        cells: where it was loaded, what came of each.
        rate: of learning, at which it is stable.
        moved: how far learning moves the loop's nats of a document, as a share of them.
    """

    name: str
    loading: Outcome
    cells: dict[str, Outcome] = field(default_factory=dict)
    rate: float = 0.0
    moved: float = 0.0

    @property
    def right(self) -> int:
        """How many of its cells are right."""
        return sum(outcome.kind == "right" for outcome in self.cells.values())

    @property
    def mistakes(self) -> dict[str, Outcome]:
        """Wrong numbers, and errors that say nothing to a user, by their column."""
        every = {"loading": self.loading, **self.cells}
        return {name: outcome for name, outcome in every.items() if outcome.kind in _MISTAKES}


def in_process(name: str) -> Row:
    """The row of a type; if its process crashes or hangs, that is a mistake."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, sending))
    process.start()
    sending.close()
    try:
        if receiving.poll(MOST_SECONDS):
            return receiving.recv()
        return Row(name, Outcome("TRACEBACK", f"took longer than {MOST_SECONDS} s"))
    except EOFError:
        process.join()
        return Row(name, Outcome("TRACEBACK", f"the process ended with exit status {process.exitcode}"))
    finally:
        process.kill()
        process.join()


def _send(name: str, sending: Connection) -> None:
    torch.set_num_threads(1)
    sending.send(row_of(name, list(CELLS)))


def row_of(name: str, columns: Sequence[str]) -> Row:
    """The row of a type, with the cells of these columns."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        _quiet()
        try:
            tiny.save(name, Path(folder))
        except tiny.NotMadeError as error:
            return Row(name, Outcome("untried", str(error)))
        try:
            subject = Subject(Path(folder))
        except SettingError as error:
            return Row(name, Outcome("refused", str(error).replace(folder, "a folder")))
        except Exception as error:  # what nothing has foreseen
            return Row(name, Outcome("TRACEBACK", cells.raised(error)))
        of_columns = {column: cells.tried(column, subject) for column in columns}
        moved = cells.apart(subject.in_windows, subject.static)
        return Row(name, Outcome("right"), of_columns, subject.rate, moved)


def _quiet() -> None:
    quiet()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
