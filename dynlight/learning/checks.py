"""Checks: what cannot work together, said before a run begins and before weights are loaded."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from dynlight.choices.gradient import Gradient
from dynlight.choices.parameters import blocks_of
from dynlight.choices.reset import ResetWeights
from dynlight.choices.update import NeedsStatistics, Update, is_elementwise, new_optimizer
from dynlight.errors import SettingError, require
from dynlight.learning.processes.compression import CompressedGradients
from dynlight.learning.processes.processes import way_of
from dynlight.learning.statistics import check_statistics


def check_run(
    trainer: Trainer,
    model: nn.Module,
    rules: Sequence[Update],
    gradient: Sequence[Gradient],
    is_mixed: bool,
    reset: ResetWeights,
    together: int | str,
    is_choosy: bool = False,
) -> None:
    """Raises SettingError where a Trainer cannot run these choices, or not with so many documents together.

    Args:
        trainer: of the run.
        model: with `requires_grad` on the weights that learn, which may lie on torch's `meta` device.
        rules: those that learn from each document.
        gradient: what becomes of the gradient before the update.
        is_mixed: whether a mixture predicts.
        reset: when what was learned is forgotten.
        together: how many documents adapt at once; `auto`: as many as fit, but one where they can't adapt together.
        is_choosy: whether it depends on what a segment scored whether it is learned from.
    """
    documents = 1 if isinstance(together, str) else together
    stacked = f"where data.together is {documents}" if documents > 1 else "in a mixture" if is_mixed else None
    check_processes(trainer, reset, bool(rules), is_mixed)
    if way_of(trainer.strategy) == "sharded":
        check_sharded(model, rules, gradient, is_mixed, together)
        must = "learn from every segment that is due with trainer.strategy model_parallel, where each device would ask its score"
        require(not is_choosy, "schedule and objective", must, got="a bound on the score")
    check_precision(trainer.precision)
    check_types(model, trainer.precision)
    check_together(documents, reset)
    check_rules(rules, model, stacked)
    check_gradient(gradient if rules else (), model)


def check_precision(precision: str | int | None) -> None:
    """Raises SettingError unless learned weights and scores would be fp32."""
    if precision not in (None, 32, "32", "32-true", "bf16-mixed"):
        raise SettingError(
            "trainer.precision",
            "be 32-true or bf16-mixed",
            got=precision,
            advice=(
                "learned weights are fp32 and fp16 would need its gradients scaled, so for a smaller model set "
                "model.dtype: bfloat16"
            ),
        )


def check_types(model: nn.Module, precision: str | int | None) -> None:
    """Raises SettingError where learned weights are of another floating-point type than those around them."""
    # Adapters convert what they read; a layer's own weights must be of the same type as the layers around them.
    weights = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    learns = any(weight.requires_grad for weight in weights)
    if learns and precision == "32-true" and len({weight.dtype for weight in weights}) > 1:
        raise SettingError(
            "trainer.precision",
            "be bf16-mixed where some weights learn, in fp32, and others stay in bf16",
            got="32-true",
            advice="or set model.dtype: float32",
        )


def check_together(together: int, reset: ResetWeights) -> None:
    """Raises SettingError where documents would adapt together although one learns on from another."""
    setting = "reset.every never" if reset.every == "never" else "reset.keep above 0"
    require(
        together == 1 or not reset.carries_over,
        "data.together",
        f"be 1 with {setting}, as what is learned from one document is carried on to the next",
        got=together,
    )


def check_rules(rules: Sequence[Update], model: nn.Module, stacked: str | None) -> None:
    """Raises SettingError where a rule cannot learn these weights, or would couple stacked rows."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for rule in rules:
        optimizer = new_optimizer(rule, learned, stacked)
        if isinstance(optimizer, NeedsStatistics):
            check_statistics(optimizer.statistics, model)


def check_gradient(gradient: Sequence[Gradient], model: nn.Module) -> None:
    """Raises SettingError where a change of the gradient needs statistics that nobody can take."""
    for change in gradient:
        if change.statistics is not None:
            learns = [name for name, weight in model.named_parameters() if weight.requires_grad]
            has_adapters = any("lora_" in name for name in learns)
            require(not has_adapters, "gradient.by", "be gradient with adapters, of which half have no gradient before they "
                    "have learned", got="fisher")  # fmt: skip
            check_statistics(change.statistics, model, "gradient.statistics")


def check_processes(trainer: Trainer, reset: ResetWeights, learns: bool, is_mixed: bool) -> None:
    """Raises SettingError where the Trainer's strategy does not suit how, and whether, weights learn."""
    way, strategy = way_of(trainer.strategy), trainer.strategy
    is_alone = trainer.world_size == 1 or way == "sharded" or not learns
    require(is_alone or reset.keep == 0, "trainer.devices", "be 1 with reset.keep above 0, as documents learn on from "
            "each other", got=trainer.world_size)  # fmt: skip
    if learns and reset.carries_over and way == "documents" and trainer.world_size > 1:
        raise SettingError(
            "trainer.strategy",
            "be ddp on several devices with reset.every never",
            got="document_parallel, in which none learns from what another has read",
        )
    if way == "in_step":
        _check_in_step(strategy, reset.carries_over, learns, is_mixed)
    elif way == "alone" and not isinstance(strategy, SingleDeviceStrategy):
        raise SettingError(
            "trainer.strategy",
            "be auto, document_parallel, ddp, or model_parallel for a model larger than one device",
            got=type(strategy).__name__,
        )


def _check_in_step(strategy: Any, carries_over: bool, learns: bool, is_mixed: bool) -> None:
    """Raises SettingError unless all processes can learn one set of weights."""
    name = type(strategy).__name__
    if not (learns and carries_over):
        reason = "would average the gradients of different documents" if learns else "needs gradients to average"
        raise SettingError(
            "trainer.strategy",
            f"be document_parallel with {'reset.every document' if learns else 'update null'}",
            got=f"{name}, which {reason}",
        )
    _check_hook(strategy)
    require(
        not is_mixed,
        "trainer.strategy",
        "be document_parallel or auto with rates or a mixture",
        got=f"{name}, which averages the gradients of one set of weights",
    )


def _check_hook(strategy: Any) -> None:
    if strategy.root_device.type != "cpu":
        return
    if getattr(strategy._ddp_comm_hook, "__name__", "") == "bf16_compress_hook":
        raise SettingError(
            "trainer.strategy.ddp_comm_hook",
            "be fp16_compress_hook, powerSGD_hook or dynlight.compressed_hook on CPU",
            got="bf16_compress_hook, which torch has on CUDA alone",
        )
    module = getattr(strategy._ddp_comm_hook, "__module__", "")
    waits = module in (PowerSGDState.__module__, CompressedGradients.__module__)
    if waits and strategy._ddp_kwargs.get("bucket_cap_mb") is None:
        raise SettingError(
            "trainer.strategy",
            "send all gradients at once with this hook on CPU, where several parts would wait for each other",
            got="no bucket_cap_mb",
            advice="set trainer.strategy.init_args.bucket_cap_mb: 1000",
        )


def check_sharded(
    model: nn.Module, rules: Sequence[Update], gradient: Sequence[Gradient], is_mixed: bool, together: int | str
) -> None:
    """Raises SettingError where these choices need whole weights on one device."""
    require(
        together == 1,
        "data.together",
        "be 1 with trainer.strategy model_parallel, in which all devices adapt one document",
        got=together,
    )
    require(
        not is_mixed,
        "trainer.strategy",
        "be document_parallel or auto with rates or a mixture",
        got="model_parallel, which keeps one set of weights",
    )
    for change in gradient:
        require(
            not change.needs_whole_weights,
            "gradient",
            "be Clip alone with trainer.strategy model_parallel, where no weight is whole",
            got=type(change).__name__,
        )
    for rule in rules:
        optimizer = new_optimizer(rule, [each for each in model.parameters() if each.requires_grad])
        if isinstance(optimizer, NeedsStatistics) or not is_elementwise(rule):
            raise SettingError(
                "update.class_path",
                "be a rule that treats each weight by itself with trainer.strategy model_parallel, where none is whole",
                got=type(optimizer).__name__,
                advice="choose SGD, Adam, AdamW or RMSprop",
            )
    require(
        bool(blocks_of(model)),
        "trainer.strategy",
        "be document_parallel or auto with a model that has no list of blocks",
        got=f"model_parallel with {type(model).__name__}",
    )
