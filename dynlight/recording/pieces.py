"""Pieces: the rows of a run on their way to its files, in pieces that never change once they are there.

A piece holds the rows of a few segments of one document, sealed, under the name of the first: `00000003-00000256.part`.
A run that is cut short therefore leaves whole pieces, and it goes on by dropping those that came after its checkpoint.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dynlight.durable import sync_to_disk
from dynlight.recording.sealed import DamagedError, seal, unseal

BUFFERED = 32  # segments of a document whose rows wait in memory until they are written as a piece
GROUP = 8 * BUFFERED  # segments of a document whose rows are written to a file of the run together


@dataclass(frozen=True)
class Piece:
    """Rows of the segments `first … stop − 1` of a document."""

    document: int
    first: int
    stop: int
    is_last: bool  # whether the document gets no other piece
    failure: dict[str, Any] | None  # of a document that failed
    tables: dict[str, pa.Table]


class Pieces:
    """The pieces of a run, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unsynced: list[Path] = []

    def write(self, piece: Piece) -> None:
        """Puts a piece on disk; it outlives a power cut only after `sync`."""
        path = self.folder / f"{piece.document:08d}-{piece.first:08d}.part"
        tables = {name: _bytes_of(table) for name, table in piece.tables.items()}
        seal(path, vars(piece) | {"tables": tables}, sync=False)
        self._unsynced.append(path)

    def sync(self) -> None:
        """Waits until all pieces are on disk."""
        if len(self._unsynced) > 100:  # there are many of short documents, and waiting for each would take long
            os.sync()
        else:
            for path in [*self._unsynced, self.folder]:
                sync_to_disk(path)
        self._unsynced.clear()

    def _unsealed(self, document: int) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(f"{document:08d}-*.part")):
            try:
                yield unseal(path)
            except DamagedError as error:
                raise DamagedError(f"{path.name}: {error}") from error

    def tables(self, document: int, name: str) -> Iterator[pa.Table]:
        """A document's rows in groups of GROUP segments, however they were cut into pieces."""
        for _, group in groupby(self._unsealed(document), key=lambda piece: piece["first"] // GROUP):
            # Combined, as the bytes of a parquet file depend on how many chunks of memory a column comes in.
            yield pa.concat_tables([_table_of(piece["tables"][name]) for piece in group]).combine_chunks()

    def extent(self, document: int) -> tuple[list[int], bool]:
        """The segments before which the undamaged pieces of a document end, 0 first, and whether its last piece is there."""
        stops, is_last = [0], False
        try:
            for piece in self._unsealed(document):
                if piece["first"] != stops[-1]:
                    return stops, False
                stops.append(piece["stop"])
                is_last = piece["is_last"]
        except DamagedError:
            is_last = False
        return stops, is_last

    def failure(self, document: int) -> dict[str, Any] | None:
        """How a document failed, if it did."""
        return next((piece["failure"] for piece in self._unsealed(document) if piece["is_last"]), None)

    def drop(self, document: int, stop: int = 0) -> None:
        """Removes the pieces of a document that begin at segment `stop` or later."""
        for path in self.folder.glob(f"{document:08d}-*.part"):
            if int(path.stem.partition("-")[2]) >= stop:
                path.unlink()


def _bytes_of(table: pa.Table) -> torch.Tensor:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return torch.from_numpy(np.frombuffer(sink.getvalue(), np.uint8).copy())


def _table_of(data: torch.Tensor) -> pa.Table:
    return pa.ipc.open_stream(pa.py_buffer(data.numpy())).read_all()
