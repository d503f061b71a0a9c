"""Learner: what a policy, a callback that acts before a segment is scored, may change: updates due, and reset."""

from typing import Protocol


class Learner(Protocol):
    """What learns, as a policy sees it."""

    updates_due: int  # updates to make from the next segment

    def reset(self, documents: int, keep: float) -> None:
        """Restores the initial weights, optimizer state and random state, for the `documents` documents that begin.

        `keep` is the share of what was learned that stays.
        """
