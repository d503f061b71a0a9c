"""Errors: what the command line's parser found, said in one line in the words of the YAML."""

import difflib
import re
from collections.abc import Iterable

# How the parser names a type, and what a user would call it.
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}
_CLASSES = {
    "context": "TransformerXL or Overlapping",
    "parameters": "All, LoRA or Matching",
    "update": "a class of torch.optim, RMSDynamic, or null",
    "trainer.logger": "WandbLogger, CSVLogger, TensorBoardLogger, or false",
}


def one_line(message: str, settings: Iterable[str]) -> str:
    """The parser's message as `setting must be what was expected, got what was got`.

    Args:
        message: the text of an ArgumentError.
        settings: every setting there is, to say which one may have been meant.
    """
    setting = ".".join(re.findall(r'Parser key "([^"]*)"', message))
    if option := re.search(r"(?:Group '([^']*)' does not accept option|Option) '([^']*)'|unrecognized arguments: (.+)", message):
        group, name, flags = option.groups()
        unknown = flags.split()[0].lstrip("-").split("=")[0] if flags else ".".join(filter(None, (group or setting, name)))
        return f"{unknown} is not a setting{_meant(unknown, settings)}"
    if required := re.search(r"arguments? (?:are|is) required: ([^\n]*)|Key \"([^\"]*)\" is required", message):
        names = ", ".join(_join(setting, name.strip().lstrip("-")) for name in (required[1] or required[2]).split(","))
        return f"{names} must be given, got nothing"
    if missing := re.search(r"File does not exist: '([^']*)'", message):
        return f"config must be a YAML file, got {missing[1]}; there is no such file"
    if message.startswith(("Problems parsing config", "Unexpected config")):
        return f"config must be YAML with sections as in --help, got what is not ({_flat(message.split(':', 1)[-1])})"
    if not setting:
        return _flat(message)
    if unknown := re.search(r"dot import path string: (\S+)", message):
        if setting in _CLASSES:
            return f"{setting}.class_path must be {_CLASSES[setting]}, got {unknown[1]}"
    expected = re.search(r"Expected (?:a|an) <class '(\w+)'>", message)
    choices = re.search(r"Expected a typing.Literal\[([^\]]*)\]|one of \{([^}]*)\}|options: \(([^)]*)\)", message)
    got = re.search(r"Got value: ([^\n]*)|Given value: ([^\n]*)", message)
    value = _flat(next(filter(None, got.groups()), "nothing")) if got else "something else"
    if choices:
        wanted = "one of " + next(filter(None, choices.groups())).replace("'", "").replace('"', "")
    elif expected:
        wanted = _TYPES.get(expected[1], _CLASSES.get(setting, f"a {expected[1]}"))
    else:
        wanted = _CLASSES.get(setting, "of another kind")
    return f"{setting} must be {wanted}, got {value}"


def _join(setting: str, name: str) -> str:
    return f"{setting}.{name}" if setting and not name.startswith(setting) else name


def _meant(unknown: str, settings: Iterable[str]) -> str:
    near = difflib.get_close_matches(unknown, list(settings), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; see --help and --print_config"


def _flat(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line[:limit] + ("…" if line[limit:] else "")
