"""Update: how the learned weights change. A new rule is a `torch.optim.Optimizer`; nothing else.

Any class of `torch.optim` works that makes its step from one gradient; here are Krause's rule, which torch lacks, and
what is checked and set of any rule.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer, SparseAdam

from dynlight.choices.known import known_subclasses
from dynlight.errors import SettingError, require

Update = Callable[[Iterable[Parameter]], Optimizer]

# Of each rule, the rates to try where none is given, a decade wide, and the factor by which they are higher for adapters:
# a rule that divides the gradient by its size moves each weight by about the rate, and adapters must move further.
_USUAL_RATES = {
    "SGD ASGD": ((0.03, 0.1, 0.3), 1),
    "Adam AdamW Adamax NAdam RAdam": ((1e-4, 3e-4, 1e-3), 10),
    "RMSprop": ((3e-5, 1e-4, 3e-4), 10),
    "RMSDynamic": ((3e-5, 1e-4, 3e-4), 1),
    "Adagrad": ((3e-4, 1e-3, 3e-3), 10),
    "Adadelta": ((0.1, 0.3, 1.0), 1),
    "Rprop": ((1e-5, 3e-5, 1e-4), 10),
}
_USUAL_WIDTH = 256


def rules_of(
    update: Update | Sequence[Update] | None,
    rates: Sequence[float] | Callable[[Update], Sequence[float]],
    mixture: object | None,
) -> list[Update]:
    """The rules that learn from each document, each by itself and at its rate.

    Args:
        update: the rule, or several; None: nothing learns, or with a mixture SGD and Adam do, at their usual rates.
        rates: learning rates in place of the rules' own, or a function that gives the rates of a rule.
        mixture: how the rules predict together; None: there is one rule at most, at its own rate.

    Raises:
        SettingError: if there are several rules and no mixture, rates and no rule, or rates that are
            equal, negative, not finite or none.
    """
    rules = list(update) if isinstance(update, Sequence) else [] if update is None else [update]
    if mixture is None:
        if len(rules) > 1:
            raise SettingError("update", "be one rule where nothing is mixed", got=len(rules), advice="set mixture: {}")
        return rules
    if callable(rates):
        return [at_rate(rule, rate) for rule in rules or [torch.optim.SGD, torch.optim.Adam] for rate in rates(rule)]
    if not rules:
        raise SettingError(
            "update", "be a rule where there are rates", got="null", advice="set one, or mixture: {} without rates"
        )
    if not rates or len(set(rates)) < len(rates):
        raise SettingError("rates", "be different learning rates, at least one", got=list(rates))
    if wrong := [rate for rate in rates if not 0 <= rate < math.inf]:
        raise SettingError("rates", "be at least 0 and finite", got=wrong[0])
    return [at_rate(rule, rate) for rule in rules for rate in rates]


def usual_rates(update: Update, width: int, adapters: bool = False) -> list[float]:
    """Three rates, a decade wide, that suit a rule: those found on small models, times min(1, 256 / width).

    The best rate falls with the width (Yang et al. 2022, arXiv 2203.03466); where exactly it lies is left to the mixture.

    Args:
        update: the rule.
        width: of the model's embedding.
        adapters: whether adapters learn, rather than the model's own weights.

    Raises:
        SettingError: if no rates are known for the rule, or the rule is not elementwise.
    """
    name = type(new_optimizer(update, [Parameter(torch.zeros(1, 1))], "in a mixture")).__name__
    known = [entry for names, entry in _USUAL_RATES.items() if name in names.split()]
    require(bool(known), "rates", f"be given for {name}, whose usual rates are not known", got="null")
    ((rates, factor),) = known
    scale = min(1.0, _USUAL_WIDTH / width) * (factor if adapters else 1)
    return [float(f"{scale * rate:.2g}") for rate in rates]


def at_rate(update: Update, rate: float) -> Update:
    """The same rule with another learning rate."""

    def make(weights: Iterable[Parameter]) -> Optimizer:
        optimizer = update(weights)
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["lr"] = rate
        return optimizer

    return make


def factors_of(names: Sequence[str], factors: Mapping[str, float]) -> list[float]:
    """Of each learned weight the factor of its learning rate: that of the first pattern found in its name, else 1.

    Args:
        names: of the learned weights.
        factors: by regular expression.

    Raises:
        SettingError: if a factor is negative or not finite, or a pattern is none, or the first of no name.
    """
    found: dict[int, float] = {}
    for pattern, factor in factors.items():
        setting = f"rate_factors.{pattern}"
        require(0 <= factor < math.inf, setting, "be at least 0 and finite", got=factor)
        try:
            matching = [place for place, name in enumerate(names) if re.search(pattern, name)]
        except re.error as error:
            got = f"{pattern} ({error})"
            raise SettingError("rate_factors", "have regular expressions as keys", got=got) from error
        if not (places := [place for place in matching if place not in found]):
            got = "those alone that earlier patterns are found in" if matching else "none"
            must = "be found in the name of a learned weight"
            raise SettingError(setting, must, got=got, advice=f"a name looks like {names[0]}")
        found |= dict.fromkeys(places, factor)
    return [found.get(place, 1.0) for place in range(len(names))]


def scale_rates(optimizer: Optimizer, factors: Mapping[Parameter, float]) -> None:
    """Multiplies each weight's learning rate by its factor: weights of one factor become a group of the optimizer's."""
    groups = []
    for group in optimizer.param_groups:
        for factor in dict.fromkeys(factors[weight] for weight in group["params"]):
            weights = [weight for weight in group["params"] if factors[weight] == factor]
            groups.append({**group, "params": weights, "lr": group["lr"] * factor})
    optimizer.param_groups = groups


def new_optimizer(update: Update, weights: Sequence[Parameter], stacked: str | None = None) -> Optimizer:
    """The optimizer that a rule makes of weights, which may lie on torch's `meta` device.

    Args:
        update: the rule.
        weights: those that it is to change.
        stacked: in words for the error, where several documents or rates are stacked in one tensor; None: nowhere.

    Raises:
        SettingError: if the rule makes no step from one dense gradient, refuses its settings or these weights, or
            would couple stacked rows.
    """
    try:
        optimizer = update(weights)
    except SettingError as error:
        raise error.under("update") from error
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error)
        if reason.startswith(negative := "Invalid learning rate: "):  # torch's words
            raise SettingError("update.lr", "be at least 0", got=reason.removeprefix(negative)) from error
        raise SettingError(
            "update",
            "be a rule for the weights that learn",
            got=f"one that says: {reason.rstrip('.')}",
            advice="choose other settings, another rule or other parameters",
        ) from error
    if isinstance(optimizer, LBFGS | SparseAdam):
        raise SettingError(
            "update.class_path",
            "be a rule that makes a step from one dense gradient",
            got=type(optimizer).__name__,
            advice="choose SGD, Adam, AdamW, RMSprop or RMSDynamic",
        )
    if stacked and not is_elementwise(update):
        raise SettingError(
            "update.class_path",
            f"be a rule that treats each weight by itself {stacked}",
            got=type(optimizer).__name__,
            advice=f"choose one of {', '.join(elementwise_rules())}, or data.together: 1 and one rate",
        )
    if not math.isfinite(rate := optimizer.defaults.get("lr", 0.0)):
        raise SettingError("update.lr", "be finite", got=rate)
    if optimizer.defaults.get("differentiable"):
        raise SettingError("update.differentiable", "be false, as weights are changed in place", got="true")
    return optimizer


def is_elementwise(update: Update) -> bool:
    """Whether the rule treats each weight by itself, found by trial: rows updated together end as each updated alone.

    Two matrices whose gradients differ much in size are stacked, as those of documents are; alone, each is a vector. So a
    rule that looks at a norm, at rows and columns or at the shape is noticed.
    """
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    sizes = torch.tensor([1e-2, 1e2], dtype=torch.float64).view(2, 1, 1)
    gradients = [torch.randn(2, 3, 4, generator=draw, dtype=torch.float64) * sizes for _ in range(3)]
    try:
        together = _stepped(update, weights, gradients)
        alone = [
            _stepped(update, weights[row].flatten(), [gradient[row].flatten() for gradient in gradients])
            for row in (0, 1)
        ]
    except (ValueError, TypeError, RuntimeError):  # a rule for matrices, say
        return False
    return torch.allclose(together.view(2, -1), torch.stack(alone), rtol=1e-9, atol=1e-12)


def _stepped(update: Update, weights: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The weights after one update of a rule from each of these gradients."""
    learned = Parameter(weights.clone())
    optimizer = update([learned])
    if isinstance(optimizer, NeedsStatistics):
        optimizer.use_statistics([torch.ones_like(weights)])
    for gradient in gradients:
        learned.grad = gradient.clone()
        optimizer.step()
    return learned.detach()


def elementwise_rules() -> list[str]:
    """The names of all rules, torch's and others, that treat each weight by itself."""
    of_torch = [rule for rule in vars(torch.optim).values() if isinstance(rule, type) and issubclass(rule, Optimizer)]
    return sorted(rule.__name__ for rule in [*of_torch, *known_subclasses(Optimizer)] if is_elementwise(rule))


@dataclass
class GradientStatistics:
    """The root mean square of each weight's gradient over segments of a corpus, under the initial weights.

    Formula: MS = √(mean over segments of g²), g the gradient of a segment's mean nats. Documents are read with the
    run's own context.

    Args:
        data: the corpus, with the settings of `data`: `{path: text, data_files: books/*.txt}`.
        segments: how many segments to read at most.
        file: where the statistics are saved, and loaded from the next time; null keeps them in memory only.
    """

    data: dict[str, Any] | None = None
    segments: int = 256
    file: str | None = None


@runtime_checkable
class NeedsStatistics(Protocol):
    """A rule that must know, before its first step, how large gradients usually are."""

    statistics: GradientStatistics  # where they come from

    def use_statistics(self, mean_squares: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> None:
        """Sets MS and θ0, one tensor a weight, in the order of the parameters; None: the present weights are θ0."""


class RMSDynamic(Optimizer):
    """Krause's rule: gradients scaled by their usual size, and a pull back to the initial weights.

    Formula: Δθ = λ · min(MS / mean(MS), 1/λ) · (θ0 − θ) − η · g / (MS + ε), with η `lr`, λ `decay`, ε `epsilon`, and MS
    the statistics of `GradientStatistics`; mean(MS) is the mean over weight tensors of each tensor's mean. With λ = 0
    nothing pulls. Source: Krause et al. 2018 (arXiv 1709.07432).

    Args:
        params: the learned weights, whose present values are θ0.
        lr: η.
        decay: λ, at least 0.
        epsilon: ε, above 0, in the gradient's unit.
        statistics: where MS comes from.

    Raises:
        SettingError: if a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-4,
        decay: float = 0.0,
        epsilon: float = 1e-3,
        statistics: GradientStatistics | None = None,
    ) -> None:
        for name, value, holds in (
            ("lr", lr, lr >= 0),
            ("decay", decay, decay >= 0),
            ("epsilon", epsilon, epsilon > 0),
        ):
            if not holds:
                raise SettingError(name, f"be {'above 0' if name == 'epsilon' else 'at least 0'}", got=value)
        self.statistics = statistics or GradientStatistics()
        super().__init__(params, {"lr": lr, "decay": decay, "epsilon": epsilon})

    @torch.no_grad()
    def use_statistics(self, mean_squares: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> None:
        """Sets MS and θ0, one tensor a weight, in the order of the parameters; None: the present weights are θ0."""
        mean = torch.stack([mean_square.mean() for mean_square in mean_squares]).mean()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        initial = [weight.detach().clone() for weight in weights] if initial is None else initial
        for weight, mean_square, theta in zip(weights, mean_squares, initial, strict=True):
            self.state[weight] = {"initial": theta, "mean_square": mean_square, "relative": mean_square / mean}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.state[weight] for weight in weights]
            assert all(states), "use_statistics comes before step"
            change = torch._foreach_div(
                [weight.grad for weight in weights],
                torch._foreach_add([state["mean_square"] for state in states], group["epsilon"]),
            )
            torch._foreach_mul_(change, -group["lr"])
            if group["decay"]:
                pull = torch._foreach_mul([state["relative"] for state in states], group["decay"])
                torch._foreach_clamp_max_(pull, 1.0)
                distance = torch._foreach_sub([state["initial"] for state in states], weights)
                torch._foreach_addcmul_(change, pull, distance)
            torch._foreach_add_(weights, change)
