"""Document: a text as a stream of tokens.

Bytes are counted on the text itself. Each token owns a piece of the text, and the pieces follow one another without gap
or overlap, so bits per byte divides by exactly the bytes that were read, whatever the tokenizer does to them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynlight.errors import SettingError

_START = 200_000  # the fewest characters of a text that `first_tokens` tokenizes


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
            SettingError: if the text is no valid Unicode, if the tokenizer makes no token of it (the bytes would be
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
        """How many tokens the document has."""
        return len(self.tokens)

    @cached_property
    def byte_ends(self) -> np.ndarray:
        """The UTF-8 byte at which each token's piece ends, int64 [tokens + 1]; a 0 stands before token 0's."""
        points = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        widths = np.ones(len(points) + 1, dtype=np.uint8)  # bytes of each character, behind a 0
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

    A fast tokenizer gives the end of each token. A character that several tokens stand for, as an emoji split into bytes,
    belongs to the first of them; characters that the tokenizer skips belong to the next token, at the end of the text to
    the last one. A slow tokenizer gives no ends, so characters are spread evenly: sums are exact, single pieces are not.

    Returns:
        tokens and ends, int64 [tokens] each.
    """
    is_fast = getattr(tokenizer, "is_fast", False)
    settings: dict[str, bool] = {}
    if is_fast:  # others, which may come with the model, need not know more than a text
        settings = {"return_offsets_mapping": True, "return_attention_mask": False, "return_token_type_ids": False}
        settings["verbose"] = False  # no warning about a text longer than the model's window: segments never are
    encoding = tokenizer(text, add_special_tokens=False, **settings)
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    if is_fast:
        ends = np.fromiter((end for _, end in encoding["offset_mapping"]), np.int64, len(tokens))
        ends = np.maximum.accumulate(ends)
    else:
        ends = np.arange(1, len(tokens) + 1) * len(text) // max(len(tokens), 1)
    ends[-1:] = len(text)
    return torch.from_numpy(tokens), torch.from_numpy(ends)


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a text, and where their pieces end, as `tokenize` gives them.

    A tokenizer takes hundreds of bytes of memory a token, so a long text is tokenized only as far as needed: the first tokens
    of a start of the text are right where a start twice as long has the same.
    """
    length, shorter = max(_START, 16 * count), None
    while length < len(text):
        tokens, ends = (each[:count] for each in tokenize(text[:length], tokenizer))
        if shorter is not None and torch.equal(tokens, shorter[0]) and torch.equal(ends, shorter[1]):
            return tokens, ends
        # The last token of a start ends at the cut, so a start of too few tokens decides nothing.
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
