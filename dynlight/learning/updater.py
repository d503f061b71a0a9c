"""Updater: the gradients that are taken of a segment, and the updates made from them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlight.choices.gradient import Gradient
from dynlight.choices.objective import Forward, Objective
from dynlight.documents.segments import Context, Segment
from dynlight.documents.waves import earlier_segment
from dynlight.learning.fetch import Fetch, Later
from dynlight.learning.forward import Reading
from dynlight.learning.pruning import Pruning
from dynlight.learning.weights import Weights


class Updater:
    """Takes the gradient of what the objective says of a segment, changes it, and makes updates from it.

    Args:
        weights: that learn.
        optimizers: of each rule.
        objective: what is learned.
        changes: of the gradient before the update.
        pruning: which units go on learning.
        context: that cuts the documents.
        backward: takes the gradients of a loss.
        fetch: brings numbers to the host.
    """

    def __init__(
        self,
        weights: Weights,
        optimizers: Sequence[Optimizer],
        objective: Objective,
        changes: Sequence[Gradient],
        pruning: Pruning,
        context: Context,
        backward: Callable[[Tensor], None],
        fetch: Fetch,
    ) -> None:
        self._weights = weights
        self._optimizers = optimizers
        self._objective = objective
        self._changes = changes
        self._pruning = pruning
        self._context = context
        self._backward = backward
        self._fetch = fetch

    def gradients(self, segment: Segment, reading: Reading, scored: Reading, learners: Sequence[bool]) -> Later:
        """Takes the gradients of the rows that learn; asks of each row whether they are finite.

        `scored` is the reading that gave the score; `reading` is another where it is a second pass.
        """
        columns = self._weights.scored(segment)
        losses = self._objective.losses(Forward(reading.nats, columns, scored.nats.detach(), reading.divergences))
        if drawn := self._objective.replayed(segment.cut.index):
            share = self._objective.replayed_share
            again = torch.stack([self._losses_again(segment, index) for index in drawn]).mean(dim=0)
            losses = (1 - share) * losses + share * again
        if not all(learners):
            losses = losses[[row for row, learns in enumerate(learners) if learns]]
        # A loss for each row, a sum over rows: each row's gradient is its own.
        return self._gradients_of(losses.sum(), learners)

    def _losses_again(self, segment: Segment, index: int) -> Tensor:
        """The loss of each row, [R], on an earlier segment of the same documents, read without a memory."""
        earlier = replace(earlier_segment(segment, index, self._context), sinks=None).to(segment.inputs.device)
        nats = self._weights.read_again(earlier)
        return self._objective.losses(Forward(nats, self._weights.scored(earlier), nats.detach()))

    def _gradients_of(self, loss: Tensor, learners: Sequence[bool]) -> Later:
        self._backward(loss)
        self._pruning.see(self._weights, learners)
        self._weights.change_gradients(self._changes, learners)
        return self._fetch.later(self._weights.finite())

    def update(self, finite: Later, learners: Sequence[bool]) -> list[bool]:
        """Makes one update from the gradients that were taken last; returns of each row whether they were finite."""
        of_rows: list[bool] = finite().tolist()
        self._weights.step(self._optimizers, of_rows, learners)
        updated = [learns and is_finite for learns, is_finite in zip(learners, of_rows, strict=True)]
        self._pruning.after(self._weights, updated)
        return of_rows

    def learn_from(self, loss: Tensor) -> list[bool]:
        """Makes one update of all rows from the gradient of a loss; returns of each row whether it was finite."""
        everyone = [True] * len(self._weights.owners)
        return self.update(self._gradients_of(loss, everyone), everyone)
