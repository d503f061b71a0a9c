"""Clock: how long each part of a step takes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds of each part of a step, by name, as its device takes them; it never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timed: list[tuple[str, Any, Any]] = []  # parts, each with its begin and end

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times the block."""
        began = self._now()
        yield
        self._timed.append((part, began, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds since the last call; what the device has not done yet, a segment's last update, counts for the next."""
        timed, self._timed = self._timed, []
        seconds: dict[str, float] = defaultdict(float)
        for part, began, ended in timed:
            if self._device.type != "cuda":
                seconds[part] += ended - began
            elif ended.query():
                seconds[part] += began.elapsed_time(ended) / 1000
            else:
                self._timed.append((part, began, ended))
        return dict(seconds)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
