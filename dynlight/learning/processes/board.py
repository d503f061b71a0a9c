"""Board: where the processes of a run leave word for each other, without one waiting for another.

It is torch's key-value store: process 0 keeps it, the others write into it and read from it. A process that is alone has
a store in memory, so that meters need not ask how many processes there are.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore, Store  # type: ignore[attr-defined]

_FAILED, _ALIVE, _LEFT = "failed", "alive", "left"
_AGE = 1.0  # seconds until others' numbers are read again, and between two looks at whether a process failed
_PAUSE = 0.05  # seconds between two looks while there is nothing else to do


class ProcessFailedError(RuntimeError):
    """Another process failed, so this one stops; `status` is the exit status of both."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Board:
    """Where `ranks` processes tell each other how far they are; this one is number `rank`.

    Args:
        store: the same for all processes; None: one in memory, for a process alone.
        alive: raises ProcessFailedError if a process that this one has started is gone.
        patience: how long a process may give no sign of life while others wait for it.
    """

    def __init__(
        self,
        store: Store | None = None,
        rank: int = 0,
        ranks: int = 1,
        alive: Callable[[], None] = lambda: None,
        patience: timedelta = timedelta(minutes=30),
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self._store = store or HashStore()
        self._alive = alive
        self._patience = patience.total_seconds()
        self._looked = 0.0
        self._others: dict[str, tuple[float, list[float]]] = {}  # when others' numbers were read, and their sums

    def total(self, name: str, numbers: Sequence[float], at_once: bool = False) -> list[float]:
        """Sums of the processes' numbers under `name`: this one's are `numbers`, those of others at most a second old.

        Process 0 alone sees the others; `at_once` is for the last time, when none may be left out.
        """
        when, others = self._others.get(name, (0.0, [0] * len(numbers)))
        if self.ranks > 1 and (at_once or time.monotonic() - when > _AGE):
            self._store.set(f"{name}/{self.rank}", json.dumps(list(numbers)))
            if self.rank == 0:
                written = [key for key in self._keys(name)[1:] if self._store.check([key])]
                columns = zip(*(json.loads(self._store.get(key)) for key in written), strict=True)
                others = [sum(column) for column in columns] or others
            self._others[name] = (time.monotonic(), others)
        return [own + other for own, other in zip(numbers, others, strict=True)]

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values of all processes, which it waits for, in the order of ranks; on all but process 0 an empty list."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        self._wait_for(self._keys(name))
        return [json.loads(self._store.get(key)) for key in self._keys(name)] if self.rank == 0 else []

    def of_first(self, name: str, value: Any) -> Any:
        """The value that process 0 gives under this name; the others wait for it."""
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
        self._wait_for([name])
        return json.loads(self._store.get(name))

    def wait(self, name: str) -> None:
        """Waits until all processes have come here."""
        self._store.set(f"{name}/{self.rank}", "")
        self._wait_for(self._keys(name))

    def look(self) -> None:
        """Gives a sign of life, and raises ProcessFailedError if another process failed; at most once a second."""
        if time.monotonic() - self._looked < _AGE:
            return
        self._looked = time.monotonic()
        try:
            self._store.set(f"{_ALIVE}/{self.rank}", str(self._looked))
            failed = self._store.check([_FAILED]) and json.loads(self._store.get(_FAILED))
        except DistError as error:
            raise ProcessFailedError("process 0 is gone") from error
        if failed:
            raise ProcessFailedError(**failed)
        self._alive()

    def fail(self, message: str, status: int) -> None:
        """Tells all others to stop; only the message of the first that fails counts."""
        with suppress(DistError):  # process 0 may be gone, and then all stop anyway
            self._store.compare_set(_FAILED, "", json.dumps({"message": message, "status": status}))

    def leave(self, patience: float = 20.0) -> None:
        """Leaves the board for good; process 0, which keeps it, waits `patience` seconds at most for the others."""
        until = time.monotonic() + patience
        with suppress(DistError):
            self._store.add(_LEFT, 1)
            while self.rank == 0 and self._store.add(_LEFT, 0) < self.ranks and time.monotonic() < until:
                time.sleep(_PAUSE)

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(self.ranks)]

    def _wait_for(self, keys: list[str]) -> None:
        others = [key for key in self._keys(_ALIVE) if key != f"{_ALIVE}/{self.rank}"]
        signs: dict[str, Any] = dict.fromkeys(others)  # the last sign of life of each
        seen = dict.fromkeys(others, time.monotonic())
        while not self._store.check(keys):
            self.look()
            for other in others:
                sign = self._store.get(other) if self._store.check([other]) else None
                if sign != signs[other]:
                    signs[other], seen[other] = sign, time.monotonic()
                elif time.monotonic() - seen[other] > self._patience:
                    number = other.rpartition("/")[2]
                    raise ProcessFailedError(f"process {number} gave no sign for {self._patience:.0f} s")
            time.sleep(_PAUSE)
