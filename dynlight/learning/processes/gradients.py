"""Gradients: which gradients a process learns from: its own, or with `ddp` the average of all processes'."""

import signal
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from dynlight.learning.processes.compression import CompressedGradients


class LearnsTogether(Protocol):
    """What learns from an average of gradients."""

    weights: Any  # their `learned` is the same in all processes

    @property
    def updates_of_segment(self) -> int:
        """How many updates are made from a segment that is learned from."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def learn_from(self, loss: Tensor) -> list[bool]:
        """One update from the gradient of a loss; returns of each row whether its gradient was finite."""


class OwnGradients:
    """Each process learns from its own documents' gradients alone."""

    are_shared = False  # whether other processes learn from them too

    @property
    def bytes_sent(self) -> dict[str, int] | None:
        """Bytes of gradients that this process has sent, and that whole ones would have been; None: they are not counted."""
        return None

    def end_round(self, learner: LearnsTogether) -> None:
        """Ends a round, in which each process has read a segment."""


class GradientAverage(OwnGradients, Callback):
    """With `ddp`: one set of weights, which all processes learn by in step, each from documents of its own.

    Formula: the update is made from Σ_r g_r / n, where g_r is the gradient of the mean nats of the segment that process r
    reads in this round, and n counts the processes that have one, as an update is due and the document has not failed. So
    segments weigh alike, however many processes are at work; a process that has nothing to learn, or has read all its
    documents, adds 0 and makes the same update. A gradient that is not finite spoils the average, and stops the documents
    of all processes that learned in this round.
    """

    are_shared = True

    def __init__(self) -> None:
        self._learners: int | None = None  # n of this round, once it is known
        self._compressed: CompressedGradients | None = None

    @property
    def bytes_sent(self) -> dict[str, int] | None:
        state = self._compressed
        return None if state is None else {"sent": state.bytes_sent, "whole": state.bytes_whole}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)
        # Nothing changes the buffers; DDP would send them in those processes alone that make a backward.
        strategy.model.broadcast_buffers = False
        if isinstance(strategy._ddp_comm_state, CompressedGradients):
            self._compressed = strategy._ddp_comm_state
        hook, wrapper = strategy._ddp_comm_hook, strategy._ddp_comm_wrapper
        if hook is not None and strategy.root_device.type == "cpu":  # where Lightning leaves the hook out
            hook = hook if wrapper is None else wrapper(hook)
            strategy.model.register_comm_hook(strategy._ddp_comm_state, hook)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._learners is None:
            self._learners = _count(pl_module.device, learns=True)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        assert self._learners, "a gradient is there, so one process has something to learn"
        if self._learners < trainer.world_size:  # DDP has divided the gradients by it
            gradients = [weight.grad for weight in pl_module.weights.learned if weight.grad is not None]
            torch._foreach_mul_(gradients, trainer.world_size / self._learners)

    def end_round(self, learner: LearnsTogether) -> None:
        """Makes the updates of a round in which this process has nothing to learn, but another has."""
        if self._learners is None:
            self._learners = _count(learner.device, learns=False)
            for _ in range(learner.updates_of_segment if self._learners else 0):
                learner.learn_from(torch.stack([0.0 * weight.sum() for weight in learner.weights.learned]).sum())
        self._learners = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.strategy.launcher is not None:  # the others would wait for this one's gradients
            trainer.strategy.launcher.kill(signal.SIGKILL)


def _count(device: torch.device, learns: bool) -> int:
    """How many processes have something to learn in this round; every process must call this."""
    count = torch.tensor(int(learns), device=device)
    torch.distributed.all_reduce(count)
    return int(count)


class PowerSGD(PowerSGDState):
    """The state of torch's `powerSGD_hook`, which sends a gradient as two thin matrices, and the error with the next one.

    Source: Vogels et al. 2019 (arXiv 1905.13727).

    Args:
        rank: columns of these matrices; more send more bytes, with less error.
        start: how many updates are sent whole before, at least 2.
    """

    def __init__(self, rank: int = 4, start: int = 2) -> None:
        super().__init__(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
