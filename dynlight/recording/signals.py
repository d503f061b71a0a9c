"""Signals: SIGTERM and SIGINT, by which somebody asks a run to stop, and what else stops it between two segments."""

import signal
import threading
from types import FrameType
from typing import Self

_STOP = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):  # no error, and for nobody to take for one: somebody asked for it
    """A signal told the run to stop."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class Signals:
    """Turns SIGTERM and SIGINT into `Interrupted`.

    Where `waits` is set, as while segments are read, the first signal is only noted in `received`, for a checkpoint after
    the present segment. A second one raises at once, as the run can go on from the checkpoint before.
    """

    def __init__(self) -> None:
        self.waits = False
        self.received: BaseException | None = None

    def __enter__(self) -> Self:
        self._before = {signum: signal.getsignal(signum) for signum in _STOP}
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def listen(self) -> None:
        """Takes the signals over; Python lets only the main thread of a process do so."""
        if threading.current_thread() is threading.main_thread():
            for signum in _STOP:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.stop(Interrupted(signum))

    def stop(self, reason: BaseException) -> None:
        """Has the run stop with `reason` after the present segment; at once where it doesn't wait, or was asked before."""
        is_second, self.received = isinstance(self.received, Interrupted), reason
        if is_second or not self.waits:
            raise reason
