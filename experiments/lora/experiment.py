"""What do adapters save, what do they cost in loss, and how does regret grow as a document is read? (C3, C8)"""

from typing import Any

import pandas as pd

from experiments import grid, protocol

EVERY = 500  # tokens that a row of the results is of
ONE = ["--data.documents=1", "--data.max_tokens=640", "--data.together=1", "--rates=null", "--reference=null"]


def measure(settings: dict[str, Any], small: bool) -> pd.DataFrame:
    """As the protocol does, by position in the document, with learned weights and peak memory of one document alone."""
    rows = protocol.measure("lora", settings, small, every=EVERY)
    base = ["--config", str(grid.folder_of("lora") / "run.yaml"), *grid.arguments(settings)]
    alone = [*base, *(protocol.SMALL if small else []), *ONE]
    run = protocol.alone(alone)
    rows["learned_weights"], rows["peak_memory_bytes"] = run["learned_parameters"], run["peak_memory_bytes"]
    return rows
