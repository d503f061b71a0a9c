"""Protocol: the choices of a run in one line, and the names of the experts that scored the documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from dynlight.choices.objective import NextToken


@dataclass(frozen=True)
class Expert:
    """One of those that a mixture mixes: the static model, or what a rule learns."""

    name: str
    rule: str | None  # None: static
    rate: float | None


STATIC = Expert("static", rule=None, rate=None)


def experts_of(optimizers: Sequence[Optimizer], has_static: bool) -> list[Expert]:
    """The static model, if it is an expert, then the rule of each optimizer."""
    experts = [STATIC] * has_static
    for optimizer in optimizers:
        rule, rate = type(optimizer).__name__, float(optimizer.defaults["lr"])
        name = f"{rule}(lr {optimizer.defaults['lr']:g})"
        same = sum(
            known.name.partition(" no. ")[0] == name for known in experts
        )  # rules of this name and rate that differ in other settings
        experts.append(Expert(f"{name} no. {same + 1}" if same else name, rule, rate))
    return experts


def protocol(
    context: Any,
    parameters: Any,
    experts: Sequence[Expert],
    schedule: Any,
    reset: Any,
    mixture: Any = None,
    gradient: Sequence[Any] = (),
    objective: Any = None,
    factors: Mapping[str, float] | None = None,
) -> str:
    """The choices in one line: what a number of this run means."""
    learning = [expert.name for expert in experts if expert.rule is not None]
    by = " and ".join(learning) or "nothing (static)"
    by += f" {', '.join(map(str, gradient))}" if gradient and learning else ""
    by += (
        f" ({', '.join(f'{name} at {factor:g} × lr' for name, factor in factors.items())})"
        if factors and learning
        else ""
    )
    by += f" from {objective}" if learning and not isinstance(objective, NextToken | None) else ""
    mixed = f"{mixture} · " if mixture is not None else ""
    return f"context {context} · learns {parameters} · by {by} · {mixed}schedule {schedule} · reset {reset}"
