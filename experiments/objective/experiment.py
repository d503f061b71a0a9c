"""Does it pay to learn from what surprises, to stay near the initial weights, to read earlier segments again, or to have a teacher?"""

import json
from functools import partial
from typing import Any

import pandas as pd

from experiments import protocol, variants
from experiments.grid import Scale

BY = "objective"
TEACHER = "experiments/ladder/books_third"  # as large as the model that learns; it has read three times as many books
figure, table, verdict = (partial(each, by=BY) for each in (variants.figure, variants.table, variants.verdict))


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, with a teacher where there is something to learn from it."""
    if "Distilled" in settings[BY]:
        teacher = {"class_path": "Pretrained", "init_args": {"pretrained": scale.models.get(TEACHER, TEACHER)}}
        settings = {**settings, "teacher": json.dumps(teacher)}
    return protocol.measure("objective", settings, scale)
