"""How names and numbers are written for a reader, on the page and in a terminal."""

import math
import unicodedata
from typing import Any

import pandas as pd

# Control characters, halves of surrogate pairs, and what turns the direction of the text around it are shown as signs.
_SIGNS = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"}
for _first, _last in ((0x7F, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF)):
    _SIGNS |= dict.fromkeys(range(_first, _last + 1), 0xFFFD)


def visible(text: str) -> str:
    """Replace the characters that would change how a page or a terminal shows the text beside them."""
    return text.translate(_SIGNS)


def one_line(text: str) -> str:
    """Make a name fit for a cell of a table: visible characters, single blanks, no line ends."""
    return " ".join(visible(text).split())


def number(value: Any, digits: int = 3) -> str:
    """Write a number with its thousands apart, a huge one in three figures, or a dash for None and NaN.

    >>> [number(-1234.5), number(1234, 0), number(12345678), number(-0.0001), number(None)]
    ['−1,234.500', '1,234', '1.23e+07', '0.000', '–']
    """
    if value is None or pd.isna(value):
        return "–"
    written = f"{value:.3g}" if abs(value) >= 1e7 else f"{value:,.{digits}f}"
    is_zero = not written.strip("-0.,")  # which has no sign
    return written.lstrip("-") if is_zero else written.replace("-", "−")


def si(value: Any, unit: str = "", form: str = "#.3g") -> str:
    """Write three figures and an SI prefix; a dash for None and NaN.

    >>> si(3.14159e12, "FLOP")
    '3.14 TFLOP'
    """
    if value is None or pd.isna(value):
        return "–"
    value = float(f"{value:.3g}")
    power = min(max(int(math.log10(abs(value)) // 3), 0), 6) if value else 0
    figures = f"{value / 1000**power:{form if power else 'g'}}".rstrip(".")
    return f"{figures} {' kMGTPE'[power].strip()}{unit}".strip()


def terminal_width(text: str) -> int:
    """Count the columns of a terminal that a text takes: two for a wide letter, none for an accent that combines."""
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def pad_or_cut(text: str, width: int) -> str:
    """Fill a text up with blanks to so many columns of a terminal, or cut it and end it with an ellipsis.

    >>> [pad_or_cut("argparse.py", 8), pad_or_cut("ast.py", 8)]
    ['argpars…', 'ast.py  ']
    """
    if terminal_width(text) > width:
        while terminal_width(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - terminal_width(text))
