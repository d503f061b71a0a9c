"""Page: README.md, made of the rows of all types."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import transformers

from experiments.families import cells
from experiments.families.cells import CELLS, Outcome
from experiments.families.rows import Row

README = Path(__file__).with_name("README.md")
MARKS = {"right": "✓", "refused": "no", "unknown": "?", "untried": "–"}


def text(rows: Sequence[Row]) -> str:
    """The page: totals, what the columns say, a row for each type, and the reasons."""
    read = sorted((row for row in rows if row.cells), key=lambda row: (-row.right, row.name))
    reasons = _numbered(read)
    table = [[row.name, *(mark(outcome, reasons) for outcome in row.cells.values())] for row in read]
    parts = [
        "# Families of models",
        "<!-- python -m experiments families -->",
        _introduction(),
        "## Totals",
        _table(["", "types"], _totals(rows)),
        _learning(read),
        "## What the columns say",
        _table(["column", "what dynlight does, and the loop"], [[name, cell.__doc__] for name, cell in CELLS.items()]),
        _legend(),
        "## Types",
        _table(["type", *CELLS], table),
        "## Reasons",
        "\n".join(_wrapped(f"{number}. {reason}") for reason, number in reasons.items()),
        "## Refused at loading",
        _listed({row.name: row.loading for row in rows if row.loading.kind not in ("right", "untried")}),
        "## Not made",
        _listed({row.name: row.loading for row in rows if row.loading.kind == "untried"}),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction() -> str:
    *most, last = (str(len(tokens)) for tokens in cells.DOCUMENTS)
    lengths = f"{', '.join(most)} and {last}"
    return _wrapped(
        "How well dynlight serves each type that `AutoModelForCausalLM` "
        f"of transformers {transformers.__version__} knows. `python -m experiments families` makes a tiny random model "
        "of each, lets dynlight read it, and compares with a slow loop that has nothing of dynlight "
        f"([loop.py](loop.py)): three documents of {lengths} tokens, segments of {cells.SEGMENT}. `python -m experiments "
        "families llama gpt2` prints what came of these types alone and writes nothing."
    )


def _totals(rows: Sequence[Row]) -> list[list[str]]:
    """The numbers of types, by how well they are served."""
    read = [row for row in rows if row.cells]
    counts = {
        "known to `AutoModelForCausalLM`": len(rows),
        "of which a tiny model was made": sum(row.loading.kind != "untried" for row in rows),
        "refused at loading": sum(row.loading.kind == "refused" for row in rows),
        "read by dynlight": len(read),
        "right in all cells": sum(row.right == len(CELLS) for row in read),
        "right, refused, unknown or nothing to compare in each cell": sum(not row.mistakes for row in read),
        "**WRONG** or **TRACEBACK** somewhere": sum(bool(row.mistakes) for row in rows),
    }
    return [[name, str(count)] for name, count in counts.items()]


def _learning(read: Sequence[Row]) -> str:
    """At which rates types learn, and for how many that makes a difference."""
    usual, seen = cells.RATES[0], 10 * cells.TOLERANCE
    slower = ", ".join(f"{row.name} at {row.rate:g}" for row in read if row.rate < usual) or "nowhere"
    moved = sum(row.moved >= seen for row in read)
    return _wrapped(
        "The models are random, and weights larger than at birth, so that nats depend on what is in view. All weights "
        f"learn by SGD at {usual:g}, or lower where weights off in their last bit would change the loop's own nats: "
        f"{slower}. Learning moves a document's nats by more than {seen:g} of them in {moved} of {len(read)} types: "
        "learning that is wrong would be seen."
    )


def _legend() -> str:
    return _wrapped(
        "✓: each document's nats are those of the loop: "
        f"Σ |difference of a token| is at most {cells.TOLERANCE:g} of them. no: refused in one line before anything is "
        "read, for the reason of that number below. ?: FLOPs are not known, and a warning says so. –: the loop cannot "
        "do it, so nothing is compared. **WRONG**: nats differ, by the share that stands behind. **TRACEBACK**: an "
        "error that says nothing to a user."
    )


def _numbered(rows: Sequence[Row]) -> dict[str, int]:
    """The reasons in all cells, the most frequent first, each with its number."""
    outcomes = [outcome for row in rows for outcome in row.cells.values()]
    counts = Counter(general(outcome.text) for outcome in outcomes if outcome.text and outcome.kind != "WRONG")
    return {reason: number for number, (reason, _) in enumerate(counts.most_common(), start=1)}


def mark(outcome: Outcome, reasons: dict[str, int]) -> str:
    """What stands in a cell; of a wrong number how far it is off, else the number of its reason."""
    word = MARKS.get(outcome.kind, f"**{outcome.kind}**")
    behind = outcome.text if outcome.kind == "WRONG" else reasons.get(general(outcome.text), "")
    return f"{word} {behind}".strip()


def general(reason: str) -> str:
    """A reason without what differs from type to type: names of types, modules and classes, numbers."""
    reason = re.sub(r"\b(for|suit) [\w-]+, (wh|for)", r"\1 this type, \2", reason)
    reason = re.sub(r"whose [\w, ]+ (cannot be read row by row)", r"whose modules \1", reason)
    reason = re.sub(r"(choose some of) .*", r"\1 …", reason)
    reason = re.sub(r"\b[A-Z]\w*[a-z](?:Model|ForCausalLM|Attention|Experts|Router|Mixer|Norm|Layer)\b", "…", reason)
    reason = re.sub(r"(?<![\w.])(?<!must be )\d[\d.]*(?:e[+-]\d+)?", "N", reason)
    return re.sub(r"N(?:, N)+", "N, …", reason).replace("*", r"\*").replace("<", r"\<")


def _listed(outcomes: dict[str, Outcome]) -> str:
    """The types, by reason."""
    names: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        kind = f"**{outcome.kind}** " if outcome.kind == "TRACEBACK" else ""
        names.setdefault(kind + general(outcome.text), []).append(name)
    return "\n".join(_wrapped(f"- {', '.join(every)}: {reason}") for reason, every in names.items()) or "None."


def _table(head: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _wrapped(text: str) -> str:
    is_entry = text.startswith("- ") or text[0].isdigit()
    return fill(text, 120, subsequent_indent="   " * is_entry, break_long_words=False, break_on_hyphens=False)
