"""Known: the classes that a section of a configuration may name, asked of the classes, not typed again."""

import sys
import sysconfig


def known_subclasses(base: type) -> list[type]:
    """The subclasses of a class that dynlight's choices or a user's own code have defined by now, not other libraries."""
    direct: list[type] = base.__subclasses__()
    return [kind for kind in [*direct, *(each for one in direct for each in known_subclasses(one))] if _is_known(kind)]


def _is_known(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    if getattr(module, kind.__name__, None) is not kind:  # no YAML could name it
        return False
    if kind.__module__.startswith("dynlight."):
        return kind.__module__.startswith("dynlight.choices.")
    file = getattr(module, "__file__", None) or ""
    return not file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")))
