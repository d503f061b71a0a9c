"""Callbacks and loggers of a user's that raise."""

from typing import Any

import numpy as np
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger


class Raises(Callback):
    """Raises in one hook, while segments are read not before the third call."""

    def __init__(self, hook: str, exits: bool = False) -> None:
        self._left = 2 if "batch" in hook or "backward" in hook else 0
        self._exits = exits
        setattr(self, hook, self._raise)

    def _raise(self, *arguments: Any, **settings: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise SystemExit(0) if self._exits else KeyError("no")


class Remembers(Callback):
    """Has a state that no checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"share": np.float64(0.5)}


class Breaks(Logger):
    """Raises in one method."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method

    def _call(self, method: str) -> None:
        if method == self._method:
            raise RuntimeError("gone")

    @property
    def name(self) -> str:
        return "breaks"

    @property
    def version(self) -> str:
        self._call("version")
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._call("log_metrics")

    def log_hyperparams(self, params: Any, *arguments: Any, **settings: Any) -> None:
        self._call("log_hyperparams")

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        self._call("finalize")
