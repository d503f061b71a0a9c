"""Update: how the learned weights change. A new rule is a `torch.optim.Optimizer`; nothing else.

Any class of `torch.optim` works that makes its step from one gradient; here is Krause's rule, which torch lacks, and
what is checked and set of torch's optimizers.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer, SparseAdam

from dynlight.documents.document import DocumentStream
from dynlight.documents.waves import segments, waves
from dynlight.errors import SettingError
from dynlight.learning.weights import InPlace, token_nats

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation

Update = Callable[[Iterable[Parameter]], Optimizer]

# Rules that treat each weight by itself; others would couple the documents that are stacked in one tensor.
_ELEMENTWISE = "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSDynamic RMSprop Rprop SGD".split()


# Rates to try where none is given, a decade a rule, and how many times higher they are for adapters: a rule that divides
# the gradient by its size makes steps of its rate, and adapters need longer ones.
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


def experts(
    update: Update | Sequence[Update] | None,
    rates: Sequence[float] | Callable[[Update], Sequence[float]],
    mixture: object | None,
) -> list[Update]:
    """The rules that learn from each document, each by itself.

    Args:
        update: the rule, or several; None: nothing learns, or with a mixture SGD and Adam do, at their usual rates.
        rates: learning rates in place of the rules' own, or what gives those of a rule.
        mixture: what the rules predict together by; None: there is one rule at most, at its own rate.

    Raises:
        SettingError: if there are several rules and no mixture, rates and no rule, or a rate is none.
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
        SettingError: if the rule is not elementwise.
    """
    name = type(new_optimizer(update, [Parameter(torch.zeros(1, 1))], "in a mixture")).__name__
    ((rates, factor),) = (found for names, found in _USUAL_RATES.items() if name in names.split())
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


def make_optimizers(updates: Sequence[Update], module: "DynamicEvaluation") -> list[Optimizer]:
    """The optimizer of each expert's weights, ready to step.

    Raises:
        SettingError: if a rule cannot learn from one gradient a step, or refuses these weights.
    """
    collected: dict[str, list[Tensor]] = {}  # one corpus is read once, whatever the number of rates
    optimizers = []
    for update, weights in zip(updates, module.weights.experts, strict=False):  # static evaluation has no updates
        optimizer = new_optimizer(update, weights)
        if isinstance(optimizer, RMSDynamic):
            corpus = repr(optimizer.statistics)
            if corpus not in collected:
                collected[corpus] = optimizer.statistics.load_or_collect(module)
            optimizer.use_statistics(collected[corpus], module.weights.initial)
        for group in optimizer.param_groups:
            # One fused kernel for all weights, as torch itself chooses on CUDA; on CPU it must be asked.
            if "fused" in group and group["fused"] is None and not group.get("foreach"):
                group["fused"] = all(weight.device.type in ("cpu", "cuda") for weight in group["params"])
            elif group.get("foreach", True) is None:
                group["foreach"] = True
        optimizers.append(optimizer)
    return optimizers


def new_optimizer(update: Update, weights: Sequence[Parameter], stacked: str | None = None) -> Optimizer:
    """The rule applied to weights, which need no data.

    Args:
        update: the rule.
        weights: what it is to change.
        stacked: why weights of several documents or rates are stacked in one tensor, if they are.

    Raises:
        SettingError: if it is none that makes a step from one dense gradient, refuses its settings or these weights, or
            would couple what is stacked.
    """
    try:
        optimizer = update(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, SettingError):
            raise error.under("update") from error
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
    if stacked and type(optimizer).__name__ not in _ELEMENTWISE:
        raise SettingError(
            "update.class_path",
            f"be a rule that treats each weight by itself {stacked}",
            got=type(optimizer).__name__,
            advice=f"choose one of {', '.join(_ELEMENTWISE)}, or data.together: 1 and one rate",
        )
    if not math.isfinite(rate := optimizer.defaults.get("lr", 0.0)):
        raise SettingError("update.lr", "be finite", got=rate)
    if optimizer.defaults.get("differentiable"):
        raise SettingError("update.differentiable", "be false, as weights are changed in place", got="true")
    return optimizer


def is_elementwise(update: Update, model: nn.Module) -> bool:
    """Whether the rule treats each weight by itself, so that documents can be stacked."""
    learned = list(_learned(model).values())
    return type(new_optimizer(update, learned)).__name__ in _ELEMENTWISE


@dataclass
class GradientStatistics:
    """The root mean square of each weight's gradient over segments of a corpus, under the unlearned weights.

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

    def check(self, model: nn.Module) -> None:
        """Raises SettingError where there are neither statistics of this model nor settings to collect them by."""
        if self.segments < 1:
            raise SettingError("update.statistics.segments", "be at least 1", got=self.segments)
        if self.file is not None and Path(self.file).exists():
            self._check_file(self.file, _learned(model))
        elif self.data is None:
            missing = f"{self.file} (no such file)" if self.file else "not given"
            raise SettingError(
                "update.statistics.data",
                "name a corpus to collect gradient statistics from",
                got=f"none, and update.statistics.file is {missing}",
            )
        else:
            self._stream()

    def load_or_collect(self, module: "DynamicEvaluation") -> list[Tensor]:
        """MS of each learned weight, from `file` if it exists, else collected (and saved)."""
        self.check(module.model)
        learned = _learned(module.model)
        if self.file is not None and Path(self.file).exists():
            saved = load_file(self.file)
            return [saved[name].to(weight.device) for name, weight in learned.items()]
        statistics = self.collect(module)
        if self.file is not None:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            draft = f"{self.file}.{os.getpid()}"  # another process may be about to read it
            save_file({name: value.cpu() for name, value in zip(learned, statistics, strict=True)}, draft)
            os.replace(draft, self.file)
        return statistics

    def collect(self, module: "DynamicEvaluation") -> list[Tensor]:
        """MS of each learned weight, read off the corpus now."""
        weights = InPlace(
            module.model, module.context
        )  # the corpus is read document by document, whatever the run does
        learned = weights.learned
        sums = [torch.zeros_like(weight) for weight in learned]
        count = 0
        stream = self._stream()
        try:
            documents = stream.load(module.tokenizer)
        except SettingError as error:
            raise error.under("update.statistics") from error
        for wave in waves(documents, module.context):
            memory = None
            for segment in segments(wave, module.context):
                segment = segment.to(module.device)
                logits, memory = weights.read(segment, memory)
                gradients = torch.autograd.grad(token_nats(logits, segment.targets).mean(), learned, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
                count += 1
                if count == self.segments:
                    return [(total / count).sqrt_() for total in sums]
        if count == 0:
            raise SettingError("update.statistics.data", "hold at least one token", got="none")
        return [(total / count).sqrt_() for total in sums]

    def _stream(self) -> DocumentStream:
        try:
            return DocumentStream(**(self.data or {}))
        except TypeError as error:
            reason = str(error).partition("() ")[2]
            raise SettingError(
                "update.statistics.data", "hold settings as data does", got=f"{self.data}: {reason}"
            ) from error
        except SettingError as error:
            raise error.under("update.statistics") from error

    @staticmethod
    def _check_file(file: str, learned: dict[str, Parameter]) -> None:
        try:
            with safe_open(file, "pt") as saved:
                shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SettingError("update.statistics.file", "be gradient statistics", got=f"{file} ({error})") from error
        if shapes != {name: list(weight.shape) for name, weight in learned.items()}:
            raise SettingError(
                "update.statistics.file",
                f"hold the statistics of the {len(learned)} learned weights of this model",
                got=f"{file} with others",
                advice="delete it to collect them anew",
            )


def _learned(model: nn.Module) -> dict[str, Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class RMSDynamic(Optimizer):
    """Krause's rule: gradients scaled by their usual size, and a pull back to the unlearned weights.

    Formula: Δθ = λ · min(MS / mean(MS), 1/λ) · (θ0 − θ) − η · g / (MS + ε), with η `lr`, λ `decay`, ε `epsilon`, and MS
    the statistics of `GradientStatistics`; mean(MS) is the mean over weight tensors of each tensor's mean. With λ = 0
    nothing pulls. Source: Krause et al. 2018 (arXiv 1709.07432).

    Args:
        params: the learned weights; θ0 is what they are now.
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
        """Sets MS and θ0, a tensor each for every weight, in the order of the parameters.

        Without `initial`, the present weights are θ0.
        """
        mean = torch.stack([value.mean() for value in mean_squares]).mean()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        initial = [weight.detach().clone() for weight in weights] if initial is None else initial
        for weight, value, unlearned in zip(weights, mean_squares, initial, strict=True):
            self.state[weight] = {"initial": unlearned, "mean_square": value, "relative": value / mean}

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
