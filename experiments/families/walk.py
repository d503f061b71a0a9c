"""Walk: every type that `AutoModelForCausalLM` knows, and how well dynlight serves it."""

import time
from collections import Counter
from collections.abc import Sequence

from experiments.families import page, rows, tiny


def main(types: Sequence[str]) -> None:
    """Walks the types and prints what came of each; of all types, writes README.md.

    Raises:
        ValueError: if there is no such type.
    """
    if unknown := [name for name in types if name not in tiny.TYPES]:
        raise ValueError(f"the type must be one that AutoModelForCausalLM knows, got {unknown[0]}")
    every = []
    for number, name in enumerate(types or tiny.TYPES, start=1):
        began = time.perf_counter()
        every.append(row := rows.in_process(name))
        print(f"{number:3} {name:26} {time.perf_counter() - began:5.1f} s  {in_a_line(row)}", flush=True)
    if not types:
        page.README.write_text(page.text(every), "utf-8")


def in_a_line(row: rows.Row) -> str:
    """What came of a type, each mistake with its text."""
    counts = Counter(outcome.kind for outcome in row.cells.values())
    if row.loading.kind == "untried":
        counted = f"not made: {row.loading.text}"
    elif row.loading.kind == "refused":
        counted = f"refused at loading: {row.loading.text}"
    else:
        counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return "; ".join([counted, *(f"{name} {each.kind} {each.text}" for name, each in row.mistakes.items())])
