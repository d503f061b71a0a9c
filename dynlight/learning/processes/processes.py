"""Processes: how the processes of a run share its work, found out once a run and handed on."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dynlight.learning.processes.board import Board
from dynlight.learning.processes.strategies import DocumentParallel, ModelParallel

# alone: there is one. documents: each adapts documents of its own. in_step: all learn one set of weights, from documents of
# their own. sharded: all read the same documents, each with its shard of one model.
Way = Literal["alone", "documents", "in_step", "sharded"]


@dataclass(frozen=True)
class Processes:
    """How the processes of a run share its work."""

    way: Way
    rank: int  # which share of the documents this process reads
    ranks: int  # how many shares there are
    is_first: bool  # whether it prints, and makes the run's files
    board: Board  # one for all processes of the run

    @property
    def keeps_records(self) -> bool:
        """Whether this process records what it reads; where all read the same documents, only the first does."""
        return self.is_first or self.way != "sharded"


def may_checkpoint(way: Way) -> bool:
    """Whether each process can go on from a checkpoint of its own.

    Checkpoints of weights that all processes learn would have to be of one moment.
    """
    return way in ("alone", "documents")


def way_of(strategy: Any) -> Way:
    """How processes share the work under a strategy of Lightning."""
    if isinstance(strategy, DocumentParallel):
        return "documents"
    if isinstance(strategy, ModelParallel):
        return "sharded"
    return "in_step" if isinstance(strategy, DDPStrategy) else "alone"


def share_of(trainer: Trainer) -> tuple[int, int]:
    """Which share of the documents this process reads, and of how many; known before the processes have met."""
    return (0, 1) if way_of(trainer.strategy) == "sharded" else (trainer.global_rank, trainer.world_size)


def processes_of(trainer: Trainer) -> Processes:
    """How the processes of a Trainer's run share its work; every process must call this, once a run."""
    way, (rank, ranks) = way_of(trainer.strategy), share_of(trainer)
    return Processes(way, rank, ranks, trainer.is_global_zero, _board(trainer, way, rank, ranks))


def _board(trainer: Trainer, way: Way, rank: int, ranks: int) -> Board:
    """The board on which processes tell each other what they did; those that read the same need none."""
    strategy: Any = trainer.strategy
    if way == "documents":
        board: Board = strategy.board
        return board
    if way != "in_step":
        return Board()
    address = strategy.cluster_environment.main_address
    served = TCPStore(address, 0, is_master=True, wait_for_workers=False) if rank == 0 else None  # at a free port
    port = strategy.broadcast(served.port if served is not None else 0)
    store = served or TCPStore(address, port, is_master=False, wait_for_workers=False)
    return Board(PrefixStore("dynlight", store), rank, ranks)
