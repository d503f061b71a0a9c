"""Optimizers: the rules that learn, each applied to its weights and ready to update them."""

from collections.abc import Callable, Sequence
from itertools import cycle

from torch import Tensor
from torch.optim import Adagrad, Optimizer

from dynlight.choices.gradient import Gradient
from dynlight.choices.update import GradientStatistics, NeedsStatistics, Update, new_optimizer, scale_rates
from dynlight.learning.weights import Weights


def make_optimizers(
    rules: Sequence[Update],
    weights: Weights,
    gradient: Sequence[Gradient],
    statistics_of: Callable[..., list[Tensor]],
    factors: Sequence[float] | None = None,
) -> list[Optimizer]:
    """The optimizer of each rule, ready to update its weights; the changes of the gradient are made ready too.

    Args:
        rules: those that learn from each document.
        weights: those that the rules change.
        gradient: what becomes of the gradient before.
        statistics_of: MS of each learned weight by GradientStatistics, for what needs to know it; `setting` names these.
        factors: of each learned weight's rate; None: all are 1.

    Raises:
        SettingError: if a rule cannot learn from one gradient an update, or refuses these weights.
    """
    by_corpus: dict[str, list[Tensor]] = {}  # one corpus is read once, whatever the number of rates

    def known(statistics: GradientStatistics, setting: str) -> list[Tensor]:
        if (corpus := repr(statistics)) not in by_corpus:
            by_corpus[corpus] = statistics_of(statistics, setting=setting)
        return by_corpus[corpus]

    for change in gradient:
        if change.statistics is not None:
            change.use_statistics(known(change.statistics, "gradient.statistics"))
    optimizers = []
    for rule, learned in zip(rules, weights.of_rules, strict=False):  # static evaluation has no rules
        optimizer = new_optimizer(rule, learned)
        if isinstance(optimizer, NeedsStatistics):
            times = len(learned) // len(weights.initial)  # a parameter for each document, where rows learn apart
            optimizer.use_statistics(known(optimizer.statistics, "update.statistics") * times, weights.initial * times)
        if factors is not None:
            scale_rates(optimizer, dict(zip(learned, cycle(factors), strict=False)))
        for group in optimizer.param_groups:
            # One fused kernel for all weights, as torch itself chooses on CUDA; on CPU it must be asked.
            if "fused" in group and group["fused"] is None and not group.get("foreach"):
                # Not Adagrad on CUDA: its step counts, made before, lie on the CPU, and torch 2.11 has no such kernel.
                devices = ("cpu",) if isinstance(optimizer, Adagrad) else ("cpu", "cuda")
                group["fused"] = all(weight.device.type in devices for weight in group["params"])
            if not group.get("fused") and group.get("foreach", True) is None:
                group["foreach"] = True
        optimizers.append(optimizer)
    return optimizers
