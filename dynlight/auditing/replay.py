"""Replay: plays rows of a run again, and compares them with its receipt."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from dynlight.documents.segments import Segment
from dynlight.documents.waves import waves
from dynlight.errors import SettingError
from dynlight.learning.digests import hash_of
from dynlight.recording.hashes import hash_of_documents
from dynlight.recording.ledger import COLUMNS, faults_of, first_link
from dynlight.recording.receipt import Receipt
from dynlight.running.run import Run

_RELATIVE = 1e-5  # how far nats may differ, as another machine adds in another order


@dataclass(frozen=True)
class Replay:
    """How rows that were played again compare with a receipt."""

    rows: int  # that were compared
    faults: tuple[str, ...]
    deviation: float  # the largest, in nats of a segment
    digests_equal: int  # rows with the same two digests as in the receipt

    @property
    def agrees(self) -> bool:
        """Whether ledger, hashes and nats are what the receipt says."""
        return not self.faults

    def table(self) -> str:
        """The result for a person."""
        lines = [
            f"segments played again   {self.rows:,}",
            f"largest difference      {self.deviation:.2g} nats a segment",
            f"digests of weights      {self.digests_equal:,} of {self.rows:,} equal"
            + ("" if self.digests_equal == self.rows else ": another machine or number of threads rounds otherwise"),
            *(f"fault                   {fault}" for fault in self.faults),
        ]
        return "\n".join([*lines, "the receipt holds" if self.agrees else "the receipt doesn't hold"])


def replay(folder: str | Path, documents: str | None = None, segments: str | None = None) -> Replay:
    """Plays segments of a run again and compares them with its receipt.

    Args:
        folder: the run's, with `config.yaml` and `receipt.json`.
        documents: numbers of documents, `0,2` or `0-3`; None: all.
        segments: numbers of segments; None: all. Earlier segments are played too, as they make the weights.

    Raises:
        SettingError: if there is no receipt, or none of its rows is chosen.
    """
    folder = Path(folder)
    contents = _receipt_of(folder)
    wanted_documents, wanted_segments = numbers("documents", documents), numbers("segments", segments)
    chosen = [row for row in contents["ledger"] if wanted_documents(row[0]) and wanted_segments(row[1])]
    if not chosen:
        raise SettingError("documents and segments", "name rows of the receipt", got=f"{documents} and {segments}")
    run = Run.of(["--config", str(folder / "config.yaml")])
    again = _play(run, chosen)
    hashes = again.contents["hashes"] | {
        "data": hash_of_documents(run.documents),
        "config": hash_of((folder / "config.yaml").read_bytes()),
    }
    faults = faults_of(contents) + [
        f"{name} is another than the receipt says"
        for name, recorded in contents["hashes"].items()
        if hashes[name] != recorded
    ]
    return _compare(chosen, again.contents["ledger"], faults)


def _play(run: Run, rows: Sequence[Sequence[Any]]) -> Receipt:
    """Plays the documents of these rows again, with all documents that their scores depend on; returns a new receipt."""
    module = run.module(digests=True)
    together = 1 if run.choices.data.together == "auto" else run.choices.data.together
    indices = {row[0] for row in rows}
    if run.choices.reset.carries_over:
        needed = set(range(max(indices) + 1))
    else:  # whole waves: beside other documents, sums would be made in another order
        of_waves = [{document.index for document in wave} for wave in waves(run.documents, module.context, together)]
        needed = set().union(*(wave for wave in of_waves if wave & indices))
    documents = [document for document in run.documents if document.index in needed]
    is_one_wave = len(waves(documents, module.context, together)) == 1
    receipt, last = Receipt(), max(row[1] for row in rows) if is_one_wave else None
    run.read(module, documents, [receipt, _StopAfter(last)], together)
    return receipt


def _compare(chosen: Sequence[Any], ledger: Sequence[Any], faults: list[str]) -> Replay:
    """Compares chosen rows of a receipt with a ledger that was played again; `faults` are those known before."""
    played_again = {(row[0], row[1]): row for row in ledger}
    deviation, equal = 0.0, 0
    for row in chosen:
        played = played_again.get((row[0], row[1]))
        if played is None or played[2] != row[2]:
            faults.append(f"document {row[0]}, segment {row[1]} was not scored again")
            continue
        away = abs(played[3] - row[3])
        deviation = max(deviation, math.inf if math.isnan(away) else away)
        equal += played[4:6] == row[4:6]
        if not away <= _RELATIVE * max(1.0, abs(row[3])):
            faults.append(f"document {row[0]}, segment {row[1]}: {played[3]:.6f} nats, the receipt says {row[3]:.6f}")
    return Replay(len(chosen), tuple(faults), deviation, equal)


class _StopAfter(Callback):
    """Ends the reading after the segment with index `last`, if one is given; only for a run of one wave."""

    def __init__(self, last: int | None) -> None:
        self._last = last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        if self._last is not None and batch.cut.index >= self._last:
            trainer.should_stop = True


def _receipt_of(folder: Path) -> dict[str, Any]:
    """The contents of a run's receipt.json; SettingError where it holds no ledger."""
    for name in ("config.yaml", "receipt.json"):
        if not (folder / name).is_file():
            raise SettingError("receipt", "be the folder of a run", got=folder, advice=f"it has no {name}")
    try:
        contents = json.loads((folder / "receipt.json").read_text("utf-8"))
        assert list(contents["columns"]) == list(COLUMNS)
        assert all(len(row) == len(COLUMNS) for row in contents["ledger"])
        first_link(contents)
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise SettingError("receipt", "hold a ledger", got=f"{folder / 'receipt.json'} without ({error!r})") from error
    return contents


def numbers(name: str, given: str | None) -> Callable[[int], bool]:
    """A function that says whether a number is among those given as `0,2,5-7`; None gives all."""
    if given is None:
        return lambda number: True
    ranges = []
    for number_or_range in given.split(","):
        first, _, last = number_or_range.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise SettingError(name, "be numbers and ranges like 0,2,5-7", got=given)
        ranges.append(range(int(first), int(last or first) + 1))
    return lambda number: any(number in numbers for numbers in ranges)
