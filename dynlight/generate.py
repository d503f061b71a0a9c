"""`python -m dynlight.generate --run runs/x --document NAME --prompt TEXT`: what a model writes that has read a document."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.generate --run runs/X --document NAME --prompt TEXT

Continues a prompt by the initial weights and, beside them, by the weights as they are
after a run has read a document: what was learned can be seen.

  --run folder       a finished run; with keep: adapters (or weights) what it kept is
                     used, else the document is read again
  --document NAME    its name, or its number from 0 (default: 0)
  --prompt TEXT      what is continued (default: nothing)
  --tokens N         how many tokens are written (default: 80)
  --temperature T    0: always the likeliest token (default: 0.8)
  --behind N         how many of the document's last tokens stand before the prompt
                     (default: 0, so that all that is known is known by the weights)
  --seed N           of what is drawn (default: 0)
  --help             prints this

exit status: 0 done, 2 couldn't be done
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, end="")
        return 0
    try:
        chosen = _parsed(arguments)
        texts = _continued(chosen)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(side_by_side({"static": texts[0], "adapted": texts[1]}, shutil.get_terminal_size().columns)))
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--document", default="0")
    parser.add_argument("--prompt", default="")
    for name, kind, usual in (("tokens", int, 80), ("temperature", float, 0.8), ("behind", int, 0), ("seed", int, 0)):
        parser.add_argument(f"--{name}", type=kind, default=usual)
    try:
        chosen, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        got = error.message.rpartition(": ")[2]
        raise SettingError(str(error.argument_name).lstrip("-"), "be given as in --help", got=got) from error
    if unknown:
        raise SettingError(
            unknown[0].lstrip("-"), "be an option of dynlight.generate", got=unknown[0], advice="see --help"
        )
    require(chosen.run is not None, "run", "be given", got="nothing")
    require(chosen.tokens >= 1, "tokens", "be at least 1", got=chosen.tokens)
    require(chosen.temperature >= 0, "temperature", "be at least 0", got=chosen.temperature)
    require(0 <= chosen.seed < 2**32, "seed", f"be from 0 to {2**32 - 1}", got=chosen.seed)
    must, is_run = "be the folder of a run", (chosen.run / "config.yaml").is_file()
    require(is_run, "run", must, got=chosen.run, advice="it has no config.yaml")
    return chosen


def _continued(chosen: argparse.Namespace) -> list[str]:
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
    drawn = {"do_sample": True, "temperature": chosen.temperature} if chosen.temperature else {"do_sample": False}
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
