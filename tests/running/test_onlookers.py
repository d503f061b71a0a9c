"""What only looks on costs no result: loggers, callbacks, the counter of FLOPs, the page."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from folders import configuration

from dynlight import fit
from dynlight.learning.flops import EmptyModel

CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}


@pytest.fixture
def run(library, tmp_path, monkeypatch, capsys):
    """Runs a configuration with these settings of the trainer; returns the exit status and what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def run(*arguments, out="out", **trainer):
        config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / out)
        config["trainer"] |= trainer
        Path("run.yaml").write_text(yaml.safe_dump(config))
        status = fit.main([*(arguments or ("--config", "run.yaml"))])
        return status, capsys.readouterr().err

    return run


def summary(out="out"):
    return json.loads(Path(out, "summary.json").read_text())


@pytest.mark.page
def test_flops_that_cannot_be_counted_are_null_and_the_scores_as_ever(run, monkeypatch):
    assert run()[0] == 0
    monkeypatch.setattr(EmptyModel, "measure", lambda *shape: _no_such_kernel())
    with pytest.warns(UserWarning, match="FLOPs are not counted.*no such kernel") as said:
        status, _ = run(out="unknown", logger=CSV)
    assert status == 0
    assert len([each for each in said if "FLOPs" in str(each.message)]) == 1
    known, unknown = summary(), summary("unknown")
    assert [unknown[name] for name in ("flops", "forward_flops", "update_flops")] == [None, None, None]
    assert unknown["static"]["flops"] is None and known["static"]["flops"] > 0
    assert unknown["nats"] == known["nats"]
    rows = [pd.read_parquet(f"{out}/segments.parquet") for out in ("out", "unknown")]
    costs = [name for name in rows[0] if name.endswith("flops")]
    assert rows[1][costs].isna().all(axis=None) and not rows[0][costs].isna().any(axis=None)
    pd.testing.assert_frame_equal(*(each.drop(columns=costs) for each in rows))
    assert pd.read_csv("unknown/documents.csv").flops.isna().all()
    assert "not counted" in Path("unknown/report.html").read_text()
    assert "against FLOPs" not in Path("unknown/report.html").read_text()
    (logged,) = Path("logs").rglob("metrics.csv")
    assert "bits_per_byte" in (columns := pd.read_csv(logged).columns)
    assert not {"flops", "cost/update_flops"} & set(columns)


def _no_such_kernel():
    raise RuntimeError("no such kernel")
