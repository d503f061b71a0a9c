"""Does adapting always help, on how many documents, and where in a document? (C4)"""

from typing import Any

import pandas as pd

from experiments import protocol

EVERY = 500  # tokens that a row of the results is of


def measure(settings: dict[str, Any], small: bool) -> pd.DataFrame:
    """As the protocol does, by position in the document."""
    return protocol.measure("gain", settings, small, every=EVERY)
