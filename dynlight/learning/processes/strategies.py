"""Strategies: several processes, each with its own documents, or with its shard of one model.

trainer.strategy    learned weights                     goes with
document_parallel   each process adapts its own         reset.every document
ddp                 one set, which all learn in step    reset.every never
model_parallel      one set, a shard of it in each      data.together 1
"""

import os
import signal
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dynlight.errors import CallbackFailedError, SettingError
from dynlight.learning.processes.board import Board
from dynlight.learning.processes.launcher import Launcher

_PATIENCE = 10.0  # seconds that a process has to end by itself where another failed


class DocumentParallel(DDPStrategy):
    """Each process adapts its own documents: no gradient is averaged, and no process waits for another before the end.

    Nothing is exchanged but words on a board (how far each is, that one failed, that all are done), so there is no
    process group, no backend, and no time limit between the first to be done and the last. A process that fails ends all.

    Args:
        timeout: how long a process may give no sign of life.
        settings: those of Lightning's DDPStrategy.
    """

    strategy_name = "document_parallel"
    launcher = None  # Lightning's would kill this process as soon as another ends badly, before it can say why

    def __init__(self, timeout: timedelta = timedelta(minutes=30), **settings: Any) -> None:
        super().__init__(**settings)
        self.board = Board()
        self._processes = Launcher()
        self._most_silent = timeout
        self._barriers = 0

    def setup_environment(self) -> None:
        """Starts the other processes of this node, unless something else does."""
        assert self.cluster_environment is not None, "Lightning has found it"
        self._processes.start(self.cluster_environment, self.num_processes, self.num_nodes)
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Finds the board; Lightning calls this first in each process."""
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None, "Lightning has found it"
        store: Store = TCPStore(
            self.cluster_environment.main_address,
            self.cluster_environment.main_port,
            is_master=self.is_global_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=self._most_silent,
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store through all attempts
        store = PrefixStore(f"dynlight/{attempt}", store)
        self.board = Board(store, self.global_rank, self.world_size, self._processes.check, self._most_silent)

    def configure_ddp(self) -> None:
        """Leaves the module as it is: no gradients are averaged."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.board.look()
        return super().training_step(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._barriers += 1
        self.board.wait(f"barrier {self._barriers}")

    def on_exception(self, exception: BaseException) -> None:
        message = f"{type(exception).__name__}: {exception}; its traceback stands above"
        is_told = isinstance(exception, SettingError | CallbackFailedError)
        message = str(exception) if is_told else f"process {self.global_rank} failed of {message}"
        self.board.fail(" ".join(message.split()), status=2 if isinstance(exception, SettingError) else 1)

    def teardown(self) -> None:
        self.board.leave(_PATIENCE)
        self._processes.end(_PATIENCE)
        super().teardown()


class ModelParallel(ModelParallelStrategy):
    """All devices adapt the same document, each with its shard of every weight (`sharded.py`).

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
        if self.launcher is not None:  # the others would wait for this one's shard
            self.launcher.kill(signal.SIGKILL)


def register() -> None:
    """Makes `document_parallel` and `model_parallel` known to Lightning by name."""
    for strategy in (DocumentParallel, ModelParallel):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(strategy.strategy_name, strategy, strategy.__doc__)
