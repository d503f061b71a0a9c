"""Documents: a text as a stream of tokens, and the data set it comes from.

Bytes are counted on the text itself: every token owns a piece of it, the pieces follow one another without gap or
overlap, and so bits per byte divides by exactly the bytes that were read, whatever the tokenizer does to them.

    path            one document is          its name is
    python-stdlib   a long module            its path in the standard library
    text            a file                   its path, from where the paths begin to differ
    anything else   a row                    its title, name or id if it has one, else its number
"""

import logging
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, Self

import fsspec
import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynlight.choices.context import Context
from dynlight.documents.waves import SegmentStream, Wave, count_segments, deal, waves
from dynlight.errors import SettingError
from dynlight.learning.processes.strategies import board_of, learns_in_step

STANDARD_LIBRARY = "python-stdlib"
# Left out of it: installed packages, tests, tables, and what some systems package apart.
NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "entities.py"}
NOT_STANDARD |= {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo"}
FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text")
ADVICE = {ConnectionError: "; give a local folder, or go online", UnicodeDecodeError: "; convert it to UTF-8"}
_START = 200_000  # characters of a text that are tokenized at once even where few of its tokens are asked for
NAME_COLUMNS = ("title", "short_book_title", "name", "id")


@dataclass(frozen=True, eq=False)
class Document:
    """One text as a stream of tokens; token t stands for the piece `text[ends[t − 1]:ends[t]]` (`ends[−1]` := 0)."""

    index: int  # place in the data set, 0, 1, …
    name: str  # file name, title or row; unique in the stream
    text: str  # the text scored, already cut to `max_tokens`
    tokens: Tensor  # int64 [tokens], without special tokens
    ends: Tensor  # int64 [tokens], in characters; never falling, the last is len(text)
    prefix: int  # id of the token put before the first one: BOS, else EOS

    @classmethod
    def from_text(
        cls, index: int, name: str, text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
    ) -> Self:
        """The document of `text`, cut after its first `max_tokens` tokens.

        Raises:
            SettingError: if the text is no valid Unicode, if the tokenizer makes no token of it (its bytes would be
                counted but not scored), or if the tokenizer has neither a BOS nor an EOS token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingError(
                f"document {name!r}",
                "be Unicode text",
                got=f"a lone surrogate at character {error.start}",
                advice="remove it",
            ) from None
        prefix = prefix_token(tokenizer)
        tokens, ends = tokenize(text, tokenizer) if max_tokens is None else first_tokens(text, tokenizer, max_tokens)
        if text and not len(tokens):
            raise SettingError(
                f"document {name!r}",
                "have tokens",
                got=f"none from its {len(text.encode())} bytes",
                advice="choose a model whose tokenizer keeps this text, or leave the document out",
            )
        return cls(index, name, text[: int(ends[-1])] if len(ends) else "", tokens, ends, prefix)

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @cached_property
    def byte_ends(self) -> np.ndarray:
        """The UTF-8 byte at which each token's piece ends, int64 [tokens + 1], from 0 on: what comes before token 0."""
        points = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        widths = np.ones(len(points) + 1, dtype=np.uint8)  # of each character; the 0 in front stands for no character
        widths[0] = 0
        for bound in (0x80, 0x800, 0x10000):
            widths[1:] += points >= bound
        return np.cumsum(widths, dtype=np.int64)[np.append(0, self.ends.numpy())]

    @cached_property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of each token's piece, int64 [tokens]; their sum is `bytes`."""
        return torch.from_numpy(np.diff(self.byte_ends))

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @cached_property
    def words(self) -> int:
        """Words between white space, as PG-19 counts them."""
        return len(self.text.split())

    def pieces(self, start: int, end: int) -> list[str]:
        """The text of each of the tokens `start … end − 1`."""
        ends = self.ends[start:end].tolist()
        starts = [int(self.ends[start - 1]) if start else 0, *ends]
        return [self.text[a:b] for a, b in zip(starts, ends, strict=False)]

    def piece(self, t: int) -> str:
        """The text of token t."""
        return self.pieces(t, t + 1)[0]


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids of a text, without special tokens, and the character at which each token's piece ends.

    A fast tokenizer says where tokens end. Of tokens that share a character, as when an emoji is split into bytes, the
    first owns it; what the tokenizer skips belongs to the token after it, and to the last token at the end. A slow
    tokenizer doesn't say, so characters are spread evenly: sums are exact, single pieces are not.

    Returns:
        tokens and ends, int64 [tokens] each.
    """
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about a text longer than the model's window: segments never are
    )
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    if tokenizer.is_fast:
        ends = np.fromiter((end for _, end in encoding["offset_mapping"]), np.int64, len(tokens))
        ends = np.maximum.accumulate(ends)
    else:
        ends = np.arange(1, len(tokens) + 1) * len(text) // max(len(tokens), 1)
    ends[-1:] = len(text)
    return torch.from_numpy(tokens), torch.from_numpy(ends)


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a text, and where their pieces end, as `tokenize` gives them.

    A tokenizer takes hundreds of bytes of memory a token, so of a text far longer than the tokens asked for, only as much is
    tokenized as decides them: what comes of a start of it is right where twice as long a start gives the same.
    """
    length, shorter = max(_START, 16 * count), None
    while length < len(text):
        tokens, ends = (each[:count] for each in tokenize(text[:length], tokenizer))
        if shorter is not None and torch.equal(tokens, shorter[0]) and torch.equal(ends, shorter[1]):
            return tokens, ends
        # The last token's end is where the start was cut, so a start of too few tokens decides nothing.
        shorter, length = (tokens, ends) if len(tokens) == count else None, 2 * length
    tokens, ends = tokenize(text, tokenizer)
    return tokens[:count], ends[:count]


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token from which a document's first token is predicted: BOS, else EOS.

    Raises:
        SettingError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise SettingError(
        "model.pretrained",
        "have a tokenizer with a BOS or EOS token",
        got="neither",
        advice="the first token is predicted from it: set bos_token in its tokenizer_config.json",
    )


class DocumentStream(LightningDataModule):
    """The documents of a data set, in its order; files come sorted by path.

    Args:
        path: `python-stdlib`, or what `datasets.load_dataset` takes: a Hub data set, a local folder, or `text`,
            `json`, `csv`, `parquet`, `arrow` with `data_files`. A text file is one document.
        name: the data set's configuration, where it has several.
        data_files: file, pattern or list of them; or of each split.
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
        source = {"name": name, "data_files": data_files, "data_dir": data_dir, "split": split}
        given = [setting for setting, value in source.items() if value is not None]
        if path == STANDARD_LIBRARY and given:
            raise SettingError(f"data.{given[0]}", f"be left out with path {path}", got=f"{source[given[0]]!r}")
        # Left to itself, datasets would then read every file below the folder it is started in.
        if path in FILE_FORMATS and not data_files and not data_dir:
            raise SettingError("data.data_files", f"name the files to read as {path}", got=f"{data_files!r}")
        if path not in (STANDARD_LIBRARY, *FILE_FORMATS) and os.path.isfile(path):
            raise SettingError(
                "data.path", "be a data set", got="a file", advice=f"choose path: text, data_files: {path}"
            )
        self.path = path
        self.name = name
        self.data_files = data_files
        self.data_dir = data_dir
        self.split = split
        self.text_column = text_column
        self.documents = documents
        self.max_tokens = max_tokens
        self.together = together
        self.streaming = streaming
        self.loaded: list[Document] = []
        self.done: set[int] = set()  # documents that were read before, by an earlier part of this run
        self.skip = 0  # segments of the others that were
        self._in_memory: list[tuple[str, str]] | None = None

    @classmethod
    def from_texts(cls, texts: Sequence[str], names: Sequence[str] | None = None, **settings: Any) -> Self:
        """A stream of texts in memory; `settings` are those of the constructor that don't say where texts are.

        Raises:
            SettingError: if `texts` is no sequence of texts, or if `names` are not as many or not unique.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise SettingError("texts", "be a list of texts", got=shorten(repr(texts), 60))
        names = [f"text {i}" for i in range(len(texts))] if names is None else names
        if len(set(names)) != len(names) or len(names) != len(texts):
            raise SettingError("names", f"be {len(texts)} different ones, one a text", got=len(set(names)))
        stream = cls("texts in memory", **settings)
        stream._in_memory = list(zip(names, texts, strict=True))
        return stream

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        """Every document that is asked for, tokenized; the texts are held in memory.

        Raises:
            SettingError: if the data can't be found or read, is empty, or holds something other than text.
        """
        prefix_token(tokenizer)  # a tokenizer without one is known before a byte is downloaded
        documents = [
            Document.from_text(index, name, text, tokenizer, self.max_tokens)
            for index, (name, text) in enumerate(islice(self._texts(), self.documents))
        ]
        if not documents:
            raise SettingError("data.path", "hold at least one document", got=f"an empty data set: {self.path!r}")
        return documents

    def setup(self, stage: str) -> None:
        """Loads the documents with the tokenizer of the model that will read them, unless they are loaded already."""
        if not self.loaded:
            self.loaded = self.load(self._module.tokenizer)
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for data"
        self.together = board_of(self.trainer).of_first("together", self.together)
        if self.together == "auto":
            raise SettingError(
                "data.together", "be a number outside of dynlight.fit, which measures what fits", got="auto"
            )

    def train_dataloader(self) -> SegmentStream:
        """The segments of this process's documents, wave after wave, in the order of scoring and learning."""
        assert self.trainer is not None and self.together != "auto", "setup has been called"
        board = board_of(self.trainer)
        context = self._module.context
        shares = [self.share(rank, board.ranks, context) for rank in range(board.ranks)]
        rounds = max(count_segments(share, context) for share in shares) if learns_in_step(self.trainer) else 0
        # Not a DataLoader: segments are cut in no time, and depend on nothing that a worker could prepare.
        return SegmentStream(shares[board.rank], context, rounds, self.skip, fills=self.together > 1)

    def share(self, rank: int, ranks: int, context: Context) -> list[Wave]:
        """The waves that one of several processes reads, of all documents that are still to be read."""
        assert self.together != "auto", "it is a number by now"
        documents = [document for document in self.loaded if document.index not in self.done]
        return waves(deal(documents, ranks)[rank], context, self.together)

    @property
    def _module(self) -> Any:
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for data"
        return self.trainer.lightning_module

    def _texts(self) -> Iterable[tuple[str, str]]:
        """Names and texts, read one by one."""
        if self._in_memory is not None:
            return self._in_memory
        return _modules(self.documents or 12) if self.path == STANDARD_LIBRARY else self._data_set()

    def _data_set(self) -> Iterator[tuple[str, str]]:
        # A second that python-stdlib needn't wait for.
        from datasets import ReadInstruction, disable_progress_bars, load_dataset, load_dataset_builder

        if not sys.stderr.isatty():
            disable_progress_bars()

        source = {"path": self.path, "name": self.name, "data_dir": self.data_dir}
        with self._readable():
            builder = load_dataset_builder(**source, data_files=self.data_files)
        files = builder.config.data_files  # None offline, where an earlier download is read from the cache
        splits = [str(split) for split in files or builder.info.splits or ()]
        split = self.split or (splits[0] if len(splits) == 1 else "test")
        parts = [part.partition("[")[0] for part in split.split("+")]  # train[:10]+test → train, test
        if not set(parts) <= set(splits):
            raise SettingError("data.split", f"be one of {', '.join(splits)}", got=self.split or "null")
        if files is not None and not all(files[part] for part in parts):
            raise SettingError("data.data_files", "match at least one file", got=f"{self.data_files!r}")
        data_files = self.data_files
        if files is not None and len(parts) < len(splits):
            # The other splits are neither downloaded nor converted: of PG-19 that is all but 1%.
            data_files = type(files)({part: files[part] for part in parts})
        with self._readable():
            if builder.info.builder_name != "text" or files is None:
                return self._rows(load_dataset(**source, data_files=data_files, split=split, streaming=self.streaming))
            # datasets reads text line by line and changes line ends, so text files are read here, byte for byte.
            ranges = ReadInstruction.from_spec(split).to_absolute({part: len(files[part]) for part in parts})
            chosen = [file for r in ranges for file in files[r.splitname][r.from_ : r.to]]
            return self._files(list(dict.fromkeys(chosen)))  # two patterns may match one file

    def _files(self, files: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Names and texts of text files, local or remote; what is compressed is unpacked."""
        self._check_columns(["text"])
        paths = [file.split("/") for file in files]
        shared = len(os.path.commonprefix([path[:-1] for path in paths]))
        for file, path in zip(files, paths, strict=True):
            with self._readable(file), fsspec.open(file, "rb", compression="infer") as opened:
                text = opened.read().decode()
            yield "/".join(path[shared:]), text

    def _rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Names and texts of the rows of a `datasets.Dataset` or `IterableDataset`; a name used before gets its row."""
        names: set[str] = set()
        for i, row in enumerate(self._read(rows)):
            self._check_columns(row)
            text = row[self.text_column]
            kind = "null" if text is None else type(text).__name__
            if kind != "str":
                raise SettingError("data.text_column", "hold text", got=f"{kind} in row {i} of {self.text_column}")
            titles = (" ".join(str(row.get(column) or "").split()) for column in NAME_COLUMNS)
            name = next(filter(None, titles), f"row {i}")
            while name in names:
                name += f" (row {i})"
            names.add(name)
            yield name, text

    def _read(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        with self._readable():
            yield from rows

    def _check_columns(self, columns: Iterable[str]) -> None:
        if self.text_column not in columns:
            raise SettingError("data.text_column", f"be one of {', '.join(columns)}", got=self.text_column)

    @contextmanager
    def _readable(self, file: str | None = None) -> Iterator[None]:
        """Says in one line what a library finds wrong with the data, or with one file of it."""
        logger = logging.getLogger("datasets")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # it writes many lines about an error before it raises it
        try:
            yield
        # Its own errors and those of pyarrow, pandas, fsspec, httpx: datasets raises from many families.
        except Exception as error:
            setting = "data_files" if self.data_files else "path"
            # "An error occurred while generating the dataset" says less than what occurred.
            reason: object = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error
            if isinstance(reason, StopIteration):  # what its reader of JSON says of an empty file
                reason = "there is nothing in it"
            advice = next((advice for kind, advice in ADVICE.items() if isinstance(error, kind)), "")
            raise SettingError(
                f"data.{setting}",
                "be data that can be read",
                got=(
                    f"{file or getattr(self, setting)!r}: "
                    f"{shorten(str(reason), 300, placeholder=' …') or type(reason).__name__}{advice}"
                ),
            ) from None
        finally:
            logger.setLevel(level)


def _modules(count: int) -> Iterator[tuple[str, str]]:
    """Names and texts of the `count` longest modules of the standard library, without those of NOT_STANDARD."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - NOT_STANDARD
        modules += [Path(folder, file) for file in set(files) - NOT_STANDARD if file.endswith(".py")]
    modules.sort(key=lambda module: (-module.stat().st_size, module.relative_to(root).as_posix()))
    for module in modules[:count]:
        yield module.relative_to(root).as_posix(), module.read_bytes().decode()
