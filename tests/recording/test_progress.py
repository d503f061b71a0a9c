"""The line that shows how far a run is, against the table at its end."""

import json
import re

import pytest
import yaml
from folders import configuration

from dynlight import fit
from dynlight.recording.report.text import number


@pytest.mark.parametrize("together", [1, 2])
def test_the_last_number_of_the_line_is_that_of_the_table_when_a_document_failed(library, tmp_path, capsys, together):
    (tmp_path / "short.txt").write_text("short")
    files = [f"{library}/documents/a.txt", str(tmp_path / "short.txt")]
    config = configuration(library / "model", "", tmp_path / "out")
    config["data"] = {"path": "text", "data_files": files, "together": together}
    config["update"] = {"class_path": "SGD", "init_args": {"lr": 1e6}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 3
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    (failed,) = summary["failed"]
    assert failed["segment"] > 0, "it was read for a while"
    shown = re.findall(r"bits per byte static (\S+) → adapted (\S+) ·", capsys.readouterr().err)
    expected = number(summary["static"]["bits_per_byte"], 2), number(summary["bits_per_byte"], 2)
    assert shown[-1] == expected
