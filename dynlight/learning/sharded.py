"""Sharded: learned weights that lie in parts on several devices, for a model that is larger than one of them.

    trainer: {devices: 8, strategy: model_parallel}

Every device holds its part of each weight, of θ0 and of the optimizer's state, and reads the same segment at the same
time. The weights of one block at a time are gathered from all (torch's FSDP2), used, and let go of; then gradients are
cut into the same parts. So the score is that of one device, and so is the time at best: memory is what is shared.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dynlight.choices.context import Context
from dynlight.choices.update import RMSDynamic, is_elementwise, new_optimizer
from dynlight.errors import SettingError
from dynlight.learning.weights import InPlace

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves on each device its part of every weight; of one block after another all of it is moved there before."""
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # What is in no block, too, is let go of after the forward: else what changes before the next would not be seen.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def check_sharded(module: "DynamicEvaluation", together: int | str) -> None:
    """Raises SettingError where these choices need whole weights on one device; a model without data is enough."""
    if together != 1:
        raise SettingError(
            "data.together",
            "be 1 with trainer.strategy model_parallel, in which all devices adapt one document",
            got=together,
        )
    if module.mixture is not None:
        raise SettingError(
            "trainer.strategy",
            "be document_parallel or auto with rates or a mixture",
            got="model_parallel, which keeps one set of weights",
        )
    for rule in module.updates:
        kind = type(new_optimizer(rule, [each for each in module.model.parameters() if each.requires_grad]))
        if kind is RMSDynamic or not is_elementwise(rule, module.model):
            raise SettingError(
                "update.class_path",
                (
                    "be a rule that treats each weight by itself with trainer.strategy model_parallel, where none is "
                    "whole"
                ),
                got=kind.__name__,
                advice="choose SGD, Adam, AdamW or RMSprop",
            )
    if not _blocks(module.model):
        raise SettingError(
            "trainer.strategy",
            "be document_parallel or auto with a model of which transformers doesn't name the blocks",
            got=f"model_parallel with {type(module.model).__name__}",
        )
    if module.model._compiled_call_impl is not None:
        raise SettingError("model.compile", "be false with trainer.strategy model_parallel", got="true")


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def whole(weight: Tensor) -> Tensor:
    """A weight as it is, or gathered from its parts; all processes are to ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Sharded(InPlace):
    """Learned weights in the model itself, of which this process holds a part of each.

    `learned` and `initial` are these parts as plain tensors: a rule that treats each weight by itself needs no more.
    Only numbers that are of the whole gradient, its norm and whether it is finite, are added up over all processes.
    """

    def __init__(self, model: PreTrainedModel, context: Context) -> None:
        super().__init__(model, context)
        self._weights: list[Any] = self.learned  # as the model knows them: of the whole's shape
        self.learned = [nn.Parameter(_part(weight)) for weight in self._weights]  # the same memory
        self.experts = [self.learned]
        self.initial = [_part(initial) for initial in self.initial]
        self.starts = [_start(weight) for weight in self._weights]  # of each part, its place in the whole weight

    def over_all(self, value: Tensor) -> Tensor:
        """The sum of what each process has."""
        torch.distributed.all_reduce(value)
        return value

    def clip_gradients(self, norm: float) -> None:
        """Scales the document's gradient g to at most `norm`: g ← g · min(1, norm / ‖g‖₂)."""
        gradients = self._gradients()
        squares = self.over_all(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
        torch._foreach_mul_(gradients, (norm / (squares.sqrt() + 1e-6)).clamp(max=1.0))

    def step(self, optimizers: Sequence[Optimizer]) -> list[bool]:
        """One update from the gradients of the last backward, which are then forgotten.

        Returns whether the gradient was finite, in all its parts; if not, nothing is learned from it.
        """
        gradients = self._gradients()
        sums = [gradient.sum() for gradient in gradients]
        is_finite = bool(self.over_all(torch.stack(sums).sum()).isfinite()) if sums else True
        for optimizer in optimizers if is_finite else ():
            optimizer.step()
        for part in self.learned:
            part.grad = None
        return [is_finite]

    @torch.no_grad()
    def _gradients(self) -> list[Tensor]:
        """This process's part of each gradient, from now on beside the part that it is to change."""
        for weight, part in zip(self._weights, self.learned, strict=True):
            assert part.data_ptr() == _part(weight).data_ptr(), "what learns is what the model reads with"
            if weight.grad is not None:
                part.grad, weight.grad = _part(weight.grad), None
        return [part.grad for part in self.learned if part.grad is not None]

    @torch.no_grad()
    def _exchange(self) -> None:
        # FSDP gathers from the memory that it knows, so what is in it is exchanged, weight by weight. Through `.data`,
        # as nothing is changed once it is exchanged back, and the receipt relies on torch's count of changes.
        for part, initial in zip(self.learned, self.initial, strict=True):
            learned = part.detach().clone()
            part.data.copy_(initial)
            initial.copy_(learned)


def _part(weight: Any) -> Tensor:
    """What this process holds of a weight, in the same memory."""
    part: Tensor = weight.detach().to_local()
    return part


def _start(weight: Any) -> int:
    """Which of the whole weight's numbers is the first that this process holds.

    Weights are cut along their first dimension into parts of equal size, of which the last may be smaller, or empty.
    """
    rows = -(-len(weight) // weight.device_mesh.size())
    return min(rows * weight.device_mesh.get_local_rank(), len(weight)) * (weight.numel() // len(weight))
