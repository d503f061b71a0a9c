"""Sharded: learned weights of which each of several devices holds a shard, for a model larger than one device.

    trainer: {devices: 8, strategy: model_parallel}

Every device holds a shard of each weight, of θ0 and of the optimizer's state, and reads the same segment at the same
time. The weights of one block at a time are gathered from all devices (torch's FSDP2), used, and let go of; gradients
are cut into the same shards. So the score is that of one device, and so is the time at best: only memory is divided.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dynlight.choices.parameters import blocks_of
from dynlight.documents.segments import Context
from dynlight.learning.digests import sums_of_bits
from dynlight.learning.weights import InPlace, all_finite


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves on each device its shard of every weight; one block after another is moved there whole, then cut."""
    for block in blocks_of(model).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Weights in no block are let go of after the forward, too: else the next forward would not see that they changed.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(weight: Tensor) -> Tensor:
    """A weight as it is, or gathered from its shards; all processes must call this."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Sharded(InPlace):
    """Learned weights in the model itself, each cut into shards, of which this process holds one.

    `learned` and `initial` are these shards as plain tensors: a rule that treats each weight by itself needs no more.
    Only what is of the whole gradient, its norm and whether it is finite, is added up over all processes.
    """

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        super().__init__(model, context, compile)
        self._weights: list[Any] = self.learned  # the model's own, which have the shape of the whole weight
        self.learned = [nn.Parameter(_shard(weight)) for weight in self._weights]  # the same memory
        self.of_rules = [self.learned]
        self.initial = [_shard(initial) for initial in self.initial]

    def gradients(self) -> dict[int, Tensor]:
        self._gradients()
        return super().gradients()

    def norms(self) -> Tensor:
        return _over_all(torch.stack([gradient.square().sum() for gradient in self._gradients()]).sum()).sqrt()[None]

    def finite(self) -> Tensor:
        sums = [gradient.sum() for gradient in self._gradients()]
        return all_finite([_over_all(torch.stack(sums).sum())] if sums else [], 1, self.model.device)

    def drop_gradients(self) -> None:
        for weight in [*self.learned, *self._weights]:
            weight.grad = None

    def _sums_of_bits(self) -> Tensor:
        shards = zip(self.learned, self._weights, strict=True)
        sums = [sums_of_bits(shard.detach().flatten()[None], _start(weight)) for shard, weight in shards]
        return _over_all(torch.cat(sums)) if sums else super()._sums_of_bits()

    @torch.no_grad()
    def _gradients(self) -> list[Tensor]:
        """This process's shards of gradients, moved from the model's weights to the shards in `learned`."""
        for weight, shard in zip(self._weights, self.learned, strict=True):
            assert shard.data_ptr() == _shard(weight).data_ptr(), "what learns is what the model reads with"
            if weight.grad is not None:
                shard.grad, weight.grad = _shard(weight.grad), None
        return [shard.grad for shard in self.learned if shard.grad is not None]

    @torch.no_grad()
    def _exchange(self) -> None:
        # FSDP gathers from memory that it knows, so numbers are exchanged, not storages. Through `.data`, which torch's
        # count of changes leaves out: once they are exchanged back nothing has changed, and the digest relies on that.
        for shard, initial in zip(self.learned, self.initial, strict=True):
            learned = shard.detach().clone()
            shard.data.copy_(initial)
            initial.copy_(learned)


def _over_all(value: Tensor) -> Tensor:
    """The sum of a value over all processes, in place."""
    torch.distributed.all_reduce(value)
    return value


def _shard(weight: Any) -> Tensor:
    """What this process holds of a weight, in the same memory."""
    shard: Tensor = weight.detach().to_local()
    return shard


def _start(weight: Any) -> int:
    """The place in the whole weight of the first number that this process holds.

    Weights are cut along their first dimension into shards of equal size, of which the last may be smaller, or empty.
    """
    rows = -(-len(weight) // weight.device_mesh.size())
    return min(rows * weight.device_mesh.get_local_rank(), len(weight)) * (weight.numel() // len(weight))
