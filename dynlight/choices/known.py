"""Known: the classes that a section of a configuration may name, listed by Python itself."""

import sys
import sysconfig


def known_subclasses(base: type) -> list[type]:
    """The subclasses of a class that dynlight's choices or a user's code have defined by now; not those of libraries."""
    direct: list[type] = base.__subclasses__()
    deeper = [kind for parent in direct for kind in known_subclasses(parent)]
    return [kind for kind in [*direct, *deeper] if _is_known(kind)]


def _is_known(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    if getattr(module, kind.__name__, None) is not kind:  # no YAML could name it
        return False
    if kind.__module__.startswith("dynlight."):
        return kind.__module__.startswith("dynlight.choices.")
    file = getattr(module, "__file__", None) or ""
    return not file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")))
