"""The quickstart comes out as README prints it, on any machine."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynlight.auditing.run_scorer import with_noise
from dynlight.recording.records import Records
from dynlight.running.run import Run

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--config", str(ROOT / "configs/quickstart.yaml")]


def read(change: Callable[[Any], Any]) -> pd.DataFrame:
    """The documents of the quickstart, read by a changed model."""
    run, records = Run.of(ARGUMENTS), Records()
    run.read(run.module(change(run.choices.model.load())), run.documents, [records])
    return records.documents


def bits(table: pd.DataFrame, nats: str = "nats") -> np.ndarray:
    return (table[nats] / table.bytes / np.log(2)).to_numpy()


def table_in_readme() -> dict[str, list[str]]:
    lines = re.findall(r"^(\S+\.py|all 12) +([\d,]+) +([\d.]+) +([\d.]+) ", (ROOT / "README.md").read_text(), re.M)
    return {name: [static, adapted] for name, _, static, adapted in lines}


@pytest.mark.slow
def test_noise_of_the_size_of_rounding_moves_no_document():
    plain, noisy = read(lambda model: model), read(with_noise)
    assert np.abs(bits(plain) - bits(noisy)).max() < 1e-5
    printed = table_in_readme()
    assert len(printed) == 4
    found = {
        name: [f"{static:.3f}", f"{adapted:.3f}"]
        for name, static, adapted in zip(plain.name, bits(plain, "static_nats"), bits(plain), strict=True)
    }
    sums = plain.sum(numeric_only=True)
    found["all 12"] = [f"{sums[nats] / sums.bytes / np.log(2):.3f}" for nats in ("static_nats", "nats")]
    if {name: found[name][0] for name in printed} == {name: static for name, (static, _) in printed.items()}:
        assert {name: found[name] for name in printed} == printed
    else:
        pytest.skip("this Python's library is another than that of README's table")
