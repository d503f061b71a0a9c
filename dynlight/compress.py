"""`python -m dynlight.compress BOOK.txt --config X.yaml`: a file as the code that a model's predictions make of it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dynlight.arguments import asks_for_help, refused
from dynlight.errors import SettingError

HELP = """usage: python -m dynlight.compress FILE --config X.yaml [--section.key value ...]
       python -m dynlight.decompress FILE.dyn

Compresses a file by what a model predicts of it, token by token, learning from it
segment by segment, as dynlight.fit does: the size is the score. Any bytes go in.

  FILE             becomes FILE.dyn, which holds all settings, and not the model
  --config X.yaml  a run, and overrides, as for dynlight.fit; its data, out, keep,
                   loggers and callbacks are not used
  --to FILE        another name for what is written
  --force          replaces what is there
  --help           prints this

It is decompressed by the same model, versions and kind of machine alone.
exit status: 0 done, 2 couldn't be done, 130 stopped by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compresses what the command line says; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    from dynlight.durable import draft_of
    from dynlight.recording.report.ratios import bits_per_byte, ratio
    from dynlight.recording.report.text import number
    from dynlight.running.run import Run
    from dynlight.running.trainer import quiet
    from dynlight.using.files import Told, file_of, target_of
    from dynlight.using.packed import pack

    quiet()
    try:
        file, options, rest = file_of(arguments, "FILE")
        target = target_of(options, Path(f"{file}.dyn"), file)
        with Told("compressed") as told:
            packed = pack(file.read_bytes(), Run.of(rest), told)
        with draft_of(target) as draft:
            draft.write_bytes(packed.bytes)
    except (OSError, SettingError) as error:
        return refused(error)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    whole = len(packed.bytes)
    static = bits_per_byte(packed.static_nats, packed.size)
    print(f"{file}  {packed.size:,} bytes, {packed.tokens:,} tokens")
    print(f"{target}  {whole:,} bytes: a code of {packed.code:,} behind a header of {packed.header:,}")
    print(
        f"{number(ratio(8 * whole, packed.size))} bits per byte; predicted {number(bits_per_byte(packed.nats, packed.size))}"
        + (f", by the initial weights {number(static)}" if static is not None else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
