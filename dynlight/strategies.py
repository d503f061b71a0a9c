"""Strategies: several processes, each with its own documents.

`document_parallel` is a strategy of Lightning, chosen by name: `trainer: {strategy: document_parallel, devices: 8}`.
"""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dynlight.board import Board, ProcessFailedError
from dynlight.errors import raised_here

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
        ours = raised_here(exception)
        message = f"{type(exception).__name__}: {exception}; its traceback stands above"
        message = str(ours or f"process {self.global_rank} failed of {message}")
        self.board.fail(" ".join(message.split()), status=1 if ours is None else 2)

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


def register() -> None:
    """Makes `document_parallel` known to Lightning by name."""
    if DocumentParallel.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(DocumentParallel.strategy_name, DocumentParallel, DocumentParallel.__doc__)


def check_strategy(trainer: Trainer, every: str) -> None:
    """Raises ValueError unless what `reset.every` says of learned weights holds with several processes."""
    strategy = trainer.strategy
    if every == "never" and isinstance(strategy, DocumentParallel) and trainer.world_size > 1:
        raise ValueError(
            "trainer.strategy must be ddp on several devices with reset.every never, got document_parallel, in which "
            "none learns from what another has read"
        )
    if not isinstance(strategy, SingleDeviceStrategy | DocumentParallel):
        raise ValueError(
            f"trainer.strategy must be document_parallel with reset.every {every}, got {type(strategy).__name__}, which "
            "would average the gradients of different documents"
        )


def board_of(trainer: Trainer) -> Board:
    """Where the processes of this run tell each other what they did."""
    return trainer.strategy.board if isinstance(trainer.strategy, DocumentParallel) else Board()
