"""Mixing: what predicts a segment: the learned weights alone, or a mixture of experts.

`Alone` or `Mixed` is chosen once, so that the path from a segment to its score asks nothing about mixtures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlight.choices.memories import STATIC, Base, DocumentMemory
from dynlight.choices.mixture import Mixture
from dynlight.documents.segments import Segment
from dynlight.learning.failures import readable
from dynlight.learning.forward import Keeps, Reading
from dynlight.learning.remembering import Remembering
from dynlight.learning.score import ExpertScores, Score
from dynlight.learning.stacked import Stacked
from dynlight.learning.weights import Owner, Weights


@dataclass(frozen=True)
class Scored:
    """A reading whose nats are on their way to the host."""

    reading: Reading
    fetched: Callable[[], Tensor]

    @property
    def nats(self) -> Tensor:
        """On the host, of each row [R, S], or document [D, S]; the first to ask waits for the device."""
        return self.fetched()


class Prediction(NamedTuple):
    """The nats of a segment, [D, S], and in a mixture the scores of each expert."""

    nats: Tensor
    experts: ExpertScores | None


class Alone:
    """The learned weights of each document predict it alone."""

    keeps: Keeps = ()  # what the readings that it predicts from must keep
    keeps_static: Keeps = ()
    memories = Remembering((), 0)  # none

    def begin(self, documents: int) -> None:
        """Gives each expert its first weight, for the `documents` documents that begin."""

    def predict(
        self, segment: Segment, rows: Scored, static: Scored | None, teacher: Scored | None, weights: Weights
    ) -> Prediction:
        """The prediction, from what all rows, the static model and the teacher have made of the segment."""
        return Prediction(rows.nats, None)

    def settle(
        self, score: Score, finite: Sequence[bool] | None, weights: Weights, optimizers: Sequence[Optimizer]
    ) -> Sequence[bool] | None:
        """Drops the rows of failed rules; returns whether each document's gradients were finite, None: none can fail."""
        return finite

    # Of one document, read token by token.

    def log_weights(self) -> np.ndarray:
        """Ln w of the experts before the next segment, float64 [E, 1]."""
        return np.zeros((1, 1))

    def by_expert(self, rows: np.ndarray, static: np.ndarray | None, owners: Sequence[Owner]) -> np.ndarray:
        """What each expert makes of a token, [E, V], from what all rows [R, V] and the static model [1, V] do; NaN: has failed."""
        return rows

    def distribution(self, log_weights: np.ndarray, logs: np.ndarray) -> np.ndarray:
        """p(x) of a token, float64 [V], from ln p_e(x) of each expert, [E, V]."""
        chances: np.ndarray = np.exp(logs[0])
        return chances

    def weighted(self, log_weights: np.ndarray, nats: np.ndarray) -> np.ndarray:
        """Ln w behind a token that had these nats, [E, 1, 1]."""
        return log_weights

    def progress_state(self) -> Any:
        """The weights of the experts, and what memories keep, if there are any."""
        return None

    def load_progress_state(self, state: Any) -> None:
        """Puts back what `progress_state` gave."""


class Mixed(Alone):
    """A mixture predicts each document, from the static model, if it is an expert, from each rule's row, and from memories.

    Args:
        mixture: how experts are weighted.
        rules: how many rules learn; where none does, the rows are read by the static model.
        has_static: whether the static model is an expert.
        memories: what is remembered besides the weights.
    """

    def __init__(self, mixture: Mixture, rules: int, has_static: bool, memories: Sequence[DocumentMemory] = ()) -> None:
        self._mixture = mixture
        self._rules = rules
        self._has_static = has_static
        self._before_rules = has_static + mixture.teacher
        self.memories = Remembering(memories, rules)
        self.keeps = self.memories.kept("rules" if rules else "static")
        self.keeps_static = self.memories.kept("static") if rules else ()
        self._log_weights = np.empty((0, 0))

    def begin(self, documents: int) -> None:
        experts = self._before_rules + self._rules + len(self.memories.experts)
        self._log_weights = self._mixture.prior(experts, documents)
        self.memories.begin(documents)

    def predict(
        self, segment: Segment, rows: Scored, static: Scored | None, teacher: Scored | None, weights: Weights
    ) -> Prediction:
        documents, columns = segment.targets.shape
        owners = _rows(weights).owners
        if not self._rules:
            static, owners = rows, []
        else:
            rows = _without_spoiled(segment, rows, weights, self.keeps)
        by_expert = rows.nats.new_full((self._rules, documents, columns), float("nan"))
        for row, owner in enumerate(owners):
            by_expert[owner] = rows.nats[row]
        others = [static if self._has_static else None, teacher if self._mixture.teacher else None]
        by_expert = torch.cat([*(other.nats[None] for other in others if other is not None), by_expert])
        nats, known = by_expert.numpy(), self.memories.known[:documents]
        if self.memories.experts:
            nats = np.concatenate([nats, self.memories.read(segment, _bases(segment, rows, owners, static))])
        is_scored = np.zeros((documents, columns), dtype=bool)
        for document, scored in enumerate(segment.scored):
            is_scored[document, scored] = True
        mixed, mean_weights, after = self._mixture.predict(self._log_weights[:, :documents], nats, is_scored)
        self._log_weights[:, :documents] = after
        learners = np.zeros((self._rules, documents), dtype=bool)
        for owner in owners:
            learners[owner] = True
        return Prediction(torch.from_numpy(mixed), ExpertScores(nats, mean_weights, learners, known))

    def settle(
        self, score: Score, finite: Sequence[bool] | None, weights: Weights, optimizers: Sequence[Optimizer]
    ) -> Sequence[bool] | None:
        assert score.experts is not None, "a mixture predicted it"
        of_rules = score.experts.nats[self._before_rules :][: self._rules]
        failed = ~np.isfinite(of_rules).all(axis=2)
        stacked = _rows(weights)
        if self._rules and (rows := [row for row, owner in enumerate(stacked.owners) if failed[owner]]):
            stacked.drop(rows, optimizers)
        return None

    def log_weights(self) -> np.ndarray:
        return self._log_weights[:, :1].copy()

    def by_expert(self, rows: np.ndarray, static: np.ndarray | None, owners: Sequence[Owner]) -> np.ndarray:
        logs = np.full((self._rules, rows.shape[1]), np.nan)
        for row, (rule, _) in enumerate(owners):
            logs[rule] = rows[row]
        return logs if static is None else np.concatenate([static, logs])

    def distribution(self, log_weights: np.ndarray, logs: np.ndarray) -> np.ndarray:
        predicts = ~np.isnan(logs).any(axis=1) & np.isfinite(log_weights[:, 0])
        shares = np.exp(log_weights[predicts, 0] - log_weights[predicts, 0].max(initial=-np.inf))
        mixed: np.ndarray = (shares / shares.sum()) @ np.exp(logs[predicts])
        return mixed

    def weighted(self, log_weights: np.ndarray, nats: np.ndarray) -> np.ndarray:
        return self._mixture.predict(log_weights, nats)[2]

    def progress_state(self) -> Any:
        return {"log_weights": torch.from_numpy(self._log_weights), "memories": self.memories.progress_state()}

    def load_progress_state(self, state: Any) -> None:
        if isinstance(state, Tensor):  # a checkpoint of a version without memories
            state = {"log_weights": state}
        self._log_weights = state["log_weights"].numpy()
        if "memories" in state:
            self.memories.load_progress_state(state["memories"])
        else:
            self.memories.begin(self._log_weights.shape[1])


def _rows(weights: Weights) -> Stacked:
    assert isinstance(weights, Stacked), "a mixture has a row for each rule's learning from each document"
    return weights


def _without_spoiled(segment: Segment, rows: Scored, weights: Weights, keeps: Keeps) -> Scored:
    """The readings of all rows; in a row with NaN, that of its head which is `readable`, then NaN."""
    nats, reading = rows.nats, rows.reading
    for row in nats.isnan().any(dim=1).nonzero().flatten().tolist():
        head = readable(weights, segment, row, keeps)
        nats = _with_row(nats, row, head.nats.cpu())
        kept: dict[str, Any] = {name: _with_row(getattr(reading, name), row, getattr(head, name)) for name in keeps}
        reading = reading._replace(**kept)
    return Scored(reading, lambda: nats)


def _with_row(values: Tensor, row: int, head: Tensor) -> Tensor:
    """A copy of the values of all rows, in which one row begins with others, and is NaN behind them."""
    values = values.clone()
    values[row] = float("nan")
    if len(head):
        values[row, : len(head)] = head
    return values


def _bases(
    segment: Segment, rows: Scored, owners: Sequence[tuple[int, int]], static: Scored | None
) -> list[dict[int, Base]]:
    """Of each document what its experts make of the tokens that it scores."""
    bases: list[dict[int, Base]] = [{} for _ in segment.documents]
    read = [] if static is None else [(STATIC, place, static, place) for place in range(len(bases))]
    for number, place, scored, row in [*read, *((*owner, rows, row) for row, owner in enumerate(owners))]:
        columns = segment.scored[place]
        nats = scored.nats[row, columns].double().numpy()
        bases[place][number] = Base(nats, **scored.reading.kept_of(row, columns))
    return bases
