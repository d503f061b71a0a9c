"""`python -m dynlight.compare runs/a runs/b`: several runs as one table and one page."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dynlight.arguments import asks_for_help, own_options, refuse_others, refused
from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.compare runs/a runs/b ... [--baseline runs/a] [--out X.html]

Compares runs document by document: prints a table, and writes a page that opens offline.

  runs              two folders of runs or more, globs ('runs/*'), or folders in which
                    runs lie, as those of a sweep
  --baseline RUN    the run that others are compared with, by its folder or its name in
                    the table (default: the first)
  --out FILE.html   the page (default: compare.html where the first run lies,
                    a baseline that is none of the others before them)
  --help            prints this

exit status: 0 compared, and what can't be is said; 2 couldn't be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the runs that the command line names; returns the exit status: 0 compared, 2 couldn't be run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    # Imported here, as they take a moment, which the help needn't wait for.
    from dynlight.recording.comparison.comparison import compare
    from dynlight.recording.comparison.page import write_page
    from dynlight.recording.comparison.terminal import printed_comparison
    from dynlight.recording.report.terminal import show

    try:
        options, runs = own_options(arguments, ("baseline", "out"))
        refuse_others(runs, ("baseline", "out"))
        comparison = compare(runs, options.get("baseline"))
        out = Path(options.get("out", comparison.pairs[0].run.folder.parent / "compare.html"))
        require(out.suffix == ".html", "out", "be the name of a file that ends with .html", got=out)
        require(out.name != "report.html", "out", "not be the page of a run", got=out)
        require(out.parent.is_dir(), "out", "lie in a folder that exists", got=out)
        write_page(comparison, out)
    except (OSError, SettingError) as error:
        return refused(error)
    show(f"{printed_comparison(comparison)}\n\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
