"""Ledger: a row for each commit of a run, each linked to the row before by its hash.

A row holds document, segment, tokens, nats, a digest of the learned weights before scoring and one after learning, and a
link: the hash of the row and of the link before. Whoever has the last link can tell whether any row was changed. Even
without playing the run again, the ledger shows that documents begin with the initial weights and that nothing learns
between two commits.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynlight.learning.digests import hash_of
from dynlight.recording.sealed import DamagedError

COLUMNS = ("document", "segment", "tokens", "nats", "before", "after", "link")


def first_link(contents: dict[str, Any]) -> str:
    """The link before the first row: the hash of what the run was made of."""
    keys = ("hashes", "files", "documents", "tokens", "bytes", "reset")
    made_of = {key: contents[key] for key in keys if key in contents}  # version 0.1.0 knew no files
    return hash_of(json.dumps(made_of, sort_keys=True).encode())


def link(before: str, commit: Sequence[Any]) -> str:
    """The hash of a row and of the link before it."""
    return hash_of((before + json.dumps(list(commit))).encode())


def line_of(row: Sequence[Any]) -> bytes:
    """A row as a line of a ledger's file."""
    return json.dumps(list(row)).encode() + b"\n"


def check_ledger(file: Path, bytes: int, first: str, last: str) -> None:
    """Raises DamagedError unless the first `bytes` bytes of a ledger are rows that link `first` to `last`."""
    before, place = first, 0
    for row in read_ledger(file):
        if place >= bytes or row[-1] != link(before, row[:-1]):
            break
        before = row[-1]
        place += len(line_of(row))
    if (place, before) != (bytes, last):
        raise DamagedError(f"{file.name} was changed or cut short")


def ledger_of(folder: Path, rank: int) -> Path:
    """The file of a process's ledger while the run goes on."""
    return folder / "rows" / f"ledger.{rank}.jsonl"


def ledgers(folder: Path) -> dict[int, Path]:
    """The files of all processes' ledgers, by rank."""
    return {int(file.name.split(".")[1]): file for file in sorted((folder / "rows").glob("ledger.*.jsonl"))}


def read_ledger(file: Path) -> Iterator[list[Any]]:
    """The rows of a ledger's file, up to the first line that is torn."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # bytes that are no text raise one, too
                return
            yield row


def faults_of(contents: dict[str, Any]) -> list[str]:
    """What is wrong with a receipt's ledger by itself: broken links, learning between two commits, tokens that don't add up."""
    faults: list[str] = []
    before = first_link(contents)
    weights: dict[int, str] = {}  # document → digest after its last commit
    initial = contents["ledger"][0][4] if contents["ledger"] else ""
    tokens = 0
    for number, (*commit, stored_link) in enumerate(contents["ledger"]):
        if stored_link != link(before, commit):
            faults.append(f"row {number} of the ledger was changed")
            break
        before = stored_link
        document, segment, count, _, digest, after = commit
        tokens += count
        if segment and weights.get(document, digest) != digest:
            faults.append(f"weights of document {document} changed before segment {segment} was scored")
        if segment == 0 and contents["reset"] == "document" and digest != initial:
            faults.append(f"document {document} began with weights that had learned")
        weights[document] = after
    else:
        if tokens > contents["tokens"]:
            faults.append(f"{tokens} tokens were scored, of {contents['tokens']}")
    return faults
