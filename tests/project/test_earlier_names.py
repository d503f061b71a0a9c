"""Configurations of runs of version 0.1.0, which name classes by the modules of that version, still parse."""

from pathlib import Path

import pytest
import yaml

from dynlight.running.configuration import parse

ROOT = Path(__file__).parents[2]
QUICKSTART = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))
COMPRESSED = yaml.safe_load((ROOT / "configs/compressed_gradients.yaml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("section", "class_path"),
    [
        ("context", "dynlight.context.TransformerXL"),
        ("parameters", "dynlight.parameters.Matching"),
        ("update", "dynlight.updates.RMSDynamic"),
    ],
)
def test_a_section_that_names_a_class_by_its_earlier_module(tmp_path, section, class_path):
    named = QUICKSTART[section] | {"class_path": class_path}
    if section == "update":
        named["init_args"] = {"lr": 0.1}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(QUICKSTART | {section: named}))
    name = class_path.rpartition(".")[2]
    assert parse(["--config", str(tmp_path / "old.yaml")])[section].class_path.endswith(f".{name}")


def test_the_state_of_a_hook_that_is_named_by_its_earlier_module(tmp_path):
    COMPRESSED["trainer"]["strategy"]["init_args"]["ddp_comm_state"]["class_path"] = "dynlight.strategies.PowerSGD"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(COMPRESSED))
    state = parse(["--config", str(tmp_path / "old.yaml")]).trainer.strategy.init_args.ddp_comm_state
    assert state.class_path.endswith(".PowerSGD")
