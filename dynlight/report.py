"""`python -m dynlight.report runs/x`: a run's summary, tables and page, made again from its rows."""

import argparse
import sys
from pathlib import Path

from dynlight.errors import SettingError
from dynlight.recording.report.files import write
from dynlight.recording.report.terminal import printed_table


def main(arguments: list[str] | None = None) -> int:
    """Write a run's summary, table and report again from its rows, and print the table."""
    parser = argparse.ArgumentParser("python -m dynlight.report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the folder of a run, such as runs/quickstart")
    folder = parser.parse_args(arguments).folder
    try:
        write(folder)
        print(printed_table(folder), "", folder / "report.html", sep="\n")
    except (OSError, SettingError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
