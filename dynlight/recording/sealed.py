"""Sealed files: tensors and plain data on disk, with a checksum that tells whether they are still what was written.

A file is a mark of the format, the SHA-256 of the rest, and the rest: the data as torch.save writes them. They are loaded
with weights_only=True, so that they can run no code.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dynlight.durable import draft_of

_MARK = b"dynlight sealed\n"


class DamagedError(Exception):
    """A sealed file is not what was written: cut short, changed, or no sealed file at all."""


def seal(path: Path, data: Any, sync: bool = True) -> None:
    """Writes plain data to a sealed file, whole or not at all.

    Args:
        path: of the file.
        data: tensors, numbers, texts, None, and dicts, lists and tuples of them.
        sync: whether the file outlives a power cut as soon as this returns.
    """
    with draft_of(path, sync) as draft, draft.open("wb") as file:
        file.write(_MARK + bytes(32))
        hashing = _Hashing(file)
        torch.save(plain(data), hashing)  # type: ignore[arg-type] # it only writes
        file.seek(len(_MARK))
        file.write(hashing.digest())


def unseal(path: Path) -> Any:
    """The data of a sealed file, with tensors on the CPU.

    Raises:
        DamagedError: if the file is missing, or isn't as it was written.
    """
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise DamagedError(error.strerror or "cannot be read") from error
    rest = memoryview(contents)[len(_MARK) + 32 :]
    if contents[: len(_MARK)] != _MARK or not rest:
        raise DamagedError("cut short")
    if hashlib.sha256(rest).digest() != contents[len(_MARK) : len(_MARK) + 32]:
        raise DamagedError("its checksum is another")
    try:
        return torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedError(f"written by another version of torch: {error}") from error


def plain(data: Any) -> Any:
    """The same data with every tensor on the CPU and in memory of its own: torch.save writes all that a view is of."""
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        return data.clone() if data.untyped_storage().nbytes() > data.nbytes else data
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(plain(value) for value in data)
    # No subclasses: numpy's float, for one, could be written and not read.
    if data is not None and type(data) not in (bool, int, float, str):
        raise TypeError(f"a checkpoint holds plain data and tensors, got {type(data).__name__}")
    return data


class _Hashing:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()
