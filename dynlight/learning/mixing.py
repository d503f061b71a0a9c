"""Mixing: what predicts a segment: the learned weights alone, or a mixture of experts.

`Alone` or `Mixed` is chosen once, so that the path from a segment to its score asks nothing about mixtures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlight.choices.mixture import Mixture
from dynlight.documents.segments import Segment
from dynlight.learning.failures import readable_nats
from dynlight.learning.score import ExpertScores, Score
from dynlight.learning.stacked import Stacked
from dynlight.learning.weights import Weights


class Prediction(NamedTuple):
    """The nats of a segment, [D, S], and in a mixture the scores of each expert."""

    nats: Tensor
    experts: ExpertScores | None


class Alone:
    """The learned weights of each document predict it alone."""

    def begin(self, documents: int) -> None:
        """Gives each expert its first weight, for the `documents` documents that begin."""

    def predict(self, segment: Segment, by_row: Tensor, static: Tensor | None, weights: Weights) -> Prediction:
        """The prediction, from the nats of all rows, `by_row` [R, S], and the static model's, `static` [D, S], on the host."""
        return Prediction(by_row, None)

    def settle(
        self, score: Score, finite: Sequence[bool] | None, weights: Weights, optimizers: Sequence[Optimizer]
    ) -> Sequence[bool] | None:
        """Drops the rows of failed rules; returns whether each document's gradients were finite, None: none can fail."""
        return finite

    def progress_state(self) -> Tensor | None:
        """The weights of the experts, if there are any."""
        return None

    def load_progress_state(self, state: Tensor | None) -> None:
        """Puts back what `progress_state` gave."""


class Mixed(Alone):
    """A mixture predicts each document, from the static model, if it is an expert, and from each rule's row.

    Args:
        mixture: how experts are weighted.
        rules: how many rules learn.
        has_static: whether the static model is an expert.
    """

    def __init__(self, mixture: Mixture, rules: int, has_static: bool) -> None:
        self._mixture = mixture
        self._rules = rules
        self._has_static = has_static
        self._log_weights = np.empty((0, 0))

    def begin(self, documents: int) -> None:
        self._log_weights = self._mixture.prior(self._rules + self._has_static, documents)

    def predict(self, segment: Segment, by_row: Tensor, static: Tensor | None, weights: Weights) -> Prediction:
        documents, columns = segment.targets.shape
        by_expert = by_row.new_full((self._rules, documents, columns), float("nan"))
        rules, owners = np.array(_rows(weights).owners, dtype=np.int64).reshape(-1, 2).T
        by_expert[rules, owners] = _without_spoiled(segment, by_row, weights)
        if static is not None:
            by_expert = torch.cat([static[None], by_expert])
        nats = by_expert.numpy()
        is_scored = np.zeros((documents, columns), dtype=bool)
        for document, scored in enumerate(segment.scored):
            is_scored[document, scored] = True
        mixed, mean_weights, after = self._mixture.predict(self._log_weights[:, :documents], nats, is_scored)
        self._log_weights[:, :documents] = after
        learners = np.zeros((self._rules, documents), dtype=bool)
        learners[rules, owners] = True
        return Prediction(torch.from_numpy(mixed), ExpertScores(nats, mean_weights, learners))

    def settle(
        self, score: Score, finite: Sequence[bool] | None, weights: Weights, optimizers: Sequence[Optimizer]
    ) -> Sequence[bool] | None:
        assert score.experts is not None, "a mixture predicted it"
        failed = ~np.isfinite(score.experts.nats[self._has_static :]).all(axis=2)
        stacked = _rows(weights)
        if rows := [row for row, owner in enumerate(stacked.owners) if failed[owner]]:
            stacked.drop(rows, optimizers)
        return None

    def progress_state(self) -> Tensor | None:
        return torch.from_numpy(self._log_weights)

    def load_progress_state(self, state: Any) -> None:
        self._log_weights = state.numpy()


def _rows(weights: Weights) -> Stacked:
    assert isinstance(weights, Stacked), "a mixture has a row for each rule's learning from each document"
    return weights


def _without_spoiled(segment: Segment, nats: Tensor, weights: Weights) -> Tensor:
    """The nats of all rows; in a row with NaN, those of `readable_nats`, then NaN."""
    spoiled = nats.isnan().any(dim=1).nonzero().flatten().tolist()
    nats = nats.clone() if spoiled else nats
    for row in spoiled:
        readable = readable_nats(weights, segment, row)
        nats[row] = torch.cat([readable, nats.new_full((nats.shape[1] - len(readable),), float("nan"))])
    return nats
