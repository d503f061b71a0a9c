"""`python -m dynlight.compare runs/a runs/b`: several runs as one table and one page."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.compare runs/a runs/b ... [--baseline runs/a] [--out compare.html]

Compares runs document by document: prints a table, and writes a page that opens offline.

  runs                folders of runs, globs ('runs/*'), or folders in which runs lie, as those of a sweep
  --baseline RUN      the run that others are compared with, by its folder or its name in the table (default: the first)
  --out FILE.html     the page (default: compare.html in the folder in which the first run lies)
  --help              prints this

exit status: 0 compared, and what can't be is said; 2 couldn't be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the runs that the command line names; returns the exit status: 0 compared, 2 couldn't be run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, end="")
        return 0
    # Imported here, as they take a moment, which the help needn't wait for.
    from dynlight.recording.comparison.comparison import compare
    from dynlight.recording.comparison.page import write_page
    from dynlight.recording.comparison.terminal import printed_comparison

    try:
        options, runs = _own_options(arguments)
        comparison = compare(runs, options.get("baseline"))
        out = Path(options.get("out", comparison.pairs[0].run.folder.parent / "compare.html"))
        require(out.suffix == ".html", "out", "be the name of a file that ends with .html", got=out)
        require(out.parent.is_dir(), "out", "lie in a folder that exists", got=out)
        write_page(comparison, out)
    except (OSError, SettingError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(printed_comparison(comparison), "", out, sep="\n")
    return 0


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options by name, and the runs."""
    options: dict[str, str] = {}
    runs: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            runs.append(argument)
            continue
        if name not in ("baseline", "out"):
            raise SettingError("options", "be --baseline or --out", got=argument)
        options[name] = value if equals else next(waiting, "")
        if not options[name]:
            raise SettingError(name, "be given a value", got="nothing")
    return options, runs


if __name__ == "__main__":
    sys.exit(main())
