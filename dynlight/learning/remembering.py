"""Remembering: the memories of the documents that are being read, as experts of the mixture."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dynlight.choices.memories import STATIC, Base, DocumentMemory, State, copy_of
from dynlight.documents.segments import Segment


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
        self._known: list[int] = []  # tokens that were read, by the same

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
        self._known = [0] * documents

    @property
    def known(self) -> list[int]:
        """How many tokens of each document are remembered."""
        return self._known.copy()

    def read(self, segment: Segment, bases: Sequence[Mapping[int, Base]]) -> np.ndarray:
        """The nats of each expert, float64 [experts, D, S]; NaN where its base has failed.

        `bases` holds for each document what its bases make of the tokens that it scores.
        """
        nats = np.full((len(self.experts), *segment.targets.shape), np.nan)
        # In full precision, whatever the model is read in: exponents of products of states are made here.
        with torch.autocast(segment.targets.device.type, enabled=False):
            self._read(segment, bases, nats)
        return nats

    def _read(self, segment: Segment, bases: Sequence[Mapping[int, Base]], nats: np.ndarray) -> None:
        for place, columns in enumerate(segment.scored):
            tokens, first = segment.targets[place, columns], 0
            for memory, numbers, states in zip(self._memories, self._bases, self._states, strict=True):
                own = {number: bases[place][number] for number in numbers if number in bases[place]}
                said = memory.read(states[place], tokens, own, segment.is_first)
                for expert, number in enumerate(numbers, first):
                    if number in said:
                        nats[expert, place, columns] = said[number]
                first += len(numbers)
            self._known[place] += len(tokens)

    def ahead(self, begins: bool) -> "Ahead":
        """What the memories say of the next tokens of a single document; `begins`: whether it begins with them."""
        return Ahead(self._memories, self._bases, [copy_of(states[0]) for states in self._states], begins)

    def progress_state(self) -> dict[str, Any]:
        """What is kept of the documents."""
        return {"states": self._states, "known": self._known}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` gave."""
        self._states, self._known = state["states"], state["known"]


class Ahead:
    """What memories say of the tokens that follow, one by one; what they keep themselves stays as it is.

    Args:
        memories: that remember.
        numbers: of each memory the bases that it is over.
        states: of each memory, a copy of its own.
        begins: whether a document begins.
    """

    def __init__(
        self, memories: Sequence[DocumentMemory], numbers: Sequence[Sequence[int]], states: list[State], begins: bool
    ) -> None:
        self._each = list(zip(memories, numbers, states, strict=True))
        self._begins = begins

    def predict(self, bases: Mapping[int, Base], vocabulary: int) -> np.ndarray:
        """Ln p of every token as the next one, float64 [experts, V]; NaN where an expert's base has failed."""
        rows = []
        for memory, numbers, state in self._each:
            said = memory.predict(state, {number: bases[number] for number in numbers if number in bases}, self._begins)
            rows += [said.get(number, np.full(vocabulary, np.nan)) for number in numbers]
        return np.array(rows).reshape(len(rows), vocabulary)

    def take(self, token: Tensor, bases: Mapping[int, Base]) -> None:
        """Remembers a token, int64 [1], of which the bases have nats."""
        for memory, numbers, state in self._each:
            memory.read(state, token, {number: bases[number] for number in numbers if number in bases}, self._begins)
        self._begins = False
