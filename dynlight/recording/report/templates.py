"""Pages from their templates, with the style and the filters that all pages share."""

from pathlib import Path
from typing import Any

import jinja2

from dynlight.recording.report.drawing import BLUE, GREY, INK, ORANGE, RULE, SOFT
from dynlight.recording.report.text import number, one_line, si, visible

COLOURS = {"ink": INK, "soft": SOFT, "grey": GREY, "blue": BLUE, "orange": ORANGE, "rule": RULE}


def rendered(template: Path, **values: Any) -> str:
    """Return a page from its template, which extends `frame.html.jinja`: head, style, and the script that sorts tables.

    Args:
        template: the file; a name that it uses and that is not given is an error.
        values: what it uses, by name.
    """
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, **strict, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(visible=visible, one_line=one_line, number=number, si=si)
    return environment.get_template(template.name).render(colours=COLOURS, **values)
