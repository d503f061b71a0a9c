"""Learner: the two doors by which a policy, a callback that acts before a segment is scored, changes what is learned."""

from typing import Protocol


class Learner(Protocol):
    """What learns, as a policy sees it."""

    updates_due: int  # updates to make from the segment that comes next; 0: none is due

    def reset(self, documents: int) -> None:
        """Restores weights, optimizer state and random state of the documents that begin to what they were at first."""
