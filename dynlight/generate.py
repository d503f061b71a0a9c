"""`python -m dynlight.generate --run runs/x --document NAME --prompt TEXT`: what a model writes that has read a document."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dynlight.arguments import asks_for_help, number_of, own_options, refuse_others, refused
from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.generate --run runs/X --document NAME --prompt TEXT

Continues a prompt by the initial weights and, beside them, by the weights as they are
after a run has read a document: what was learned can be seen.

  --run folder       a run; with keep: adapters (or weights) what it kept is
                     used, else the document is read again
  --document NAME    its name, or its number from 0 (default: 0)
  --prompt TEXT      what is continued (default: nothing)
  --tokens N         how many tokens are written (default: 80)
  --temperature T    0: always the likeliest token (default: 0.8)
  --behind N         how many of the document's last tokens stand before the prompt
                     (default: 0, so that all that is known is known by the weights)
  --seed N           of what is drawn (default: 0)
  --help             prints this

exit status: 0 done, 2 couldn't be done, 130 stopped by Ctrl-C
"""


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for, by the names of its options."""

    run: Path
    document: str
    prompt: str
    tokens: int
    temperature: float
    behind: int
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    try:
        chosen = _parsed(arguments)
        texts = _continued(chosen)
    except SettingError as error:
        return refused(error)
    except KeyboardInterrupt:
        return 130
    from dynlight.recording.report.terminal import show

    show("\n".join(side_by_side({"static": texts[0], "adapted": texts[1]}, shutil.get_terminal_size().columns)))
    return 0


def _parsed(arguments: list[str]) -> _Asked:
    names = ("run", "document", "prompt", "tokens", "temperature", "behind", "seed")
    options, rest = own_options(arguments, names, may_be_empty=("prompt",))
    refuse_others(rest, names)
    require(not rest, "an option", "be given by its name", got=" ".join(rest))
    require("run" in options, "run", "be given", got="nothing")
    folder = Path(options["run"])
    must, is_run = "be the folder of a run", (folder / "config.yaml").is_file()
    require(is_run, "run", must, got=folder, advice="it has no config.yaml")
    return _Asked(
        run=folder,
        document=options.get("document", "0"),
        prompt=options.get("prompt", ""),
        tokens=int(number_of(options, "tokens", 80, 1, 100_000, whole=True)),
        temperature=number_of(options, "temperature", 0.8, 0, 100),
        behind=int(number_of(options, "behind", 0, 0, 100_000, whole=True)),
        seed=int(number_of(options, "seed", 0, 0, 2**32 - 1, whole=True)),
    )


def _continued(chosen: _Asked) -> list[str]:
    """The prompt and what follows it, by the initial weights and by those that have read the document."""
    import torch

    from dynlight.running.run import Run
    from dynlight.running.trainer import quiet
    from dynlight.using.reader import Reader
    from dynlight.using.saved import recall

    quiet()
    run = Run.of(["--config", str(chosen.run / "config.yaml")])
    names = [document.name for document in run.documents]
    is_number = chosen.document not in names and chosen.document.isdecimal() and int(chosen.document) < len(names)
    is_known = is_number or chosen.document in names
    require(is_known, "document", f"be one of {len(names)}, as {names[0]}", got=chosen.document)
    document = run.documents[int(chosen.document) if is_number else names.index(chosen.document)]
    reader = Reader.of(run)
    if not recall(reader, chosen.run, document):
        is_alone, advice = not run.choices.reset.carries_over, "set keep, and run it again"
        require(
            is_alone, "run", "have kept what a document taught where it is not forgotten", got="nothing", advice=advice
        )
        reader.read_tokens(document.tokens, document.bytes)
    if reader.has_failed:
        print("warning: numbers went wrong in the document, so that the initial weights continue both", file=sys.stderr)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": chosen.temperature}
    texts = []
    for static in (True, False):
        torch.manual_seed(chosen.seed)
        settings = {"max_new_tokens": chosen.tokens, "behind": chosen.behind} | drawn
        texts.append(chosen.prompt + reader.generate(chosen.prompt, static=static, **settings))
    return texts


def side_by_side(texts: dict[str, str], width: int) -> list[str]:
    """Lines of a terminal with texts in columns of the same width, each under its name."""
    from dynlight.recording.report.text import visible

    wide = max(20, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = []
    for name, text in texts.items():
        lines = [name, "─" * wide]
        for line in visible(text.expandtabs(4)).splitlines():
            lines += [line[i : i + wide] for i in range(0, max(len(line), 1), wide)]
        columns.append(lines)
    return [" │ ".join(f"{part:{wide}}" for part in parts).rstrip() for parts in zip_longest(*columns, fillvalue="")]


if __name__ == "__main__":
    sys.exit(main())
