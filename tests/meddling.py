"""Callbacks that tests put into one process of several."""

import gc
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.tensor import DTensor


class FailIn(Callback):
    """Fails once, in process `rank` at the segment with this number, and leaves a file that says when."""

    def __init__(self, rank: int, how: Literal["bug", "kill"] = "bug", segment: int = 2) -> None:
        self.rank = rank
        self.how = how
        self.segment = segment

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == self.segment and not Path("failed").exists():
            Path("failed").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a bug in one process")


class StopAt(Callback):
    """Sends this process a signal after a number of segments."""

    def __init__(self, segments: int, signum: int = signal.SIGTERM) -> None:
        self.left, self.signum = segments, signum

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


class StopOnce(Callback):
    """Tells process 0 to stop after as many segments as the file `stop` says, and removes the file."""

    def __init__(self) -> None:
        self.segments = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.segments += 1
        file = Path("stop")
        if trainer.is_global_zero and file.exists() and self.segments == int(file.read_text()):
            file.unlink()
            os.kill(os.getpid(), signal.SIGTERM)


def bf16_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's `bf16_compress_hook`, which DDP takes by name for one that needs CUDA."""
    return bf16_compress_hook(state, bucket)


class CountBytes(Callback):
    """Counts the bytes of gradients given to `all_reduce`, and leaves the sum in a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._sent = 0
        self._all_reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = self._counted

    def _counted(self, tensor: torch.Tensor, *args: Any, **settings: Any) -> Any:
        self._sent += tensor.nbytes if tensor.is_floating_point() else 0
        return self._all_reduce(tensor, *args, **settings)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.distributed.all_reduce = self._all_reduce
        if trainer.is_global_zero:
            Path(self.file).write_text(str(self._sent))


class CountHeld(Callback):
    """Counts the bytes that this process holds of weights, of θ0, and of optimizer state, and leaves them in a file."""

    def __init__(self, folder: str, name: str) -> None:
        self.file = f"{folder}/{name}"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        gc.collect()
        states = [state for each in pl_module.optimizers_of_rules for state in each.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        held = {
            "weights": _bytes(pl_module.model.parameters()),
            "initial": _bytes(pl_module.weights.initial),
            "optimizer": _bytes(tensors),
            "all": _bytes(each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)),
        }
        Path(f"{self.file}.{trainer.global_rank}.{trainer.world_size}.held").write_text(json.dumps(held))


def _bytes(tensors: Iterable[Any]) -> int:
    parts = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    storages = (part.untyped_storage() for part in parts if part.device.type != "meta")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
