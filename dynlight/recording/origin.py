"""Origin: what a run is made of, by which a run that goes on notices a change."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from dynlight.documents.document import Document
from dynlight.errors import SettingError
from dynlight.recording.hashes import hash_of_documents
from dynlight.recording.sealed import DamagedError, seal, unseal

UNFINISHED = "unfinished"  # the folder in a run's folder that only an unfinished run has
# Settings that may change when a run goes on: paths, loggers, and what changes no document's scores.
_FREE = ["config", "out", "overwrite", "checkpoint", "data.together", "trainer.devices", "trainer.accelerator"]
_FREE += ["trainer.strategy", "trainer.num_nodes", "trainer.logger", "trainer.profiler", "trainer.plugins"]

# Settings that dynlight 0.1.0 did not have, each with what a run of that version did.
_ADDED = {
    "context.prefix": "False",
    "context.refresh": "None",
    "context.sinks": "0",
    "gradient": "None",
    "keep": "None",
    "memories": "None",
    "model.gguf_file": "None",
    "objective.class_path": "dynlight.NextToken",
    "parameters.ranks": "None",
    "rate_factors": "None",
    "reset.keep": "0.0",
    "mixture.teacher": "False",
    "schedule.above": "None",
    "schedule.above_mean": "None",
    "teacher": "None",
}


@dataclass(frozen=True)
class Origin:
    """What a run is made of, and which documents its processes read in which waves.

    Raises:
        SettingError: from the checks, where settings, documents or model have changed since the run began.
    """

    settings: dict[str, str]
    documents: list[list[str]]  # [name, hash] of each
    together: int | str
    ranks: int
    done: list[int]  # documents that were finished before the present waves were made
    hashes: dict[str, str | None]  # of model and tokenizer; empty until the model is loaded
    loggers: list[list[Any]]  # [class, version] of each

    @classmethod
    def of_run(
        cls, settings: dict[str, str], documents: Sequence[Document], together: int | str, ranks: int
    ) -> "Origin":
        """The origin of a new run."""
        hashed = [[document.name, hash_of_documents([document])] for document in documents]
        return cls(settings, hashed, together, ranks, done=[], hashes={}, loggers=[])

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The origin of the unfinished run in a folder.

        Raises:
            SettingError: if the folder holds no unfinished run, or its origin is damaged.
        """
        file = folder / UNFINISHED / "origin.sealed"
        if not file.exists():
            advice = "it is finished" if (folder / "summary.json").exists() else "it has nothing to go on from"
            raise SettingError("resume", "be the folder of an unfinished run", got=folder, advice=advice)
        try:
            return cls(**unseal(file))
        except (DamagedError, TypeError) as error:
            raise SettingError(
                "resume",
                "be the folder of an unfinished run",
                got=folder,
                advice=f"its origin.sealed is damaged ({error}), so begin it again with overwrite: true",
            ) from error

    def write(self, unfinished: Path) -> None:
        """Writes the origin into the folder `unfinished` of a run."""
        seal(unfinished / "origin.sealed", asdict(self))

    def check_settings(self, folder: Path, settings: dict[str, str]) -> None:
        """Raises SettingError unless the run began with these settings, of whose callbacks some may be left out.

        `settings_of` leaves out those settings that may change.
        """
        # An empty `init_args` says nothing, and is not in every file.
        for name in sorted(name for name in {*self.settings, *settings} if not name.endswith(".init_args")):
            old, new = self.settings.get(name, _ADDED.get(name, "nothing")), settings.get(name, "nothing")
            if old != new and not (name == "trainer.callbacks" and _some_left_out(old, new)):
                raise SettingError(
                    name, f"be {old} as when {folder} began", got=new, advice="change it back, or begin another run"
                )

    def check_documents(self, folder: Path, documents: Sequence[Document]) -> None:
        """Raises SettingError unless the run began with these documents."""
        if len(documents) != len(self.documents):
            raise SettingError(
                "data",
                f"hold {len(self.documents)} document(s) as when {folder} began",
                got=len(documents),
                advice="begin another run",
            )
        for (name, earlier_hash), document in zip(self.documents, documents, strict=True):
            if document.name != name or hash_of_documents([document]) != earlier_hash:
                got = "another text" if document.name == name else f"{document.name!r}"
                raise SettingError(
                    "data", f"hold {name!r} as it was when {folder} began", got=got, advice="begin another run"
                )

    def check_hashes(self, folder: Path, hashes: dict[str, str | None]) -> None:
        """Raises SettingError unless the run began with models and a tokenizer of these hashes, where it knows them."""
        for name, earlier_hash in self.hashes.items():
            if hashes[name] != earlier_hash:
                what = "definition" if name == "tokenizer" else "weights"
                setting = "model.tokenizer" if name == "tokenizer" else f"{name}.pretrained"
                raise SettingError(
                    setting, f"have the {what} it had when {folder} began", got="others", advice="begin another run"
                )

    def begun(self, together: int, hashes: dict[str, str | None]) -> "Origin":
        """A copy with what is known once the model is loaded: the number of documents together, and the hashes."""
        return replace(
            self,
            together=together,
            hashes={name: hashes[name] for name in ("model", "tokenizer", "teacher") if name in hashes},
        )

    def logged_as(self, loggers: list[list[Any]]) -> "Origin":
        """A copy with the run's loggers: [class, version] of each."""
        return replace(self, loggers=loggers)

    @property
    def stream(self) -> dict[str, Any]:
        """What the order of segments depends on: a checkpoint counts segments of one such stream."""
        return {"together": self.together, "ranks": self.ranks, "done": self.done}


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """The settings that must not change when a run goes on: name, without `init_args` → value as text."""
    return {
        name: str(value)
        for name, value in _leaves(config)
        if not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    }


def _some_left_out(old: str, new: str) -> bool:
    """Whether a list of callbacks is an earlier one, from which some have been left out."""
    try:
        earlier, later = (ast.literal_eval(text) or [] for text in (old, new))
    except (ValueError, SyntaxError):  # of values that are no plain data
        return False
    return all(callback in earlier for callback in later)


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, above if name == "init_args" else f"{above}{name}.")
        else:
            yield f"{above}{name}", value
