"""Stream: the documents of a run as Lightning's data module, cut into segments for each process."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from textwrap import shorten
from typing import Any, Literal, Self

from lightning import LightningDataModule
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from dynlight.documents.document import Document, prefix_token
from dynlight.documents.segments import Context, Wave
from dynlight.documents.sources import Source, Texts, TextsInMemory
from dynlight.documents.waves import SegmentStream, count_segments, deal, waves
from dynlight.errors import SettingError


@dataclass(frozen=True)
class Position:
    """The place between two segments at which a run goes on."""

    done: frozenset[int] = frozenset()  # documents that were read before the present waves were made
    skip: int = 0  # segments of the present waves that were read


class DocumentStream(LightningDataModule):
    """The documents of a data set, in its order; files come sorted by path.

    Args:
        path: `python-stdlib`, or what `datasets.load_dataset` takes: a Hub data set, a local folder, or `text`,
            `json`, `csv`, `parquet`, `arrow` with `data_files`. A text file is one document.
        name: the data set's configuration, where it has several.
        data_files: a file, a pattern or a list of these; or a dictionary that gives one of these for each split.
        data_dir: folder of the data set's files.
        split: `test`, `train[:10]`, …; left out: the only one, else `test`.
        text_column: column that holds the text.
        documents: how many to read, from the first; left out: all (of `python-stdlib` the 12 longest).
        max_tokens: how many tokens of each document to read, from its first.
        together: how many documents adapt at once, each with its own weights; `auto`: as many as fit into memory, which
            `dynlight.fit` measures.
        streaming: read rows as they are needed, instead of downloading and converting the whole split first.

    Raises:
        SettingError: if a setting is out of range, or contradicts another.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        data_dir: str | None = None,
        split: str | None = None,
        text_column: str = "text",
        documents: int | None = None,
        max_tokens: int | None = None,
        together: int | Literal["auto"] = 1,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        counts = {"documents": documents, "max_tokens": max_tokens, "together": 1 if together == "auto" else together}
        for setting, count in counts.items():
            if (type(count) is not int or count < 1) and (count is not None or setting == "together"):
                raise SettingError(f"data.{setting}", "be at least 1", got=f"{count!r}")
        self.source: Texts = Source(path, name, data_files, data_dir, split, text_column, streaming)
        self.documents = documents
        self.max_tokens = max_tokens
        self.together = together
        self.loaded: list[Document] = []
        self.position = Position()

    @classmethod
    def from_texts(cls, texts: Sequence[str], names: Sequence[str] | None = None, **settings: Any) -> Self:
        """A stream of texts in memory; `settings` are `max_tokens`, `together` and `documents`.

        Raises:
            SettingError: if `texts` is no sequence of texts, or if `names` are not as many or not unique.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise SettingError("texts", "be a list of texts", got=shorten(repr(texts), 60))
        names = [f"text {i}" for i in range(len(texts))] if names is None else names
        if len(set(names)) != len(names) or len(names) != len(texts):
            raise SettingError("names", f"be {len(texts)} different ones, one a text", got=len(set(names)))
        stream = cls("texts in memory", **settings)
        stream.source = TextsInMemory(list(zip(names, texts, strict=True)))
        return stream

    @classmethod
    def of(cls, documents: Sequence[Document], together: int | Literal["auto"] = 1) -> Self:
        """A stream of documents that are loaded already."""
        stream = cls("documents in memory", together=together)
        stream.loaded = list(documents)
        return stream

    def after(self, position: Position) -> Self:
        """The same stream from a position on."""
        stream = copy.copy(self)
        stream.position = position
        return stream

    def first(self, documents: int, tokens: int) -> Self:
        """The same stream, of at most so many documents and so many tokens of each, from the first."""
        stream = copy.copy(self)
        stream.documents = min(self.documents or documents, documents)
        stream.max_tokens = min(self.max_tokens or tokens, tokens)
        return stream

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        """The documents that the settings ask for, tokenized; their texts stay in memory.

        Raises:
            SettingError: if the data can't be found or read, is empty, or holds something other than text.
        """
        prefix_token(tokenizer)  # raises before anything is downloaded
        documents = [
            Document.from_text(index, name, text, tokenizer, self.max_tokens)
            for index, (name, text) in enumerate(islice(self.source.texts(self.documents), self.documents))
        ]
        if not documents:
            raise SettingError(
                "data.path", "hold at least one document", got=f"an empty data set: {self.source.path!r}"
            )
        return documents

    def setup(self, stage: str) -> None:
        """Loads the documents with the tokenizer of the model that will read them, unless they are loaded already."""
        if not self.loaded:
            self.loaded = self.load(self._module.tokenizer)
        self.together = self._module.processes.board.of_first("together", self.together)
        if self.together == "auto":
            raise SettingError(
                "data.together", "be a number outside of dynlight.fit, which measures what fits", got="auto"
            )

    def train_dataloader(self) -> SegmentStream:
        """The segments of this process's documents, wave after wave, in the order of scoring and learning."""
        processes, context = self._module.processes, self._module.context
        dealt = [self.dealt_to(rank, processes.ranks, context) for rank in range(processes.ranks)]
        in_step = processes.way == "in_step"  # then each process takes part in every round
        rounds = max(count_segments(each, context) for each in dealt) if in_step else 0
        # Not a DataLoader: a segment is cut in no time, so a worker would have nothing to prepare.
        fills = self.together != 1
        return SegmentStream(dealt[processes.rank], context, rounds, self.position.skip, fills)

    def dealt_to(self, rank: int, ranks: int, context: Context) -> list[Wave]:
        """The waves that process `rank` of `ranks` reads, of the documents that are still to be read."""
        assert self.together != "auto", "it is a number by now"
        documents = [document for document in self.loaded if document.index not in self.position.done]
        return waves(deal(documents, ranks)[rank], context, self.together)

    @property
    def _module(self) -> Any:
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for data"
        return self.trainer.lightning_module


def stream_of(trainer: Trainer) -> DocumentStream:
    """The stream that a Trainer reads."""
    stream = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(stream, DocumentStream), f"documents come as a DocumentStream, got {type(stream).__name__}"
    return stream
