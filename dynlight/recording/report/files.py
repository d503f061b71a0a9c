"""The files that are made of a run's rows: documents.csv, summary.json and report.html can be deleted and made again."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dynlight.durable import write_text
from dynlight.recording.report import page
from dynlight.recording.report.summary import summarise
from dynlight.recording.report.tables import SECONDS, documents_table, scores


def write(folder: str | Path) -> dict[str, Any]:
    """Write documents.csv, summary.json and report.html from the rows of a run, each whole or not at all.

    Returns:
        What summary.json holds.
    """
    table, summary = write_tables(folder)
    write_page(folder, table, summary)
    return summary


def write_tables(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Write documents.csv and summary.json, and return the table of documents and what the latter holds.

    documents.csv holds no timings, so that it can be compared byte for byte between runs.
    """
    folder = Path(folder)
    table = documents_table(folder)
    summary = summarise(folder, table)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(
        folder / "documents.csv",
        table.drop(columns=[*SECONDS, "teacher_seconds"], errors="ignore").to_csv(index=False, lineterminator="\n"),
    )
    write_text(folder / "summary.json", text)
    return table, summary


def write_page(folder: str | Path, table: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Write report.html from what `write_tables` returned."""
    folder = Path(folder)
    write_text(folder / "report.html", page.render(folder, scores(table), summary))
