"""Pruning: which units of the learned weights go on learning, for each row by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynlight.choices.parameters import AdaptedLinear, Parameters, Pruned, adapters_of
from dynlight.errors import require
from dynlight.learning.weights import Owner, Weights

_BETA = 0.85  # of both means, as in AdaLoRA


@dataclass(frozen=True)
class _Part:
    """What units a learned weight belongs to: one, or along an axis one for each index."""

    first: int  # unit
    axis: int | None  # of the ranks: of lora_A 0, of lora_B 1; None: the weight is of one unit


@dataclass
class _Row:
    """What is known of a row's units."""

    sensitivities: dict[int, Tensor]  # Ī of each learned weight, by its place
    uncertainties: dict[int, Tensor]  # Ū
    learns: Tensor  # whether each unit does, bool [units]
    updates: int = 0


class Pruning:
    """Watches the gradients of each row, and stops the units that contribute least.

    Args:
        parameters: which weights learn; nothing is pruned unless it says so.
        model: as they have prepared it.

    Raises:
        SettingError: if adapters of other layers than linear ones are to be pruned.
    """

    def __init__(self, parameters: Parameters, model: nn.Module) -> None:
        if isinstance(parameters, Pruned):
            others = {type(each).__name__ for each in adapters_of(model) if not isinstance(each, AdaptedLinear)}
            require(not others, "parameters.of", "adapt linear maps alone to be pruned by rank", got=", ".join(sorted(others)),
                    advice="name other targets")  # fmt: skip
        self._choice = parameters if isinstance(parameters, Pruned) and parameters.keep < 1 else None
        self._parts, self._units = _parts(model) if self._choice else ([], 0)
        self._rows: dict[Owner, _Row] = {}

    @property
    def is_set(self) -> bool:
        """Whether anything is ever pruned."""
        return self._choice is not None

    def begin(self, weights: Weights) -> None:
        """Lets all units learn."""
        self._rows = {}
        if self.is_set:
            weights.stop({})

    @torch.no_grad()
    def see(self, weights: Weights, learners: Sequence[bool]) -> None:
        """Takes note of the gradients of the rows that learn, and leaves out those of units that have stopped."""
        if self._choice is None:
            return
        gradients, values = weights.gradients(), weights.values()
        for row, owner in enumerate(weights.owners):
            if not learners[row]:
                continue
            state = self._rows.setdefault(owner, _Row({}, {}, torch.ones(self._units, dtype=torch.bool)))
            impacts = {place: (values[place][row] * gradient[row]).abs() for place, gradient in gradients.items()}
            if not all(impact.sum().isfinite() for impact in impacts.values()):  # of these no update will be made
                continue
            for place, impact in impacts.items():
                mean = state.sensitivities[place] = _smoothed(state.sensitivities.get(place), impact)
                state.uncertainties[place] = _smoothed(state.uncertainties.get(place), (impact - mean).abs())
                self._blank(gradients[place][row], place, state)

    @torch.no_grad()
    def after(self, weights: Weights, updated: Sequence[bool]) -> None:
        """Counts an update of the rows that had one, stops units where it is time to, and lets stopped ranks say nothing."""
        if self._choice is None:
            return
        values, has_stopped = weights.values(), False
        for row, owner in enumerate(weights.owners):
            if not updated[row] or owner not in self._rows:
                continue
            state = self._rows[owner]
            state.updates += 1
            if state.updates % self._choice.every == 0:
                count = self._choice.left(self._units, state.updates)
                scores = self._scores(state).masked_fill(~state.learns, -1.0)  # a score is at least 0
                state.learns = torch.zeros_like(state.learns)
                state.learns[scores.sort(descending=True, stable=True).indices[:count]] = True
                has_stopped = True
                for errors in weights.errors:  # of what has stopped nothing is made good
                    for place, error in enumerate(errors):
                        self._blank(error[row], place, state)
            for place, part in enumerate(self._parts):
                if part.axis == 1:
                    self._blank(values[place][row], place, state)
        if has_stopped:
            self._stop(weights)

    def _blank(self, values: Tensor, place: int, state: _Row) -> None:
        """Sets to 0 what a weight, or its gradient, has of units that have stopped."""
        part = self._parts[place]
        if part.axis is None:
            if not state.learns[part.first]:
                values.zero_()
        else:
            ranks = state.learns[part.first : part.first + values.shape[part.axis]].to(values.device)
            values.mul_(ranks[:, None] if part.axis == 0 else ranks)

    def _scores(self, state: _Row) -> Tensor:
        """The score of each unit, [units], on the host."""
        sums, counts = torch.zeros(self._units, dtype=torch.float64), torch.zeros(self._units, dtype=torch.float64)
        for place, part in enumerate(self._parts):
            if place not in state.sensitivities:
                continue
            score = (state.sensitivities[place] * state.uncertainties[place]).double()
            if part.axis is None:
                sums[part.first] += score.sum().cpu()
                counts[part.first] += score.numel()
            else:  # the means of a row of A and of a column of B, added
                of_ranks = score.mean(dim=1 - part.axis).cpu()
                sums[part.first : part.first + len(of_ranks)] += of_ranks
                counts[part.first : part.first + len(of_ranks)] = 1
        return sums / counts.clamp(min=1)

    def _stop(self, weights: Weights) -> None:
        """Tells the weights which of them have stopped as a whole."""
        stopped = {
            owner: frozenset(
                place
                for place, part in enumerate(self._parts)
                if part.axis is None and not self._rows[owner].learns[part.first]
            )
            for owner in weights.owners
            if owner in self._rows
        }
        weights.stop(stopped)

    def progress_state(self) -> list[dict[str, Any]]:
        """What is known of each row."""
        return [{"owner": owner, **vars(state)} for owner, state in self._rows.items()]

    def load_progress_state(self, state: list[dict[str, Any]]) -> None:
        """Puts back what `progress_state` gave; `go_on` then tells the weights."""
        self._rows = {
            tuple(row["owner"]): _Row(**{name: row[name] for name in row if name != "owner"}) for row in state
        }

    def go_on(self, weights: Weights) -> None:
        """Tells the weights which of them have stopped, in a run that is resumed."""
        if not self.is_set:
            return
        values = weights.values()
        for state in self._rows.values():
            for of_places in (state.sensitivities, state.uncertainties):
                of_places |= {place: tensor.to(values[place].device) for place, tensor in of_places.items()}
        self._stop(weights)


def _smoothed(before: Tensor | None, value: Tensor) -> Tensor:
    """β · before + (1 − β) · value; before the first value stands 0."""
    return (1 - _BETA) * value if before is None else _BETA * before + (1 - _BETA) * value


def _parts(model: nn.Module) -> tuple[list[_Part], int]:
    """Of each learned weight the units that it belongs to, and how many units there are."""
    firsts: dict[str, int] = {}
    parts, units = [], 0
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        module, _, factor = name.partition(".lora_")
        axis = {"A": 0, "B": 1}.get(factor[:1])
        if axis is None:
            module = name.rpartition(".")[0]
        if module not in firsts:
            firsts[module] = units
            units += 1 if axis is None else weight.shape[axis]
        parts.append(_Part(firsts[module], axis))
    return parts, units
