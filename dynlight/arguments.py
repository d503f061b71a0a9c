"""Arguments: what a command line says to a command itself, apart from what describes a run."""

import sys
from collections.abc import Collection, Sequence

from dynlight.errors import require


def asks_for_help(arguments: Collection[str]) -> bool:
    """Whether a command is to print its help: where it is asked to, or for nothing."""
    return not arguments or bool({"-h", "--help"} & set(arguments))


def refused(error: Exception) -> int:
    """Says in a line on stderr why a command couldn't be run; returns its exit status."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def own_options(
    arguments: Sequence[str], values: Collection[str], flags: Collection[str] = (), may_be_empty: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """The options of a command by name, and the arguments that are left, in their order.

    >>> own_options(["a", "--out", "x", "--force", "--lr=1"], values=["out"], flags=["force"])
    ({'out': 'x', 'force': ''}, ['a', '--lr=1'])

    Args:
        arguments: of the command line.
        values: names of options that have a value: `--name value` or `--name=value`.
        flags: names of those that have none.
        may_be_empty: names of those whose value may be an empty text.

    Raises:
        SettingError: if one is given twice, or lacks its value.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        is_flag = name in flags and not equals
        if not argument.startswith("--") or not (is_flag or name in values):
            rest.append(argument)
            continue
        require(name not in options, name, "be given once", got="it twice")
        options[name] = "" if is_flag else value if equals else next(waiting, "")
        require(is_flag or options[name] != "" or name in may_be_empty, name, "be given a value", got="nothing")
    return options, rest


def refuse_others(arguments: Sequence[str], names: Collection[str]) -> None:
    """Raises SettingError where anything is left that looks like an option."""
    for argument in arguments:
        must = f"be one of {', '.join(f'--{name}' for name in names)}"
        require(not argument.startswith("-"), "an option", must, got=argument, advice="see --help")


def number_of(
    options: dict[str, str], name: str, usual: float, least: float, most: float, whole: bool = False
) -> float:
    """An option that is a number, or what it is without one; from `least` to `most`.

    Raises:
        SettingError: if it is none.
    """
    if name not in options:
        return usual
    must = f"be a {'whole ' * whole}number from {least:g} to {most:g}"
    try:
        value = int(options[name]) if whole else float(options[name])
    except ValueError:
        value = float("nan")
    require(least <= value <= most, name, must, got=options[name])
    return value
