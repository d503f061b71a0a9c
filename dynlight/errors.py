"""Errors: what is wrong with a setting, said in one line in the words of the YAML."""

from pathlib import Path
from traceback import extract_tb
from typing import Any, Self


class SettingError(ValueError):
    """A setting of the user's that cannot be run; any other error is a mistake of ours and keeps its traceback.

    Text: `update.lr must be at least 0, got -1; choose a smaller rate`.

    Args:
        setting: as in the YAML: `update.lr`.
        must: what the setting must do: `be at least 0`.
        got: what was given.
        advice: what the user can do, where that isn't plain.
    """

    def __init__(self, setting: str, must: str, *, got: object, advice: str = "") -> None:
        super().__init__(f"{setting} must {must}, got {got}" + (f"; {advice}" if advice else ""))

    @classmethod
    def worded(cls, text: str) -> Self:
        """The error with a text that is already whole."""
        error = cls.__new__(cls)
        ValueError.__init__(error, text)
        return error

    def under(self, section: str) -> "SettingError":
        """The same error, its setting named within a section: `lr` under `update` is `update.lr`."""
        return SettingError.worded(f"{section}.{self}")

    def __reduce__(self) -> Any:  # pickle would call the constructor with the text alone
        return SettingError.worded, (str(self),)


class CallbackFailedError(Exception):
    """A callback of the user's raised an exception while segments were read; `status` is the exit status."""

    status = 1


def told(where: str, error: BaseException) -> str:
    """What somebody else's code raised, in a line: `Mine.on_train_end: ValueError: no such file (mine.py, line 8)`."""
    place = extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{where}: {type(error).__name__}: {error}".split())
    return f"{text} ({Path(place.filename).name}, line {place.lineno})"


def require(holds: bool, setting: str, must: str, *, got: object, advice: str = "") -> None:
    """Raises SettingError unless the condition holds."""
    if not holds:
        raise SettingError(setting, must, got=got, advice=advice)


def require_at_least(setting: str, least: int, got: Any, because: str = "") -> None:
    """Raises SettingError unless a setting is a whole number of at least `least`; `because` follows in the message."""
    is_whole = isinstance(got, int) and not isinstance(got, bool)
    require(is_whole and got >= least, setting, f"be at least {least}{because}", got=got)
