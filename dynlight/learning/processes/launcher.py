"""Launcher: starts the same command once more for each further device of a node; none of these outlives this process."""

import os
import subprocess
import sys
import time
from typing import Any

import torch

from dynlight.learning.processes.board import ProcessFailedError


class Launcher:
    """The processes that this one has started."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []

    def start(self, environment: Any, processes: int, nodes: int) -> None:
        """Starts all processes of this node but the first, which is this one, unless something else starts them.

        Args:
            environment: Lightning's cluster environment, which knows addresses and ranks.
            processes: how many run on this node.
            nodes: how many there are.
        """
        environment.validate_settings(num_devices=processes, num_nodes=nodes)
        _divide_cores(processes)
        if environment.creates_processes_externally:
            return
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(processes * nodes),
        }
        for rank in range(1, processes):
            self._processes.append(subprocess.Popen(_command(), env=os.environ | {"LOCAL_RANK": str(rank)}))

    def check(self) -> None:
        """Raises ProcessFailedError if a process that was started here has ended badly."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll():
                raise ProcessFailedError(f"process {rank} ended with status {process.returncode}")

    def end(self, patience: float) -> None:
        """Waits for the processes that were started here, and kills those that don't end within `patience` seconds."""
        until = time.monotonic() + patience
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _command() -> list[str]:
    """The command that this process was started by."""
    specification = sys.modules["__main__"].__spec__
    program = [os.path.abspath(sys.argv[0])] if specification is None else ["-m", specification.name]
    return [sys.executable, *program, *sys.argv[1:]]


def _divide_cores(processes: int) -> None:
    """Gives each of a node's processes equally many cores, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
