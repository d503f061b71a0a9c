"""Known: the classes that a section of a configuration may name, asked of the classes, not typed again."""

import sys
import sysconfig


def known_subclasses(base: type) -> list[type]:
    """The subclasses of a class that dynlight's choices or a user's own code have defined by now, not other libraries."""
    found: list[type] = base.__subclasses__()
    return [kind for kind in [*found, *(each for one in found for each in known_subclasses(one))] if _is_known(kind)]


def _is_known(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    is_installed = file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")))
    is_ours = kind.__module__.startswith("dynlight.")
    return kind.__module__.startswith("dynlight.choices.") if is_ours else not is_installed
