"""The files that are made of a run's rows: documents.csv, summary.json and report.html can be deleted and made again."""

import json
from pathlib import Path
from typing import Any

from dynlight.durable import write_text
from dynlight.recording.report import page
from dynlight.recording.report.summary import summarise
from dynlight.recording.report.tables import SECONDS, documents_table, scores


def write(folder: str | Path) -> dict[str, Any]:
    """Write documents.csv, summary.json and report.html from the rows of a run, each whole or not at all.

    documents.csv holds no timings, so that it can be compared byte for byte between runs.

    Returns:
        What summary.json holds.
    """
    folder = Path(folder)
    table = documents_table(folder)
    summary = summarise(folder, table)
    files = {
        "documents.csv": table.drop(columns=SECONDS).to_csv(index=False, lineterminator="\n"),
        "summary.json": json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": page.render(folder, scores(table), summary),
    }
    for name, text in files.items():
        write_text(folder / name, text)
    return summary
