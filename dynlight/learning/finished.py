"""Finished: a document that an earlier part of a run has read to its end, and how a document can fail."""

from dataclasses import dataclass

import pandas as pd

from dynlight.documents.document import Document


@dataclass(frozen=True)
class Failure:
    """Where and why learning went wrong on a document."""

    segment: int  # of a document that has stopped the one in which it did, else the first that the initial weights read
    reason: str
    stopped: bool  # whether the document is read no further, and stands in no sum


@dataclass(frozen=True)
class Finished:
    """A document that was read to its end by an earlier part of this run and is not read again."""

    document: Document
    failure: Failure | None
    rows: pd.DataFrame  # of `segments.parquet` and `timings.parquet`
