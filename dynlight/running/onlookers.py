"""Onlookers: callbacks of the user's. What they raise costs no result, and is said in one line.

| raised in | what becomes of the run |
|---|---|
| a hook before the first segment | it is refused, and nothing is left behind |
| a hook while segments are read | it stops, after the present segment if there are checkpoints, and can go on without it |
| a hook after the last segment | it ends as ever |
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from lightning.pytorch import Callback

from dynlight.errors import CallbackFailedError, SettingError, told
from dynlight.recording.sealed import plain
from dynlight.recording.signals import Signals

_BEFORE = {"setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "load_state_dict"}
_AFTER = {"on_train_epoch_end", "on_train_end", "on_fit_end", "teardown", "on_exception"}
_HOOKS = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]


class Onlookers:
    """The user's callbacks, each of whose hooks is watched.

    Args:
        callbacks: of the user's.
        signals: by which a run is stopped after the present segment.
    """

    def __init__(self, callbacks: Sequence[Callback], signals: Signals) -> None:
        self.failures: list[str] = []  # what was raised after the last segment, each in a line
        self._signals = signals
        self._failed: set[int] = set()  # numbers of those that are called no more
        for number, callback in enumerate(callbacks):
            for hook in (*_HOOKS, "state_dict", "load_state_dict"):
                setattr(callback, hook, self._watched(number, callback, hook))

    def _watched(self, number: int, callback: Callback, hook: str) -> Callable[..., Any]:
        call: Callable[..., Any] = getattr(callback, hook)
        nothing: Any = {} if hook == "state_dict" else None

        @wraps(call)
        def watched(*arguments: Any, **settings: Any) -> Any:
            if number in self._failed:
                return nothing
            try:
                result = call(*arguments, **settings)
                return plain(result) if hook == "state_dict" else result
            except SettingError:
                raise
            except (Exception, SystemExit, GeneratorExit) as error:  # whoever calls `sys.exit` stops the run, too
                self._failed.add(number)
                self._take(hook, told(f"{type(callback).__name__}.{hook}", error), error)
                return nothing

        return watched

    def _take(self, hook: str, line: str, error: BaseException) -> None:
        if hook in _BEFORE:
            raise SettingError("trainer.callbacks", "be what can run here", got=line) from error
        if hook in _AFTER:
            self.failures.append(f"trainer.callbacks must not raise, got {line}; all results are there")
        elif self._signals.received is None or not self._signals.waits:  # else the run stops in a moment
            advice = "leave it out (--trainer.callbacks null)"
            self._signals.stop(CallbackFailedError(f"trainer.callbacks must not raise, got {line}; {advice}"))
