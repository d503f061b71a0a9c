"""Origin: what a run is made of, so that a change is noticed when it goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from dynlight.documents.document import Document
from dynlight.errors import SettingError
from dynlight.recording.hashes import hash_of_documents
from dynlight.recording.sealed import DamagedError, seal, unseal

UNFINISHED = "unfinished"  # the folder in a run's folder that only an unfinished run has
# Settings that may change: where things are, who is told, and what changes no document's scores.
_FREE = ["config", "out", "overwrite", "checkpoint", "data.together", "trainer.devices", "trainer.accelerator"]
_FREE += ["trainer.strategy", "trainer.num_nodes", "trainer.logger", "trainer.profiler", "trainer.plugins"]


@dataclass(frozen=True)
class Origin:
    """What a run is made of, and which documents its processes read in which waves.

    Raises:
        SettingError: from its checks, where something has changed since.
    """

    settings: dict[str, str]
    documents: list[list[str]]  # of each its name, and a hash
    together: int | str
    ranks: int
    done: list[int]  # documents read before the present waves were made
    hashes: dict[str, str | None]  # of the model and its tokenizer; none before these are known
    loggers: list[list[Any]]  # of each its class and version

    @classmethod
    def of_run(
        cls, settings: dict[str, str], documents: Sequence[Document], together: int | str, ranks: int
    ) -> "Origin":
        """That of a new run."""
        hashed = [[document.name, hash_of_documents([document])] for document in documents]
        return cls(settings, hashed, together, ranks, done=[], hashes={}, loggers=[])

    @classmethod
    def read(cls, folder: Path) -> Self:
        """That of the unfinished run in a folder."""
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
        """Puts it where an unfinished run has it."""
        seal(unfinished / "origin.sealed", asdict(self))

    def check_settings(self, folder: Path, settings: dict[str, str]) -> None:
        """Whether these are the settings that the run began with, but for those that may change."""
        for name in sorted({*self.settings, *settings}):
            old, new = (each.get(name, "nothing") for each in (self.settings, settings))
            if old != new:
                raise SettingError(
                    name, f"be {old} as when {folder} began", got=new, advice="change it back, or begin another run"
                )

    def check_documents(self, folder: Path, documents: Sequence[Document]) -> None:
        """Whether these are the documents that the run began with."""
        if len(documents) != len(self.documents):
            raise SettingError(
                "data",
                f"hold {len(self.documents)} document(s) as when {folder} began",
                got=len(documents),
                advice="begin another run",
            )
        for (name, known), document in zip(self.documents, documents, strict=True):
            if document.name != name or hash_of_documents([document]) != known:
                got = "another text" if document.name == name else f"{document.name!r}"
                raise SettingError(
                    "data", f"hold {name!r} as it was when {folder} began", got=got, advice="begin another run"
                )

    def check_hashes(self, folder: Path, hashes: dict[str, str | None]) -> None:
        """Whether these are the hashes of the model and the tokenizer that the run began with, if these are known."""
        for name, known in self.hashes.items():
            if hashes[name] != known:
                what = "weights" if name == "model" else "definition"
                setting = "model.pretrained" if name == "model" else "model.tokenizer"
                raise SettingError(
                    setting, f"have the {what} it had when {folder} began", got="others", advice="begin another run"
                )

    def begun(self, together: int, hashes: dict[str, str | None]) -> "Origin":
        """The same, of a run whose number of documents together and whose model are known."""
        return replace(self, together=together, hashes={name: hashes[name] for name in ("model", "tokenizer")})

    def logged_as(self, loggers: list[list[Any]]) -> "Origin":
        """The same, of a run with these loggers, of each its class and version."""
        return replace(self, loggers=loggers)

    @property
    def stream(self) -> dict[str, Any]:
        """What a position in the stream of segments depends on."""
        return {"together": self.together, "ranks": self.ranks, "done": self.done}


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """A configuration's settings that must not change, by name, in words."""
    return {
        name: str(value)
        for name, value in _leaves(config)
        if not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    }


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, above if name == "init_args" else f"{above}{name}.")
        else:
            yield f"{above}{name}", value
