"""Saved: a reader on disk, and what a run has kept of a document in a reader."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dynlight.documents.document import Document
from dynlight.errors import SettingError, require
from dynlight.learning.module import DynamicEvaluation
from dynlight.recording.kept import FILES, SoFar, folder_of, read_learned, write_learned
from dynlight.recording.sealed import DamagedError, seal, unseal

STATE = "reader.sealed"


class _Reader(Protocol):
    """What is asked of a reader here."""

    module: DynamicEvaluation
    settings: Any  # of the Trainer
    so_far: SoFar
    loads: str

    @property
    def protocol(self) -> str: ...
    def hashes(self) -> dict[str, str]: ...
    def learned(self) -> dict[int, dict[str, Tensor]]: ...
    def progress_state(self) -> dict[str, Any]: ...
    def load_progress_state(self, state: dict[str, Any]) -> None: ...
    def make_ready(self) -> None: ...
    def recall(self, tokens: Tensor, learned: dict[str, Tensor]) -> None: ...


def save(reader: _Reader, folder: Path) -> None:
    """Writes what a reader has learned, as PEFT or transformers loads it, and its state."""
    state = {"choices": _choices_of(reader), "state": reader.progress_state()}
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of another reader, or of this one before it forgot
        (folder / name).unlink(missing_ok=True)
    learned = reader.learned()
    if learned and reader.so_far.tokens:
        best = next(iter(learned))
        card = reader.so_far.card(reader.module, best, "a text that goes on")
        write_learned(folder, reader.module, learned[best], card, reader.loads)
    seal(folder / STATE, state)


def load(reader: _Reader, folder: Path) -> None:
    """Puts a saved state into a reader of the same model and choices.

    Raises:
        SettingError: if there is none, or something differs.
    """
    path = folder / STATE
    require(path.is_file(), "folder", f"hold the {STATE} that Reader.save leaves", got=folder)
    try:
        saved = unseal(path)
    except DamagedError as error:
        raise SettingError("folder", f"hold a {STATE} that is whole", got=f"{folder}: {error}") from error
    own = _choices_of(reader)
    for name in sorted(own.keys() | saved["choices"].keys()):
        was, now = (each.get(name, "nothing") for each in (saved["choices"], own))
        require(was == now, "folder", f"be saved by a reader with {name} {now}", got=f"{folder} with {was}")
    reader.load_progress_state(saved["state"])


def recall(reader: _Reader, run: Path, document: Document) -> bool:
    """Has a reader know what a run has kept of a document; returns whether there is anything.

    Raises:
        SettingError: if it is damaged, or of weights of other names.
    """
    folder = folder_of(run, document)
    if not any((folder / name).is_file() for name in FILES[:2]):
        return False
    reader.make_ready()
    learned = read_learned(folder)
    unknown = sorted(learned.keys() - set(reader.module.weights.names))
    require(not unknown, "run", "have kept weights that its configuration lets learn", got=", ".join(unknown[:1]))
    reader.recall(document.tokens, learned)
    return True


def _choices_of(reader: _Reader) -> dict[str, str]:
    """All on which the state of a reader depends, and what it means."""
    module, hashes = reader.module, reader.hashes()
    described = {
        "protocol": reader.protocol,
        "weights": hashes["model"],
        "reference": str(module.reference),
        "on_failure": type(module.failures).__name__,
        "precision": str(getattr(reader.settings, "precision", None)),
        "tokenizer": hashes["tokenizer"],
        "teacher": hashes.get("teacher", "none"),
    }
    for rule, optimizer in enumerate(module.optimizers_of_rules):
        settings = ", ".join(f"{name} {value}" for name, value in sorted(optimizer.defaults.items()))
        described[f"rule {rule}"] = f"{type(optimizer).__name__}({settings})"
    return described
