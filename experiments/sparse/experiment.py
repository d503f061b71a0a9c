"""How little of a gradient is enough, and by which measure?"""

import json
from functools import partial
from typing import Any

import pandas as pd
import yaml

from experiments import protocol, variants
from experiments.grid import Scale

BY = "gradient"
figure, table, verdict = (partial(each, by=BY) for each in (variants.figure, variants.table, variants.verdict))


def measure(settings: dict[str, Any], scale: Scale) -> pd.DataFrame:
    """As the protocol does, with Fisher information from other books."""
    changes = yaml.safe_load(settings[BY])
    for change in changes:
        if change["init_args"].get("by") == "fisher":
            change["init_args"]["statistics"] = json.loads(protocol.statistics("sparse", settings, scale))
    return protocol.measure("sparse", {**settings, BY: json.dumps(changes)}, scale)
