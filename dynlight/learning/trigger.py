"""Trigger: which rows learn from a segment, where that depends on what they scored."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynlight.choices.objective import Objective
from dynlight.choices.schedule import UpdateFrequency
from dynlight.documents.segments import Segment


class Trigger:
    """Asks schedule and objective which rows learn from a segment, each from the row's own nats.

    Args:
        schedule: when it is learned.
        objective: what is learned from a segment.
        rules: how many rules learn.
    """

    def __init__(self, schedule: UpdateFrequency, objective: Objective, rules: int) -> None:
        self._schedule = schedule
        self._objective = objective
        self._rules = rules
        self._is_asked = True
        self._sums = np.zeros((2, rules, 0))  # nats and tokens of the document so far, by rule and place in the wave

    @property
    def is_set(self) -> bool:
        """Whether what is learned from depends on what was scored: else every row learns whenever an update is due."""
        may_refuse = type(self._objective).learns is not Objective.learns
        return self._rules > 0 and (self._schedule.is_choosy or may_refuse)

    def learn_always(self) -> None:
        """Lets every row learn, whatever it scored, as when it is tried how much memory that takes."""
        self._is_asked = False

    def learners(self, segment: Segment, nats: Tensor, owners: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each row learns from a segment that it has scored.

        Args:
            segment: of the documents.
            nats: of each row, on the host, [R, S].
            owners: of each row, its rule and its document's place in the wave.
        """
        if not (self.is_set and self._is_asked):
            return [True] * len(owners)
        if segment.is_first:
            self._sums = np.zeros((2, self._rules, len(segment.documents)))
        learners = []
        for row, (rule, place) in enumerate(owners):
            own = nats[row, segment.scored[place]]
            so_far, here = self._sums[:, rule, place], (float(own.double().sum()), len(own))
            is_wanted = self._schedule.is_surprised(here[0] / here[1], so_far[0] / so_far[1] if so_far[1] else None)
            learners.append(is_wanted and self._objective.learns(own))
            self._sums[:, rule, place] += here
        return learners

    def progress_state(self) -> Tensor:
        """The nats and tokens of the documents so far."""
        return torch.from_numpy(self._sums)

    def load_progress_state(self, state: Tensor) -> None:
        """Puts back what `progress_state` gave."""
        self._sums = state.numpy()
