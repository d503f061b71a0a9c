"""Documents with something planted in them: two copies of a book, alike but for the plants.

Every question is put in both copies, and what it asks for stands in one of them only. So each copy is the other's
control: both know by then how such sentences go, and what differs is the memory of this one plant.

    kind    planted                                        asked
    fact    The keeper of Brandelok was called Tavin Morg.  the same sentence; the name at its end is measured
    words   such a sentence                                the name after a beginning that was never planted
    style   two segments rewritten by a rule               other text by the same rule, half a segment of it
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dynlight.documents.document import Document, prefix_token

SEGMENT = 64
FRONT_MATTER = 1024  # tokens of a book that are left out, as titles and tables of contents make a poor style
SETTLING = 4  # segments that aren't measured where a book begins: something else, or nothing, is in memory there
# Of each lag: where a fact and mere words are planted, and where a style ends, in segments.
PLACES = {100: (4, 5, 7), 10: (98, 99, 101), 1: (112, 114, 117)}
SMALL_PLACES = {4: (0, 1, 3), 1: (8, 10, 13)}

BEGINNINGS = [
    "The keeper of {} was called",
    "The road to {} leads through",
    "The daughter of {} had married",
    "The house at {} belongs to",
]
SYLLABLES = [[*"bdfgklmnprstvz", "br", "gl", "tr", "qu", "sk"], [*"aeiou", "ei", "ou"], [*"dgklmnrt", "ld", "rn", "sk"]]
Rule = Callable[[str], str]
# A lag has a pair, one rule a copy; which one goes from book to book, so that each is asked at each lag.
STYLES: list[tuple[Rule, Rule]] = [
    (str.upper, lambda text: text.replace(" ", "-")),
    (str.title, lambda text: text.replace("e", "'")),
    (lambda text: text.replace(" ", ", "), lambda text: text.replace("s", "z")),
]
Pieces = list[tuple[int, str]]  # tokens, each with its text


@dataclass(frozen=True)
class Asked:
    """Tokens to be measured, in both copies."""

    kind: str
    lag: int  # segments from the plant to here
    copy: int  # in which of the two it is planted
    tokens: range


class Pair:
    """Two copies of a book, with another book at their end.

    Args:
        book: the book.
        other: the other one.
        number: of the pair: what is invented depends on it.
        tokenizer: theirs.
        places: of the plants, as PLACES.
        others: segments of the other book, by which to see what has been forgotten.
    """

    def __init__(
        self,
        book: Document,
        other: Document,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        places: dict[int, tuple[int, int, int]],
        others: int,
    ) -> None:
        self.name, self.tokenizer, self.others = book.name, tokenizer, others
        self.random = random.Random(number)
        self.length = max(max(place) + lag for lag, place in places.items()) + 1  # segments of the book
        self.book = _pieces_of(book)[FRONT_MATTER:][: self.length * SEGMENT]
        ending = _pieces_of(other)[FRONT_MATTER:][: others * SEGMENT]
        assert len(self.book) == self.length * SEGMENT and len(ending) == others * SEGMENT, "both are long enough"
        self.copies: list[Pieces] = [[*self.book, *ending] for _ in range(2)]
        self.asked: list[Asked] = []
        self.touched: set[int] = set()  # segments that aren't the book's own
        self.order = (0, 1) if number % 2 else (1, 0)  # whose question comes first
        for turn, (lag, (fact, words, style)) in enumerate(places.items()):
            self._plant_fact("fact", fact, lag)
            self._plant_fact("words", words, lag)
            self._plant_style(STYLES[(turn + number) % len(STYLES)], style, lag)
        self._plain()

    def documents(self, first: int) -> list[Document]:
        """The two copies, numbered from `first`."""
        return [self._document(first + copy, copy) for copy in range(2)]

    def _plant_fact(self, kind: str, place: int, lag: int) -> None:
        """Plants a fact of its own in each copy, and asks for both in both."""
        offset = 0
        for copy in self.order:
            beginning, name = self.random.choice(BEGINNINGS), f" {self._name()} {self._name()}"
            known = beginning.format(self._name())
            unknown = beginning.format(self._name())
            self._write([copy], place, 0, *map(self._tokenize, (f"\n\n{known}", name, ".\n\n")))
            parts = [self._tokenize(part) for part in (f"\n\n{known if kind == 'fact' else unknown}", name, ".\n\n")]
            start = (place + lag) * SEGMENT + offset + len(parts[0])
            self.asked.append(Asked(kind, lag, copy, range(start, start + len(parts[1]))))
            offset = self._write([0, 1], place + lag, offset, *parts)

    def _plant_style(self, rules: tuple[Rule, Rule], place: int, lag: int) -> None:
        """Rewrites two segments of each copy by its rule, and asks for both in both."""
        half = SEGMENT // 2
        for copy, rule in enumerate(rules):
            self._write([copy], place - 1, 0, self._rewritten(rule, (place - 1) * SEGMENT, SEGMENT))
            self._write([copy], place, 0, self._rewritten(rule, place * SEGMENT, SEGMENT))
        for turn, copy in enumerate(self.order):
            start = (place + lag) * SEGMENT + turn * half
            self._write([0, 1], place + lag, turn * half, self._rewritten(rules[copy], start, half))
            self.asked.append(Asked("style", lag, copy, range(start, start + half)))

    def _plain(self) -> None:
        """What is neither planted nor asked: the book itself, and the other one."""
        for segment in range(SETTLING, self.length):
            if segment not in self.touched:
                self.asked.append(Asked("book", 0, 0, range(segment * SEGMENT, (segment + 1) * SEGMENT)))
        other = range((self.length + SETTLING) * SEGMENT, (self.length + self.others) * SEGMENT)
        self.asked.append(Asked("other", 0, 0, other))

    def _write(self, copies: list[int], segment: int, offset: int, *parts: Pieces) -> int:
        """Puts the parts in the place of as many tokens of the book; returns where they end in the segment."""
        pieces = [piece for part in parts for piece in part]
        start, stop = segment * SEGMENT + offset, segment * SEGMENT + offset + len(pieces)
        assert offset + len(pieces) <= SEGMENT, "a segment has room for it"
        for copy in copies:
            self.copies[copy][start:stop] = pieces
        self.touched.add(segment)
        return offset + len(pieces)

    def _rewritten(self, rule: Rule, start: int, tokens: int) -> Pieces:
        text = "".join(text for _, text in self.book[start : start + 2 * tokens])
        return self._tokenize(rule(text))[:tokens]

    def _name(self) -> str:
        return "".join(self.random.choice(part) for part in SYLLABLES * 2).capitalize()

    def _tokenize(self, text: str) -> Pieces:
        return _pieces_of(Document.from_text(0, "", text, self.tokenizer))

    def _document(self, index: int, copy: int) -> Document:
        tokens, texts = zip(*self.copies[copy], strict=True)
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        name = f"{self.name}, copy {copy}"
        return Document(index, name, "".join(texts), torch.tensor(tokens), ends, prefix_token(self.tokenizer))


def _pieces_of(document: Document) -> Pieces:
    return list(zip(document.tokens.tolist(), document.pieces(0, len(document)), strict=True))
