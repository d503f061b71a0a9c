"""Together: how many documents at once fit into memory, measured on the run's own device.

Two documents of the largest shape are scored and learned from as in the run, then four: the two peaks give the cost of
one more. `together` is how many such costs fit into 90% of the memory that was free before.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import is_elementwise
from dynlight.documents.document import Document
from dynlight.documents.waves import deal
from dynlight.errors import SettingError
from dynlight.learning.module import DynamicEvaluation
from dynlight.recording.memory import begin_peak, free_memory, held_memory, peak_memory
from dynlight.recording.report.text import si
from dynlight.running.run import Run
from dynlight.running.trainer import on_one_device

_MARGIN = 0.1  # fraction of the free memory that stays free, for other shapes, fragments and programs


@dataclass(frozen=True)
class Choice:
    """A number of documents, and why it is that."""

    together: int
    reason: str

    def __str__(self) -> str:
        return f"together {self.together}: {self.reason}"


def choose(make_trial: Callable[[], "Trial"], at_most: int) -> Choice:
    """Chooses how many documents to read together, from the peaks of memory of two and of four.

    Formula: n = ⌊(0.9 · free − p₂) / d⌋ + 2 with d = (p₄ − p₂) / 2, at most `at_most`, the number of documents to read.
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
    """The choice that follows from the peaks of two documents and of four, in bytes."""
    per_document = max((four - two) / 2, 1)
    fit = max(1, int(((1 - _MARGIN) * free - two) // per_document) + 2)
    reason = f"each takes {si(per_document, 'B')} beside {si(max(two - 2 * per_document, 0), 'B')} for all, of {si(free, 'B')} free"
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


def does_not_fit(together: int, make_trial: Callable[[], "Trial"]) -> SettingError:
    """The error where `together` documents ran out of memory, with the largest number that fits."""
    fits = largest_that_fits(make_trial(), together - 1) if together > 1 else 0
    advice = "" if fits else "; choose a smaller context or model, or parameters that are fewer, like LoRA"
    return SettingError(
        "data.together",
        "be as many documents as fit into memory",
        got=together,
        advice=f"the largest that fitted was {fits}{advice}",
    )


class Trial:
    """Measures the memory that it takes to read a number of documents of the largest shape.

    Args:
        run: that is tried; a trial learns from each segment, so that it soon reaches the peak.
        device: the run's.
        processes: how many share this machine's memory.
    """

    def __init__(self, run: Run, device: torch.device, processes: int = 1) -> None:
        self._run = run
        replayed = len(run.choices.objective.replayed(10**6))
        self._document = _longest(run.documents, run.choices.context, replayed)
        self._settings = on_one_device(run.choices.trainer)
        self._settings.logger, self._settings.callbacks = False, None
        self._settings.devices = [device.index] if device.type == "cuda" else 1
        self._device = device
        self._processes = processes
        self._clear()
        # Before the first trial: memory that a trial leaves to the process is used again by the next.
        self._held_before = held_memory(device)

    def __call__(self, together: int) -> int:
        """The peak of the memory that `together` documents take, in bytes."""
        self._clear()
        documents = [replace(self._document, index=i, name=f"document {i}") for i in range(together)]
        module = self._run.module(schedule=_at_each_segment(self._run.choices.schedule))
        module.trigger.learn_always()
        try:
            self._run.read(module, documents, together=together, settings=self._settings)
            return peak_memory(self._device) - self._held_before
        finally:
            del module
            self._clear()

    def free(self) -> int:
        """The bytes that this process may take besides those it holds."""
        free = free_memory(self._device)
        return free if self._device.type == "cuda" else free // self._processes

    def _clear(self) -> None:
        gc.collect()
        begin_peak(self._device)


def most_to_read(documents: Sequence[Document], ranks: int, module: DynamicEvaluation) -> int:
    """The most documents that a process could adapt at once: 1 where learning from one changes another's weights."""
    if module.reset_weights.carries_over or not all(is_elementwise(rule) for rule in module.rules):
        return 1
    return max(1, *(sum(len(document) > 0 for document in dealt) for dealt in deal(documents, ranks)))


def _at_each_segment(schedule: UpdateFrequency) -> UpdateFrequency:
    if schedule.every == "never":
        return schedule
    return UpdateFrequency(1, schedule.passes, schedule.above, schedule.above_mean)


def _longest(documents: Sequence[Document], context: Any, replayed: int) -> Document:
    """The longest document, cut one whole segment after memory, context and replays are full, when costs no longer grow."""
    longest = max(documents, key=len)
    full = (context.memory or 0) + context.context(10**9, 10**9 + context.segment) + (2 + replayed) * context.segment
    tokens, ends = longest.tokens[:full], longest.ends[:full]
    return Document(0, longest.name, longest.text, tokens, ends, longest.prefix)
