"""Together: how many documents at once fit into memory, measured on the run's own device.

Two documents of the largest shape are scored and learned from as in the run, then four; each further one takes as much
again. What has been free before, but for a margin, is divided by that.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import is_elementwise
from dynlight.documents.document import Document, DocumentStream
from dynlight.documents.waves import deal
from dynlight.errors import SettingError
from dynlight.learning.module import DynamicEvaluation
from dynlight.recording.report.text import si

_MARGIN = 0.1  # share of what is free that is left so: other shapes, fragments, other programs


@dataclass(frozen=True)
class Choice:
    """A number of documents, and why it is that."""

    together: int
    reason: str

    def __str__(self) -> str:
        return f"together {self.together}: {self.reason}"


def choose(make_trial: Callable[[], "Trial"], at_most: int) -> Choice:
    """The most documents that fit into what is free but for a margin, from the peaks of two and of four.

    Formula: n = ⌊(0.9 · free − p₂) / d⌋ + 2 with d = (p₄ − p₂) / 2, and no more than `at_most`, which there are to read.
    """
    if at_most == 1:
        return Choice(1, "there is one document to read at a time")
    trial = make_trial()
    free, peaks = trial.free(), []
    try:
        for together in (2, 4):
            peaks.append(trial(together))
    except torch.OutOfMemoryError:
        return Choice(min(2 * len(peaks) or 1, at_most), f"more did not fit into {si(free, 'B')}")
    return extrapolate(peaks[0], peaks[1], free, at_most)


def extrapolate(two: int, four: int, free: int, at_most: int) -> Choice:
    """The number that follows from the peaks of two documents and of four, in bytes."""
    each = max((four - two) / 2, 1)
    fit = max(1, int(((1 - _MARGIN) * free - two) // each) + 2)
    reason = f"each takes {si(each, 'B')} beside {si(max(two - 2 * each, 0), 'B')} for all, of {si(free, 'B')} free"
    return Choice(min(fit, at_most), reason + (f", and there are {at_most} to read" if fit >= at_most else ""))


def largest_that_fits(trial: Callable[[int], int], at_most: int) -> int:
    """The largest power of two, up to `at_most`, of documents that are read without running out of memory; 0 if none."""
    fits = 0
    for exponent in range(at_most.bit_length()):
        try:
            trial(2**exponent)
        except torch.OutOfMemoryError:
            break
        fits = 2**exponent
    return fits


def does_not_fit(together: int, make_trial: Callable[[], "Trial"]) -> ValueError:
    """What to say where so many documents ran out of memory."""
    fits = largest_that_fits(make_trial(), together - 1) if together > 1 else 0
    advice = "" if fits else "; choose a smaller context or model, or parameters that are fewer, like LoRA"
    return SettingError(
        "data.together",
        "be as many documents as fit into memory",
        got=together,
        advice=f"the largest that fitted was {fits}{advice}",
    )


class Trial:
    """Reads so many documents of the largest shape, and measures the memory that it takes.

    Args:
        load: loads the model, anew for each trial.
        choices: of DynamicEvaluation.
        documents: those of the run.
        make_trainer: makes a Trainer of one device that shows and logs nothing.
        device: the run's.
        processes: how many share this machine's memory.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        choices: dict[str, Any],
        documents: Sequence[Document],
        make_trainer: Callable[[], Trainer],
        device: torch.device,
        processes: int = 1,
    ) -> None:
        self._load = load
        self._choices = choices | {"schedule": _at_each_segment(choices["schedule"])}
        self._document = _longest(documents, choices["context"])
        self._make_trainer = make_trainer
        self._device = device
        self._processes = processes
        self._clear()
        self._held = _held(device)  # before the first trial: what one leaves to the process the next one uses again

    def __call__(self, together: int) -> int:
        """Peak of the memory that `together` documents take, in bytes."""
        self._clear()
        stream = DocumentStream.from_texts(["unused"], together=together)
        stream.loaded = [replace(self._document, index=i, name=f"document {i}") for i in range(together)]
        module = DynamicEvaluation(self._load(), None, **copy.deepcopy(self._choices))
        try:
            self._make_trainer().fit(module, stream)
            return _peak(self._device) - self._held
        finally:
            del module, stream
            self._clear()

    def free(self) -> int:
        """Bytes that this process may take besides what it holds."""
        if self._device.type == "cuda":
            unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return torch.cuda.mem_get_info(self._device)[0] + unused
        return _available() // self._processes

    def _clear(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew


def most_to_read(documents: Sequence[Document], ranks: int, module: DynamicEvaluation) -> int:
    """The most documents that a process could adapt at once: 1 where what is learned from one would touch another."""
    if module.reset_choice.every == "never" or not all(is_elementwise(rule, module.model) for rule in module.updates):
        return 1
    return max(1, *(sum(len(document) > 0 for document in share) for share in deal(documents, ranks)))


def _at_each_segment(schedule: UpdateFrequency) -> UpdateFrequency:
    return schedule if schedule.every == "never" else UpdateFrequency(1, schedule.passes)


def _longest(documents: Sequence[Document], context: Any) -> Document:
    """The longest document, cut where memory and context are full and another whole segment has been read."""
    longest = max(documents, key=len)
    full = (context.memory or 0) + context.context(10**9, 10**9 + context.segment) + 2 * context.segment
    tokens, ends = longest.tokens[:full], longest.ends[:full]
    return Document(0, longest.name, longest.text, tokens, ends, longest.prefix)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(entry: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


def _available() -> int:
    """Bytes that this machine, or the container that it is seen from, has left."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    available = 1024 * int(line.split()[1])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return max(available, 0)
