"""Sources: where the texts of documents come from.

path            one document is          its name is
python-stdlib   a long module            its path in the standard library
text            a file                   its path, from where the paths begin to differ
anything else   a row                    its title, name or id if it has one, else its number
"""

import glob
import hashlib
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import fsspec
from fsspec.utils import infer_compression

from dynlight.errors import SettingError

STANDARD_LIBRARY = "python-stdlib"
# Left out of the standard library: installed packages, tests, tables, and what some systems package apart.
NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "entities.py"}
NOT_STANDARD |= {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo"}
LONGEST_MODULES = 12  # how many are read where `documents` is not set
FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text")
ADVICE = {ConnectionError: "give a local folder, or go online", UnicodeDecodeError: "convert it to UTF-8"}
_LIBRARIES = {".zst": "zstandard", ".lz4": "lz4", ".snappy": "python-snappy"}  # what reads a file of this ending
NAME_COLUMNS = ("title", "short_book_title", "name", "id")


class Texts(Protocol):
    """Where texts come from."""

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each local file that is read, by name, once `texts` has been called."""

    @property
    def path(self) -> str:
        """What names the texts in an error."""

    def texts(self, documents: int | None = None) -> Iterable[tuple[str, str]]:
        """Names and texts, of which the caller reads the first `documents`; None: all."""


@dataclass(frozen=True)
class TextsInMemory:
    """Texts that need not be read from anywhere."""

    named: list[tuple[str, str]]  # names and texts
    path: str = "texts in memory"
    digests: dict[str, str] = field(default_factory=dict)

    def texts(self, documents: int | None = None) -> Iterable[tuple[str, str]]:
        return self.named


class Source:
    """Names and texts of a data set, in its order; files come sorted by path.

    Args:
        path: `python-stdlib`, or what `datasets.load_dataset` takes.
        name: the data set's configuration, where it has several.
        data_files: a file, a pattern or a list of these; or a dictionary that gives one of these for each split.
        data_dir: folder of the data set's files.
        split: `test`, `train[:10]`, …; None: the only one, else `test`.
        text_column: column that holds the text.
        streaming: whether rows are read as they are needed.

    Raises:
        SettingError: if a setting contradicts another.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        data_dir: str | None = None,
        split: str | None = None,
        text_column: str = "text",
        streaming: bool = False,
    ) -> None:
        source = {"name": name, "data_files": data_files, "data_dir": data_dir, "split": split}
        given = [setting for setting, value in source.items() if value is not None]
        if path == STANDARD_LIBRARY and given:
            raise SettingError(f"data.{given[0]}", f"be left out with path {path}", got=f"{source[given[0]]!r}")
        # Without files, datasets would read every file below the folder it is started in.
        if path in FILE_FORMATS and not data_files and not data_dir:
            raise SettingError("data.data_files", f"name the files to read as {path}", got=f"{data_files!r}")
        if path not in (STANDARD_LIBRARY, *FILE_FORMATS) and os.path.isfile(path):
            raise SettingError(
                "data.path", "be a data set", got="a file", advice=f"choose path: text, data_files: {path}"
            )
        if os.path.isdir(path) and glob.has_magic(path):
            advice = "rename it, or choose path: text, data_dir"
            raise SettingError("data.path", "be a folder without * ? [ in its name", got=path, advice=advice)
        self.path = path
        self.name = name
        self.data_files = _as_they_are(data_files)
        self.data_dir = glob.escape(data_dir) if data_dir is not None and os.path.isdir(data_dir) else data_dir
        self.split = split
        self.text_column = text_column
        self.streaming = streaming
        self.digests: dict[str, str] = {}

    def texts(self, documents: int | None = None) -> Iterable[tuple[str, str]]:
        """Names and texts of the data set, read one by one.

        Args:
            documents: how many the caller reads, from the first; None: all, of `python-stdlib` the longest ones.

        Raises:
            SettingError: if the data can't be found or read, or holds something other than text.
        """
        if self.path != STANDARD_LIBRARY:
            return self._data_set()
        modules = _modules(documents or LONGEST_MODULES)
        self.digests = _digests([str(module) for module in modules])
        return ((_name_of_module(module), module.read_bytes().decode()) for module in modules)

    def _data_set(self) -> Iterator[tuple[str, str]]:
        # Imported here: it takes a second, which python-stdlib needn't wait for.
        from datasets import ReadInstruction, config, disable_progress_bars, load_dataset, load_dataset_builder

        if not sys.stderr.isatty():
            disable_progress_bars()

        source = {"path": self.path, "name": self.name, "data_dir": self.data_dir}
        with self._readable():
            builder = load_dataset_builder(**source, data_files=self.data_files)
        files = builder.config.data_files  # None offline, where an earlier download is read from the cache
        splits = [str(split) for split in files or builder.info.splits or ()]
        split = self.split or (splits[0] if len(splits) == 1 else "test")
        wanted = [name.partition("[")[0] for name in split.split("+")]  # train[:10]+test → train, test
        if not set(wanted) <= set(splits):
            raise SettingError("data.split", f"be one of {', '.join(splits)}", got=self.split or "null")
        if files is not None and not all(files[name] for name in wanted):
            raise SettingError("data.data_files", "match at least one file", got=f"{self.data_files!r}")
        data_files = self.data_files
        if files is not None and len(wanted) < len(splits):
            # The other splits are neither downloaded nor converted: of PG-19 that is all but 1%.
            data_files = type(files)({name: files[name] for name in wanted})
        with self._readable():
            if builder.info.builder_name != "text" or files is None:
                if files is not None and not self.streaming:
                    self.digests = _digests([file for name in wanted for file in files[name]])
                # datasets knows a local file by its path and time alone, and would read from its cache what was there before.
                contents = hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()[:16]
                cache = Path(config.HF_DATASETS_CACHE, "dynlight", contents) if self.digests else None
                settings: dict[str, Any] = {"split": split, "streaming": self.streaming, "cache_dir": cache}
                return self._rows(load_dataset(**source, data_files=data_files, **settings))
            # datasets reads text line by line and changes line ends, so text files are read here, byte for byte.
            ranges = ReadInstruction.from_spec(split).to_absolute({name: len(files[name]) for name in wanted})
            chosen = [file for r in ranges for file in files[r.splitname][r.from_ : r.to]]
            return self._files(list(dict.fromkeys(chosen)))  # two patterns may match one file

    def _files(self, files: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Names and texts of text files, local or remote; compressed files are unpacked."""
        self._check_columns(["text"])
        for file, name in zip(files, _names(files), strict=True):
            lacking = _LIBRARIES.get(os.path.splitext(file)[1])
            if lacking is not None and infer_compression(file) is None:
                raise SettingError("data.data_files", f"be read by the package {lacking}", got=f"{file!r} without it",
                                   advice=f"pip install {lacking}")  # fmt: skip
            with self._readable(file), fsspec.open(file, "rb", compression="infer") as opened:
                text = opened.read().decode()
            if os.path.isfile(file):
                self.digests[name] = _digest(file)
            yield name, text

    def _rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Names and texts of the rows of a `Dataset` or `IterableDataset`; a name used before gets the row's number."""
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
        """Makes one line of the error that a library raises about the data, or about one file of the data."""
        logger = logging.getLogger("datasets")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # datasets logs many lines about an error before it raises it
        try:
            yield
        # datasets raises errors of many families: its own, and those of pyarrow, pandas, fsspec, httpx.
        except Exception as error:
            setting = "data_files" if self.data_files else "path"
            # The error itself says only "An error occurred while generating the dataset"; its cause says which.
            reason: object = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error
            if isinstance(reason, StopIteration):  # raised by the reader of JSON for an empty file
                reason = "there is nothing in it"
            advice = next((advice for kind, advice in ADVICE.items() if isinstance(error, kind)), "")
            raise SettingError(
                f"data.{setting}",
                "be data that can be read",
                got=(
                    f"{file or getattr(self, setting)!r}: "
                    f"{shorten(str(reason), 300, placeholder=' …') or type(reason).__name__}"
                ),
                advice=advice,
            ) from None
        finally:
            logger.setLevel(level)


def _as_they_are(data_files: Any) -> Any:
    """Files or patterns, in which the path of a file that is there stands for itself: `[1984].txt` is a pattern, too."""
    if isinstance(data_files, dict):
        return {split: _as_they_are(files) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_as_they_are(file) for file in data_files]
    return glob.escape(data_files) if isinstance(data_files, str) and os.path.isfile(data_files) else data_files


def _names(files: Sequence[str]) -> list[str]:
    """The paths of files from where they begin to differ."""
    paths = [file.split("/") for file in files]
    shared = len(os.path.commonprefix([path[:-1] for path in paths]))
    return ["/".join(path[shared:]) for path in paths]


def _digests(files: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each of these files that is a local one, by name."""
    return {name: _digest(file) for file, name in zip(files, _names(files), strict=True) if os.path.isfile(file)}


def _digest(file: str) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _modules(count: int) -> list[Path]:
    """The `count` longest modules of the standard library, without those of NOT_STANDARD."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - NOT_STANDARD
        modules += [Path(folder, file) for file in set(files) - NOT_STANDARD if file.endswith(".py")]
    modules.sort(key=lambda module: (-module.stat().st_size, _name_of_module(module)))
    return modules[:count]


def _name_of_module(module: Path) -> str:
    return module.relative_to(sysconfig.get_path("stdlib")).as_posix()
