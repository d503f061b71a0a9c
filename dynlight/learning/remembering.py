"""Remembering: the memories of the documents that are being read, as experts of the mixture."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from dynlight.choices.memories import Base, DocumentMemory, State
from dynlight.documents.segments import Segment

STATIC = -1  # the number of the static model as a base; a rule has its own


class Remembering:
    """What each memory keeps of each document, and what it says of the tokens that follow.

    Args:
        memories: as they are chosen.
        rules: how many learn from each document.
    """

    def __init__(self, memories: Sequence[DocumentMemory], rules: int) -> None:
        self._memories = memories
        self._bases = [range(rules) if memory.over == "learned" and rules else [STATIC] for memory in memories]
        self._states: list[list[State]] = []  # of each memory, by the document's place in the wave

    @property
    def experts(self) -> list[tuple[DocumentMemory, int]]:
        """Of each expert its memory, and the number of the base that it is over."""
        return [(memory, base) for memory, bases in zip(self._memories, self._bases, strict=True) for base in bases]

    def kept(self, over: Literal["rules", "static"]) -> set[Literal["logits", "states"]]:
        """What readings by the rules' weights, or the static one, must keep."""
        of_static = over == "static"
        return {kept for memory, base in self.experts if (base == STATIC) == of_static for kept in memory.needs}

    def begin(self, documents: int) -> None:
        """Forgets all, for the `documents` documents that begin."""
        self._states = [[{} for _ in range(documents)] for _ in self._memories]

    def read(self, segment: Segment, bases: Sequence[Mapping[int, Base]]) -> np.ndarray:
        """The nats of each expert, float64 [experts, D, S]; NaN where its base has failed.

        `bases` holds for each document what its bases make of the tokens that it scores.
        """
        nats = np.full((len(self.experts), *segment.targets.shape), np.nan)
        for place, columns in enumerate(segment.scored):
            tokens, first = segment.targets[place, columns], 0
            for memory, numbers, states in zip(self._memories, self._bases, self._states, strict=True):
                own = {number: bases[place][number] for number in numbers if number in bases[place]}
                said = memory.read(states[place], tokens, own, segment.is_first)
                for expert, number in enumerate(numbers, first):
                    if number in said:
                        nats[expert, place, columns] = said[number]
                first += len(numbers)
        return nats

    def progress_state(self) -> list[list[State]]:
        """What is kept of the documents."""
        return self._states

    def load_progress_state(self, state: list[list[State]]) -> None:
        """Puts back what `progress_state` gave."""
        self._states = state
