"""Decoding: the last word on a score. What gives a text back from its code was predicted by nothing but what came before."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynlight.auditing.replay import numbers
from dynlight.errors import SettingError, require
from dynlight.recording.report.ratios import bits_per_byte, ratio
from dynlight.recording.report.text import number, one_line
from dynlight.running.run import Run
from dynlight.using.coding import decode, encode
from dynlight.using.reader import Reader

TOKENS = 512  # of each document, unless another number is asked for


@dataclass(frozen=True)
class Decoded:
    """How a document came out of its code."""

    name: str
    tokens: int
    bytes: int
    nats: float  # of the segments, as `dynlight.fit` scores them
    predicted: float  # nats of the distributions that the code was made by
    code: int  # bytes
    same: int  # tokens from the first that came out as they went in

    @property
    def is_whole(self) -> bool:
        """Whether all of it came out, of a code as short as what was predicted, which is what was scored, by 0.1%."""
        is_short = 8 * self.code <= 1.001 * self.predicted / math.log(2) + 8 * 64
        return self.same == self.tokens and is_short and self.predicted <= 1.001 * self.nats + 0.01


@dataclass(frozen=True)
class Decoding:
    """How documents came out of their codes."""

    documents: list[Decoded]

    @property
    def honest(self) -> bool:
        """Whether each came out whole."""
        return all(document.is_whole for document in self.documents)

    def as_dictionary(self) -> dict[str, Any]:
        """Plain data."""
        return {"decoded": [asdict(document) for document in self.documents], "honest": self.honest}

    def table(self) -> str:
        """The result for a person: bits per byte as scored and as coded."""
        lines = [f"{'document':30} {'tokens':>7} {'scored':>8} {'coded':>8}  came out"]
        for each in self.documents:
            scored, coded = bits_per_byte(each.nats, each.bytes), ratio(8 * each.code, each.bytes)
            whole = "as it went in" if each.is_whole else f"otherwise, from token {each.same} on"
            if each.same == each.tokens and not each.is_whole:
                whole = "as it went in, of a code that is longer than the score"
            lines.append(
                f"{one_line(each.name)[:30]:30} {each.tokens:7,} {number(scored):>8} {number(coded):>8}  {whole}"
            )
        return "\n".join([*lines, "the score can be decoded" if self.honest else "the score can't be decoded"])


def _decoded(reader: Reader, code: bytes, tokens: Tensor) -> Tensor:
    """What comes out of a code; where it can't be decoded, no token that went in."""
    try:
        return decode(reader, code, len(tokens))
    except SettingError:
        return torch.full_like(tokens, -1)


def decode_again(arguments: Sequence[str], documents: str | None = None, tokens: str | None = None) -> Decoding:
    """Codes the first tokens of documents by a run's predictions, and decodes them by a model that is loaded anew.

    Args:
        arguments: as of `dynlight.fit`.
        documents: numbers of documents, `0,2` or `0-3`; None: the first three.
        tokens: how many of each, from the first; None: 512.

    Raises:
        SettingError: if the run cannot be read token by token, or no document is chosen.
    """
    require(tokens is None or (tokens.isdecimal() and int(tokens) > 0), "tokens", "be at least 1", got=tokens)
    run = Run.of(arguments)
    is_alone = not run.choices.reset.carries_over
    require(
        is_alone, "reset.every", "be document with decode, which reads each by itself", got="never, or a share is kept"
    )
    wanted = numbers("documents", "0-2" if documents is None else documents)
    chosen = [document for document in run.documents if wanted(document.index) and len(document)]
    if not chosen:
        raise SettingError("documents", "name documents of the run", got=documents)
    one, other = Reader.of(run), Reader.of(run)
    decoded = []
    for document in chosen:
        first = document.tokens[: int(tokens or TOKENS)]
        for reader in (one, other):
            reader.forget()
        code = encode(one, first, compares=False)  # a difference is the verdict
        came_out = _decoded(other, code.bytes, first)
        differ = (came_out != first).nonzero()
        same = int(differ[0]) if len(differ) else len(first)
        size = int(document.byte_ends[len(first)])
        decoded.append(Decoded(document.name, len(first), size, one.so_far.nats, code.nats, len(code.bytes), same))
    return Decoding(decoded)
