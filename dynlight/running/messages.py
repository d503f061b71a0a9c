"""Messages: the parser's errors in one line each, in the words of the YAML."""

import difflib
import importlib
import inspect
import pydoc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from torch.optim import Optimizer

from dynlight.choices.gradient import Gradient
from dynlight.choices.known import known_subclasses
from dynlight.choices.memories import DocumentMemory
from dynlight.choices.objective import Objective
from dynlight.choices.parameters import Parameters
from dynlight.documents.segments import Context
from dynlight.errors import SettingError

# A type's name in the parser's messages → what a user would call it.
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
# Sections that name a class.
_BASES: dict[str, type] = {
    "context": Context,
    "parameters": Parameters,
    "objective": Objective,
    "gradient": Gradient,
    "memories": DocumentMemory,
}
_LISTS = ("gradient", "memories")  # of classes
_CLASSES = (*_BASES, "update", "trainer.logger")
# What a few settings may be besides their type.
_EXPECTED = {
    "model.compile": "true, false or reduce-overhead",
    "keep": "adapters, weights, or {what: adapters, at: 64}",
    "schedule.every": "a whole number, a mapping of segments to periods, or never",
    "teacher": "null, or {class_path: Pretrained, init_args: {pretrained: …}}",
    "trainer.callbacks": "a list of Lightning's callbacks, each with its class_path",
    "trainer.precision": "32-true or bf16-mixed",
}


class ConfigFile(ActionConfigFile):
    """`--config X.yaml`: the file's shape is checked before the parser looks at its values.

    The parser itself passes over a section that is a list, and over a file that is empty.
    """

    def __call__(self, parser: ArgumentParser, namespace: Any, values: str, option_string: str | None = None) -> None:
        _check_shape(values, setting_names(parser))
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]


def setting_names(parser: ArgumentParser) -> list[str]:
    """Every setting there is, as `seed` or `data.path`."""
    return [key for key, _ in parser.get_defaults(skip_validation=True).items() if key != "config"]


def one_line(message: str, settings: Iterable[str]) -> str:
    """The parser's message as `setting must be what was expected, got what was got`.

    Args:
        message: the text of an ArgumentError, in which each inner problem follows the one that holds it.
        settings: every setting there is, to say which one may have been meant.
    """
    setting = ""
    for key in re.findall(r'Parser key "([^"]*)"', message):
        if not f".{setting}".endswith(f".{key}"):  # on the command line the whole name stands before its last part
            setting = f"{setting}.{key}".lstrip(".")
    cause = message.rsplit("Parser key", 1)[-1]  # of the innermost setting
    if unknown := re.search(
        r"(?:Group '([^']*)' does not accept option|Option) '([^']*)'|unrecognized arguments: ([^\s=]+)", message
    ):
        group, option, flag = unknown.groups()
        name = ".".join(filter(None, (group or setting, option or flag.lstrip("-"))))
        return _unknown(name, settings, *re.findall(r"class_path[ =]'([^']*)'", cause)[:1])
    if required := re.search(r"arguments? (?:are|is) required: ([^\n]*)|Key \"([^\"]*)\" is required", message):
        names = ", ".join(_join(setting, name.strip().lstrip("-")) for name in (required[1] or required[2]).split(","))
        return f"{names} must be given, got nothing"
    if flag := re.search(r"argument --(\S+): expected one argument", message):
        return f"{flag[1]} must be given a value, got nothing"
    if not setting:
        return _flat(message)
    expected, *rest = re.split(r"(?:Got|Given) value: ", cause, maxsplit=1)
    got = rest[0].split("\n")[0].split(". Got value: ")[0] if rest else "something else"
    if setting in _LISTS and "class_path" not in got and "import path" not in cause:
        return f"{setting} must be a list of classes, each with its class_path, got {_flat(got)}"
    if setting in _CLASSES and not (setting in _LISTS and got.startswith("{")):
        named = re.search(r"class_path'?[:=] ?'([^']*)'", got) or re.search(r"import path string: (\S+)", cause)
        name = named[1] if named else _flat(got)
        return f"{setting}.class_path must be {_classes_of(setting)}, got {name}{_why_not_imported(name)}"
    if wanted := _EXPECTED.get(setting) or _expected(expected):
        named = re.search(r"class_path'?: ?'([^']*)'", got) if setting == "trainer.callbacks" else None
        return f"{setting} must be {wanted}, got {_flat(got)}" + (_why_not_imported(named[1]) if named else "")
    innermost = next(line for line in reversed(cause.splitlines()) if line.strip())
    return f"{setting} must be something else, got {_flat(got)}; the parser says: {_flat(innermost)}"


def _why_not_imported(class_path: str) -> str:
    """The end of a message that says why the module of a class cannot be imported; empty if it can."""
    module = class_path.rpartition(".")[0]
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        return f", whose module cannot be imported: {_flat(str(error))}"
    return ""


def _classes_of(section: str) -> str:
    """The classes that a section may name, as text; those that a user has defined are included."""
    if section == "trainer.logger":
        return "WandbLogger, CSVLogger, TensorBoardLogger, or false"
    if section == "update":
        own = [rule.__name__ for rule in known_subclasses(Optimizer)]
        return ", ".join(["a class of torch.optim", *own, "or null"])
    names = [kind.__name__ for kind in known_subclasses(_BASES[section])]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _check_shape(path: str, settings: list[str]) -> None:
    """Raises SettingError unless the file at `path` is YAML that has sections as a configuration has them."""
    file = Path(path)
    if not file.is_file():
        reason = "it is a folder" if file.is_dir() else "there is no such file"
        raise SettingError("config", "be a YAML file", got=path, advice=reason)
    try:
        sections = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise SettingError(
            "config", "be YAML", got=f"{path}: {_flat(getattr(error, 'problem', str(error)))}{where}"
        ) from error
    if not isinstance(sections, dict) or not sections:
        got = "nothing" if not sections else _flat(repr(sections), 40)
        raise SettingError("config", "hold sections as in --help", got=f"{path} with {got} in it")
    names = {name.split(".")[0] for name in settings}
    grouped = {name.split(".")[0] for name in settings if "." in name}
    for section, value in sections.items():
        if section not in names:
            raise SettingError.worded(_unknown(str(section), sorted(names)))
        if section in grouped - set(_CLASSES) and not isinstance(value, dict | None):
            raise SettingError(section, "hold settings by name", got=_flat(repr(value), 60))
        class_keys = value if section in _CLASSES and isinstance(value, dict) else {}
        if misplaced := [key for key in class_keys if key not in ("class_path", "init_args", "dict_kwargs")]:
            raise SettingError(
                f"{section}.{misplaced[0]}", f"stand under {section}.init_args", got=f"it under {section}"
            )


def _unknown(name: str, settings: Iterable[str], class_path: str | None = None) -> str:
    """The message that `name` is no setting (of a class, if one is given), with the one that may have been meant."""
    section, _, last = name.rpartition(".")
    of = ""
    candidates = {known: known.split(".")[-1] for known in settings if known.rpartition(".")[0] == section}
    if class_path is not None and (named := pydoc.locate(class_path)) and callable(named):
        of = f" of {class_path.rsplit('.', 1)[-1]}"
        candidates = {f"{section}.{argument}": argument for argument in inspect.signature(named).parameters}
    near = difflib.get_close_matches(last, candidates.values(), n=1, cutoff=0.6)
    meant = next((known for known, end in candidates.items() if end in near), None)
    return f"{name} is not a setting{of}; " + (f"did you mean {meant}?" if meant else "see --help and --print_config")


def _expected(cause: str) -> str:
    """What was expected: of each type that the parser tried, a user's word; empty if its message names none."""
    tried: list[str] = []
    for kind, literals in re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing.Literal\[([^\]]*)\])", cause):
        tried += [_TYPES.get(kind, f"a {kind}")] if kind else literals.replace("'", "").split(", ")
    wanted = list(dict.fromkeys(tried))
    return " or ".join(filter(None, (", ".join(wanted[:-1]), *wanted[-1:])))


def _join(setting: str, name: str) -> str:
    return f"{setting}.{name}" if setting and not name.startswith(setting) else name


def _flat(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line[:limit] + ("…" if line[limit:] else "")
