"""Strategies: several processes, each with its own documents, or with its part of one model.

trainer.strategy    learned weights                     goes with
document_parallel   each process adapts its own         reset.every document
ddp                 one set, which all learn in step    reset.every never
model_parallel      one set, a part of it in each       data.together 1
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from dynlight.errors import SettingError
from dynlight.learning.processes.board import Board, ProcessFailedError

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation

_PATIENCE = 10.0  # seconds that a process has to end by itself where another failed


class DocumentParallel(DDPStrategy):
    """Each process adapts its own documents: no gradient is averaged, and none waits for another before the end.

    Nothing is exchanged but words on a board (how far each is, that one failed, that all are done), so there is no
    process group, no backend, and no time limit between the first to be done and the last. One that fails ends all.

    Args:
        settings: as of Lightning's DDPStrategy; `timeout` is how long a process may give no sign of life.
    """

    strategy_name = "document_parallel"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.board = Board()
        self._barriers = 0

    def setup_distributed(self) -> None:
        """Finds the board; Lightning calls this first in each process."""
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None and self._timeout is not None
        store: Store = TCPStore(
            self.cluster_environment.main_address,
            self.cluster_environment.main_port,
            is_master=self.is_global_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=self._timeout,
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store through all of them
        store = PrefixStore(f"dynlight/{attempt}", store)
        started = self._launcher.check if isinstance(self._launcher, _Launcher) else lambda: None
        self.board = Board(store, self.global_rank, self.world_size, started, self._timeout)

    def configure_ddp(self) -> None:
        """Leaves the module as it is: its gradients are its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.board.look()
        return super().training_step(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._barriers += 1
        self.board.wait(f"barrier {self._barriers}")

    def on_exception(self, exception: BaseException) -> None:
        message = f"{type(exception).__name__}: {exception}; its traceback stands above"
        is_ours = isinstance(exception, SettingError)
        message = str(exception) if is_ours else f"process {self.global_rank} failed of {message}"
        self.board.fail(" ".join(message.split()), status=2 if is_ours else 1)

    def teardown(self) -> None:
        self.board.leave(_PATIENCE)
        if isinstance(self._launcher, _Launcher):
            self._launcher.end()
        super().teardown()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            assert self.cluster_environment is not None
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class _Launcher(_SubprocessScriptLauncher):
    """Starts the same command once more for each further device of this node; none of these outlives this process.

    Lightning's own kills this process too as soon as another ends badly, before it can say why.
    """

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def check(self) -> None:
        """Raises ProcessFailedError if a process that was started here has ended badly."""
        for process in self.procs:
            if process.poll():
                raise ProcessFailedError(
                    f"process {1 + self.procs.index(process)} ended with status {process.returncode}"
                )

    def end(self) -> None:
        """Waits for the processes that were started here, and kills what doesn't end."""
        until = time.monotonic() + _PATIENCE
        for process in self.procs:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


class ModelParallel(ModelParallelStrategy):
    """All devices adapt the same document, each with its part of every weight (`sharded.py`).

    Args:
        settings: `timeout` and `process_group_backend` of Lightning's ModelParallelStrategy.
    """

    strategy_name = "model_parallel"

    def __init__(self, **settings: Any) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def on_exception(self, exception: BaseException) -> None:
        if self.launcher is not None:  # the others would wait for this one's part
            self.launcher.kill(signal.SIGKILL)


def register() -> None:
    """Makes `document_parallel` and `model_parallel` known to Lightning by name."""
    for strategy in (DocumentParallel, ModelParallel):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(strategy.strategy_name, strategy, strategy.__doc__)


class GradientAverage(Callback):
    """With `ddp`: one set of weights, which all processes learn by in step, each from documents of its own.

    Formula: of the gradients g_r of the segments that the processes read at the same time, each of a mean over its
    segment's tokens, the update is made from Σ_r g_r / n, where n counts those processes that have one: an update due at
    its place in its document, which has not failed. So segments weigh alike, however many processes are at work; a process
    that has nothing to learn, or has read all its documents, adds 0 and makes the same update. A gradient that is not
    finite spoils the average, and stops the documents of all that learned in that round.
    """

    def __init__(self) -> None:
        self._learners: int | None = None  # n of this round, once it is known

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)
        # Buffers are tables that nothing changes; DDP would send them where a backward was made, not everywhere.
        strategy.model.broadcast_buffers = False
        if strategy.root_device.type == "cpu":  # where Lightning leaves the hook out
            hook = strategy._ddp_comm_hook, strategy._ddp_comm_wrapper
            _register_ddp_comm_hook(strategy.model, strategy._ddp_comm_state, *hook)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", batch: Any, batch_idx: int
    ) -> None:
        self._learners = None

    def on_before_backward(self, trainer: Trainer, pl_module: "DynamicEvaluation", loss: Tensor) -> None:
        if self._learners is None:
            self._learners = self._count(pl_module, learns=True)

    def on_after_backward(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        assert self._learners, "a gradient is there, so one process has something to learn"
        if self._learners < trainer.world_size:  # by which the gradients have been divided
            gradients = [weight.grad for weight in pl_module.weights.learned if weight.grad is not None]
            torch._foreach_mul_(gradients, trainer.world_size / self._learners)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._learners is None:
            self._learners = self._count(pl_module, learns=False)
            if self._learners:
                self._follow(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: "DynamicEvaluation", exception: BaseException) -> None:
        if trainer.strategy.launcher is not None:  # the others would wait for this one's gradients
            trainer.strategy.launcher.kill(signal.SIGKILL)

    @staticmethod
    def _count(pl_module: "DynamicEvaluation", learns: bool) -> int:
        count = torch.tensor(int(learns), device=pl_module.device)
        torch.distributed.all_reduce(count)
        return int(count)

    @staticmethod
    def _follow(pl_module: "DynamicEvaluation") -> None:
        """Makes the updates of a round in which this process has nothing to learn."""
        for _ in range(pl_module.schedule.passes):
            pl_module.learn_from(torch.stack([0.0 * weight.sum() for weight in pl_module.weights.learned]).sum())


class PowerSGD(PowerSGDState):
    """What torch's `powerSGD_hook` keeps: gradients are sent as products of two thin matrices, their error next time.

    Source: Vogels et al. 2019 (arXiv 1905.13727).

    Args:
        rank: columns of these matrices; more send more bytes, with less error.
        start: updates that are sent whole before, at least 2.
    """

    def __init__(self, rank: int = 4, start: int = 2) -> None:
        super().__init__(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=start)


def check_strategy(trainer: Trainer, every: str, learns: bool) -> None:
    """Raises SettingError unless what `reset.every` says of learned weights holds with several processes."""
    strategy = trainer.strategy
    if learns and every == "never" and isinstance(strategy, DocumentParallel) and trainer.world_size > 1:
        raise SettingError(
            "trainer.strategy",
            "be ddp on several devices with reset.every never",
            got="document_parallel, in which none learns from what another has read",
        )
    if learns_in_step(trainer) and learns and every == "never":
        _check_hook(strategy)
        return
    if isinstance(strategy, SingleDeviceStrategy | DocumentParallel | ModelParallel):
        return
    if not isinstance(strategy, DDPStrategy):
        raise SettingError(
            "trainer.strategy",
            "be auto, document_parallel, ddp, or model_parallel for a model larger than one device",
            got=type(strategy).__name__,
        )
    reason = "would average the gradients of different documents" if learns else "needs gradients to average"
    raise SettingError(
        "trainer.strategy",
        f"be document_parallel with {f'reset.every {every}' if learns else 'update null'}",
        got=f"{type(strategy).__name__}, which {reason}",
    )


def _check_hook(strategy: Any) -> None:
    if strategy.root_device.type != "cpu":
        return
    if getattr(strategy._ddp_comm_hook, "__name__", "") == "bf16_compress_hook":
        raise SettingError(
            "trainer.strategy.ddp_comm_hook",
            "be fp16_compress_hook or powerSGD_hook on CPU",
            got="bf16_compress_hook, which torch has on CUDA alone",
        )
    waits = getattr(strategy._ddp_comm_hook, "__module__", "") == PowerSGDState.__module__
    if waits and strategy._ddp_kwargs.get("bucket_cap_mb") is None:
        raise SettingError(
            "trainer.strategy",
            "send all gradients at once with PowerSGD on CPU, where several parts would wait for each other",
            got="no bucket_cap_mb",
            advice="set trainer.strategy.init_args.bucket_cap_mb: 1000",
        )


def learns_in_step(trainer: Trainer) -> bool:
    """Whether all processes learn one set of weights, from documents of their own."""
    return isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, DocumentParallel)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights lie in parts on all devices, which read the same documents."""
    return isinstance(trainer.strategy, ModelParallel)


def share_of(trainer: Trainer) -> tuple[int, int]:
    """Which share of the documents this process reads, and of how many."""
    return (0, 1) if is_sharded(trainer) else (trainer.global_rank, trainer.world_size)


def keeps_records(trainer: Trainer) -> bool:
    """Whether this process writes down what it read; where all read the same, the first does."""
    return trainer.is_global_zero or not is_sharded(trainer)


def board_of(trainer: Trainer) -> Board:
    """A board on which the processes of this run tell each other what they did; all are to ask for it.

    Those that read the same have nothing to tell, so each has one to itself.
    """
    if isinstance(trainer.strategy, DocumentParallel):
        return trainer.strategy.board
    if learns_in_step(trainer):
        apart = trainer.strategy.broadcast(os.urandom(8).hex())  # from what was told on another
        store = PrefixStore(f"dynlight/{apart}", _get_default_store())
        return Board(store, trainer.global_rank, trainer.world_size)
    return Board()
