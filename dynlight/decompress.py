"""`python -m dynlight.decompress BOOK.txt.dyn`: the file that dynlight.compress was given, byte for byte."""

import sys
from collections.abc import Sequence

from dynlight.arguments import asks_for_help, own_options, refused
from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.decompress FILE.dyn

Gives back the file that dynlight.compress was given, byte for byte. It needs the same
model, and the same versions and kind of machine, and says so where they differ.

  --model.pretrained, --model.tokenizer, --teacher.pretrained
                   where these lie, if elsewhere
  --to FILE        another name for what is written (default: FILE)
  --force          replaces what is there
  --help           prints this

exit status: 0 done, 2 couldn't be done, 130 stopped by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Decompresses what the command line says; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    from dynlight.durable import draft_of
    from dynlight.running.trainer import quiet
    from dynlight.using.files import Told, file_of, target_of
    from dynlight.using.packed import unpack

    quiet()
    try:
        file, options, rest = file_of(arguments, "FILE.dyn")
        elsewhere, rest = own_options(rest, ("model.pretrained", "model.tokenizer", "teacher.pretrained"))
        must, name = "be left out, as the file has its settings", rest[0].lstrip("-") if rest else ""
        require(not rest, name, must, got=" ".join(rest))
        is_named = file.suffix == ".dyn" or "to" in options
        require(is_named, "to", "be given where a file is not named .dyn", got="nothing")
        target = target_of(options, file.with_suffix(""), file)
        with Told("decompressed") as told:
            data = unpack(file.read_bytes(), told, [f"--{name}={value}" for name, value in elsewhere.items()])
        with draft_of(target) as draft:
            draft.write_bytes(data)
    except (OSError, SettingError) as error:
        return refused(error)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{target}  {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
