"""Finished: a document that was read to its end before a run was resumed, and how a document can fail."""

from dataclasses import dataclass

import pandas as pd

from dynlight.documents.document import Document


@dataclass(frozen=True)
class Failure:
    """Where and why learning went wrong on a document."""

    segment: int  # in which the document stopped; else the first that the initial weights read
    reason: str
    stopped: bool  # whether the document is read no further, and is in no sum


@dataclass(frozen=True)
class Finished:
    """A document that was read to its end before the run was resumed, and is not read again."""

    document: Document
    failure: Failure | None
    rows: pd.DataFrame  # the document's rows of `segments.parquet` and `timings.parquet`
