"""Document: a text as a stream of tokens.

Bytes are counted on the text itself: every token owns a piece of it, the pieces follow one another without gap or
overlap, and so bits per byte divides by exactly the bytes that were read, whatever the tokenizer does to them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynlight.errors import SettingError

_START = 200_000  # characters of a text that are tokenized at once even where few of its tokens are asked for


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
