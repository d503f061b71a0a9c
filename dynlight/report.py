"""`python -m dynlight.report runs/x`: a run's summary, tables and page, made again from its rows."""

import sys

from dynlight.recording.report.summary import main

if __name__ == "__main__":
    sys.exit(main())
