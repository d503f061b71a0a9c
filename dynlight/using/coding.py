"""Coding: a text as the shortest code that a model's predictions allow, and the text back from its code.

Arithmetic coding (the package constriction) gives a token of probability p about −log2 p bits, so the length of a code is
the score. The decoder has the code and the model alone: a text that it gives back was predicted by nothing else.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynlight.errors import SettingError
from dynlight.learning.token_by_token import TokenByToken, check_token_by_token
from dynlight.using.reader import Reader

Watch = Callable[[int, int], None]  # is told how many tokens of how many are done
_WORD = np.dtype("<u4")
# What one forward over a segment and a forward for each of its tokens may differ by, of the nats of the segment.
_DIFFERENCE = 1e-3


class Code(NamedTuple):
    """The code of a text, and what it must be as long as."""

    bytes: bytes
    nats: float  # of the distributions that it was made by: −Σ_t ln p(x_t), in float64


def encode(reader: Reader, tokens: Tensor, watch: Watch | None = None, compares: bool = True) -> Code:
    """The code of tokens that follow what the reader has read; the reader has read them, too, afterwards.

    Args:
        reader: that predicts.
        tokens: int64 [tokens].
        watch: is told how far it is.
        compares: whether what is predicted token by token must be what `training_step` scores.

    Raises:
        SettingError: if the model cannot be read token by token, or numbers go wrong.
    """
    reader.make_ready()
    reader.check(tokens)
    check_token_by_token(reader.module)
    encoder = coder().stream.queue.RangeEncoder()
    sums, known = [0.0], tokens.tolist()

    def next_token(chances: np.ndarray, place: int) -> int:
        token: int = known[place]
        for symbol, model in _parts(chances, token):
            encoder.encode(symbol, model)
        sums[0] -= math.log(chances[token]) if chances[token] > 0 else -math.inf
        return token

    _read(reader, len(tokens), next_token, watch, compares)
    return Code(encoder.get_compressed().astype(_WORD).tobytes(), sums[0])


def decode(reader: Reader, code: bytes, tokens: int, watch: Watch | None = None) -> Tensor:
    """The tokens of a code, by a reader that is as the one was by which it was made; it has read them afterwards.

    Raises:
        SettingError: if numbers go wrong, as they do where the reader is another.
    """
    reader.make_ready()
    check_token_by_token(reader.module)
    words = np.frombuffer(code[: len(code) // 4 * 4], dtype=_WORD).astype(np.uint32)
    decoder = coder().stream.queue.RangeDecoder(words)
    found: list[int] = []

    def next_token(chances: np.ndarray, place: int) -> int:
        try:
            group = int(decoder.decode(_categorical(_groups(chances).sum(axis=1))))
            found.append(group * _width(chances) + int(decoder.decode(_categorical(_groups(chances)[group]))))
            assert found[-1] < len(chances), "a token of the model"
        except AssertionError as error:  # of the coder, too
            got = f"what no text of its is coded as ({error})"
            raise SettingError("code", "be of this model, and whole", got=got) from error
        return found[-1]

    _read(reader, tokens, next_token, watch, compares=False)  # the encoder has done so
    return torch.tensor(found, dtype=torch.int64)


def _read(
    reader: Reader, tokens: int, next_token: Callable[[np.ndarray, int], int], watch: Watch | None, compares: bool
) -> None:
    """Reads tokens one by one, as encoder and decoder both do, and learns from each segment behind it.

    Args:
        reader: that reads.
        tokens: how many.
        next_token: gives the token at a place, from the distribution of it.
        watch: is told how far it is.
        compares: as of `encode`.
    """
    start, done = len(reader), 0
    while done < tokens:
        columns = min(reader.module.context.segment, tokens - done)
        ahead = TokenByToken(reader.module, reader.sequence, columns)
        nats, segment = 0.0, list[int]()
        for place in range(columns):
            chances = ahead.probabilities()
            if not abs(chances.sum() - 1) < 1e-4:
                where = f"token {start + done + place}"
                raise SettingError(
                    "update.lr", "keep all numbers finite", got=f"none at {where}", advice="lower it or set clip"
                )
            segment.append(next_token(chances, done + place))
            nats -= math.log(max(chances[segment[-1]], 1e-300))
            ahead.take(segment[-1], is_last=place == columns - 1)
        score = reader.read_tokens(torch.tensor(segment))[0].sums[0]
        if compares and not abs(nats - score) <= _DIFFERENCE * (abs(score) + 1):
            config, got = reader.module.model.config, f"{nats:.4f} nats token by token, {score:.4f} as a segment"
            must = f"predict the same token by token as in whole segments, as type {config.model_type} does not"
            raise SettingError("model.pretrained", must, got=got)
        done += columns
        if watch is not None:
            watch(done, tokens)


def _parts(chances: np.ndarray, token: int) -> list[tuple[int, Any]]:
    """A token as two symbols, each with its model: the group of tokens, and the place in it.

    The coder gives each symbol at least 2^−24. Of a whole vocabulary this takes up to a hundredth of all chances away from
    the others (262,144 of 2^24); of two symbols of √V each it takes nothing worth naming.
    """
    groups, (group, place) = _groups(chances), divmod(token, _width(chances))
    return [(group, _categorical(groups.sum(axis=1))), (place, _categorical(groups[group]))]


def _width(chances: np.ndarray) -> int:
    return math.isqrt(len(chances) - 1) + 1


def _groups(chances: np.ndarray) -> np.ndarray:
    """The chances in rows of √V, filled up with zeros."""
    width = _width(chances)
    rows = -(-len(chances) // width)
    return np.pad(chances, (0, rows * width - len(chances))).reshape(rows, width)


def _categorical(chances: np.ndarray) -> Any:
    """The coder's distribution: of whole 2^−24 parts, each at least one, in proportion to the chances."""
    # A sum of 0 has no proportions.
    return coder().stream.model.Categorical(np.maximum(chances, 1e-30).astype(np.float64), perfect=False)


def coder() -> Any:
    """The package that codes.

    Raises:
        SettingError: if it is not there.
    """
    try:
        import constriction
    except ImportError as error:
        must = "have the package constriction, an arithmetic coder"
        raise SettingError("dynlight", must, got="none", advice="pip install 'dynlight[compress]'") from error
    return constriction
