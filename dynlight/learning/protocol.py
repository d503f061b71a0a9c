"""Protocol: the choices of a run in one line, and the names of the experts that scored the documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from dynlight.choices.memories import STATIC as STATIC_BASE
from dynlight.choices.memories import DocumentMemory
from dynlight.choices.objective import NextToken


@dataclass(frozen=True)
class Expert:
    """One of those that a mixture mixes: the static model, what a rule learns, or a memory over one of these."""

    name: str
    rule: str | None  # None: static, or a memory
    rate: float | None
    memory: str | None = None


STATIC = Expert("static", rule=None, rate=None)
TEACHER = Expert("teacher", rule=None, rate=None)


def experts_of(
    optimizers: Sequence[Optimizer],
    has_static: bool,
    has_teacher: bool = False,
    memories: Sequence[tuple[DocumentMemory, int]] = (),
) -> list[Expert]:
    """The static model and the teacher, if they are experts, the rule of each optimizer, each memory over what has its number."""
    experts: list[Expert] = []
    for optimizer in optimizers:
        rule, rate = type(optimizer).__name__, float(optimizer.defaults["lr"])
        name = f"{rule}(lr {optimizer.defaults['lr']:g})"
        same = sum(
            known.name.partition(" no. ")[0] == name for known in experts
        )  # rules of this name and rate that differ in other settings
        experts.append(Expert(f"{name} no. {same + 1}" if same else name, rule, rate))
    bases = {STATIC_BASE: STATIC.name} | {number: expert.name for number, expert in enumerate(experts)}
    own = [
        Expert(f"{memory} over {bases[base]}", None, None, f"{memory} over {memory.over}") for memory, base in memories
    ]
    return [*[STATIC] * has_static, *[TEACHER] * has_teacher, *experts, *own]


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
    remembered = {expert.memory: None for expert in experts if expert.memory is not None}
    mixed = f"{mixture}{''.join(f' with {memory}' for memory in remembered)} · " if mixture is not None else ""
    return f"context {context} · learns {parameters} · by {by} · {mixed}schedule {schedule} · reset {reset}"
