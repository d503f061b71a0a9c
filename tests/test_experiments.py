"""Experiments: their grids are runs, each measures in small, and a row of their results comes out again."""

import logging
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from dynlight.running.configuration import parse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import __main__ as command  # noqa: E402 # a folder beside the tests, not installed
from experiments import grid, protocol, results  # noqa: E402

NAMES = grid.names()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of the tests' own, so that no score is one that an earlier version has kept."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def at_root(monkeypatch, runs) -> Iterator[None]:
    """Experiments run at the root; what they set for their process is set back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(results, "RUNS", runs)
    threads, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


def all_but_exhaustive(*names: str) -> list[object]:
    """Every experiment as a test's parameter; those that are not named are for `make test-all`."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.exhaustive) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_a_sweep_of_wandb_whose_points_are_runs(name):
    sweep = yaml.safe_load((grid.folder_of(name) / "sweep.yaml").read_text())
    assert sweep["method"] == "grid" and sweep["metric"]["goal"] == "minimize"
    assert sweep["command"] == ["${env}", "${interpreter}", "-m", "experiments", "point", name, "${args}"]
    points, books = grid.points(name), grid.Scale.read("books")
    assert len({grid.key_of(name, point, books) for point in points}) == len(points)
    for point in points:
        handed_over = grid.point_of(grid.arguments(point))
        assert grid.key_of(name, handed_over, books) == grid.key_of(name, point, books), "by an agent"
        if not hasattr(import_module(f"experiments.{name}.experiment"), "measure"):
            for scale in ("books", "small", "paper"):
                parse(grid.run_of(name, point, grid.Scale.read(scale)))


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_exhaustive("size", "oracle"))  # by the protocol's `measure`, and by one's own
def test_an_experiment_runs_in_small(name, capsys):
    status, output = command.main(["run", name, "--small"]), capsys.readouterr()
    assert status == 0, output.err
    assert "| adapted |" in output.out


def test_the_tables_of_claims_say_what_the_results_say():
    every = (ROOT / "experiments/README.md").read_text("utf-8")
    assert f"-->\n{command.verdicts()}\n<!-- end -->" in every
    _, _, claims = (ROOT / "README.md").read_text("utf-8").partition("## The paper's claims, measured")
    told = re.findall(r"[+-]0\.\d{3} \[.*?\]", claims)
    assert told and [margin for margin in told if margin not in every] == []


@pytest.mark.parametrize("name", NAMES)
def test_all_points_are_among_the_results(name):
    books, points = grid.Scale.read(), grid.points(name)
    found = set(results.load(name).key)
    assert len(found) == len(points)
    models = {grid.model_of(name, point, books) for point in points}
    if missing := [model for model in models if not grid.weights_of(model)]:
        pytest.skip(f"a point's key is made of the model's weights, which are not here: {', '.join(missing)}")
    assert found == {grid.key_of(name, point, books) for point in points}


def test_processes_share_a_grid(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(name, settings, scale):
        measured.append(settings)
        rows = {"role": "adapted", "rate": 0.1, "document": "a.txt", "position": 0} | dict.fromkeys(protocol.SUMS, 1)
        results.keep(name, settings, pd.DataFrame([rows]), scale, took=1.0)

    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(command, "measure", measure)
    small = grid.Scale.read("small")
    first, *_, last = grid.points("size")
    with results.claim("size", first, small) as is_mine:
        assert is_mine
        command.run("size", small)
        assert measured == [last]
        assert "left to another process: 1" in capsys.readouterr().out
    command.run("size", small)
    assert measured == [last, first, last] and "another process" not in capsys.readouterr().out


# By the protocol, a row a document and a row a position; and by an experiment's own `again`.
@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_exhaustive("extreme_overlap", "gain", "oracle"))
def test_a_row_of_the_results_comes_out_again(name):
    if not (grid.folder_of(name) / "results.csv").exists():
        pytest.skip("not measured yet")
    if not Path("../shared/data/books").exists():
        pytest.skip("needs the books that were read")
    rows = results.load(name)
    own = getattr(import_module(f"experiments.{name}.experiment"), "again", None)
    nats, known = own(rows) if own else again(name, rows)
    assert nats == pytest.approx(known, rel=1e-3)


def again(name: str, rows: pd.DataFrame) -> tuple[float, float]:
    """Nats of the first adapted row, of its document read without the others at its rate, and those in the results."""
    row = rows[rows.role == "adapted"].iloc[0]
    settings = list(grid.points(name)[0])
    arguments = grid.run_of(name, row[settings].to_dict(), grid.Scale.read("books"))
    config = parse(arguments)
    file = Path(str(config.data.data_files)).parent / row.document
    if config.model.pretrained != "tiny-books" and not Path(config.model.pretrained).exists():
        pytest.skip(f"needs {config.model.pretrained}, which `make ladder` makes")
    alone = [f"--data.data_files={file}", f"--data.max_tokens={row.tokens}"]
    sums = protocol.adapted([*arguments, "--rates=null", f"--update.lr={row.rate}", *alone]).iloc[0]
    assert (sums.tokens, sums.bytes, sums.flops) == (row.tokens, row.bytes, row.flops)
    return sums.nats, row.nats
