"""Durable files: each is there whole or not at all, whatever happens while it is written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_room(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is that of a machine that has no room left, on which nothing else can be written either."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


@contextmanager
def draft_of(path: Path, sync: bool = True, is_shared: bool = False) -> Iterator[Path]:
    """Yields the path of a draft, which replaces `path` when the block ends, and is deleted if the block raises.

    Args:
        path: the file to write.
        sync: whether the file survives a power cut, too, once this returns; it survives a killed process in any case.
        is_shared: whether several processes may write the file at the same time, each with a draft of its own, which it
            leaves behind if it is killed.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft" if is_shared else f".{path.name}.draft")
    try:
        yield draft
        if sync:
            sync_to_disk(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, as UTF-8 with the line ends that the text has."""
    with draft_of(path) as draft:
        draft.write_text(text, "utf-8", newline="\n")


def sync_to_disk(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
