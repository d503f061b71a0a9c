"""Memory of the machine: how much a process and its device hold, have held at most, and have left."""

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """The most memory held at a time, in bytes: the device's on CUDA, else the process's since its program began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux `getrusage` may give the peak of the parent process, which outlives the change of program.
    if _STATUS.exists():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory(device: torch.device) -> int:
    """The memory held now, in bytes: the device's on CUDA, else the process's."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: on CUDA of the device, else of this machine, or the container it is seen from."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return max(available, 0)


def begin_peak(device: torch.device) -> None:
    """Makes `peak_memory` count anew from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of resident memory


def _status(entry: str) -> int:
    return _kilobytes(_STATUS, entry)


def _kilobytes(file: Path, entry: str) -> int:
    """In bytes, an entry of a Linux file that counts kilobytes."""
    match = re.search(rf"^{entry}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    assert match is not None, f"{file} has {entry} on Linux"
    return 1024 * int(match[1])
