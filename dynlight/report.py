"""`python -m dynlight.report runs/x`: a run's summary, tables and page, made again from its rows."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dynlight.arguments import asks_for_help, refused
from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.report runs/X

Makes the summary, the tables and the page of a run again from its rows, and prints the table.

  runs/X     the folder of a run, such as runs/quickstart
  --help     prints this

exit status: 0 made, 2 couldn't be made
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes what the command line names; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    # Imported here, as they take a moment, which the help needn't wait for.
    from dynlight.recording.report.files import write
    from dynlight.recording.report.terminal import printed_table, show

    try:
        is_one = len(arguments) == 1 and not arguments[0].startswith("-")
        require(is_one, "runs/X", "be the folder of one run", got=" ".join(arguments))
        folder = Path(arguments[0])
        write(folder)
        show(f"{printed_table(folder)}\n\n{folder / 'report.html'}")
    except (OSError, SettingError) as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
