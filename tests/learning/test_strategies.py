"""Several processes: what they find is what one finds, and where one fails all end."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from folders import configuration, save_model, save_sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_all
from running import document, random_tokens

from dynlight import fit
from dynlight.documents.waves import deal
from dynlight.recording.ledger import faults_of

ROOT = Path(__file__).parents[2]
TWO = {"accelerator": "cpu", "devices": 2, "strategy": "document_parallel"}
TEXTS = {"a": 40, "b": 9, "c": 23, "d": 0, "e": 31, "f": 1, "g": 15}  # sentences in each file
SAME_FILES = ["segments.parquet", "tokens.parquet", "documents.csv"]


# Dealing documents


def deal_lengths(lengths, ranks):
    documents = [document(random_tokens(length, i), i) for i, length in enumerate(lengths)]
    return [[(each.index, len(each)) for each in share] for share in deal(documents, ranks)]


@pytest.mark.parametrize(
    ("lengths", "ranks", "sums"),
    [
        ([5, 5, 5], 1, [15]),
        ([3, 3, 2, 2, 2], 2, [6, 6]),  # longest first alone gives 7 and 5
        ([10], 3, [0, 0, 10]),
        ([], 2, [0, 0]),
        ([0, 0, 4], 2, [0, 4]),
        ([100, 1, 1, 1], 2, [3, 100]),
    ],
)
def test_documents_are_dealt_evenly(lengths, ranks, sums):
    assert sorted(sum(length for _, length in share) for share in deal_lengths(lengths, ranks)) == sums


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_document_is_dealt_once_and_in_order(lengths, ranks):
    shares = deal_lengths(lengths, ranks)
    assert shares == deal_lengths(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(each for share in shares for each in share) == list(enumerate(lengths))
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_the_longest_of_100_books_shares_is_at_most_5_percent_over_the_mean(ranks, seed):
    lengths = [int(100 * each) for each in np.random.default_rng(seed).lognormal(0, 1, 100)]
    sums = [sum(length for _, length in share) for share in deal_lengths(lengths, ranks)]
    assert max(sums) <= 1.05 * max(sum(lengths) / ranks, max(lengths) / 1.05)


def test_of_few_documents_an_even_deal_is_hardly_ever_missed():
    possible = found = 0
    for seed in range(150):
        generator = np.random.default_rng(seed)
        ranks, lengths = int(generator.integers(2, 4)), generator.integers(1, 100, generator.integers(3, 8)).tolist()
        even = 1.05 * sum(lengths) / ranks
        every_deal = itertools.product(range(ranks), repeat=len(lengths))
        if any(max(np.bincount(deal, lengths)) <= even for deal in every_deal):
            possible += 1
            found += max(sum(length for _, length in share) for share in deal_lengths(lengths, ranks)) <= even
    assert possible > 40
    assert found >= 0.97 * possible


# Runs in several processes


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    root = tmp_path_factory.mktemp("library")
    save_model(root / "model", byte_tokenizer)
    save_sentences(root / "documents", TEXTS)
    return root


def config_of(library, out, trainer, **changes):
    config = configuration(library / "model", f"{library}/documents/*.txt", out) | {"trainer": trainer}
    for setting, value in changes.items():
        config[setting] = config.get(setting, {}) | value if isinstance(value, dict) else value
    return config


CASES = {
    "alone": (TWO | {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}}, {}),
    "together": (TWO, {"data": {"together": 3}, "parameters": {"class_path": "LoRA", "init_args": {"rank": 2}}}),
    "more_processes": (TWO | {"devices": 3}, {"data": {"documents": 2}}),
    "failing": (TWO, {"update": {"init_args": {"lr": 1e6}}}),
}


@pytest.fixture(scope="module")
def runs(library, tmp_path_factory):
    """Each case in several processes, and in one: the folder of all, and their exit statuses, by process."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {}
    for name, (trainer, changes) in CASES.items():
        configs[name] = config_of(library, folder / "several" / name, trainer, **changes)
        if "logger" in trainer:
            configs[name]["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "logs")
        one = config_of(library, folder / "one" / name, {"accelerator": "cpu"}, **changes)
        (folder / "one.yaml").write_text(yaml.safe_dump(one))
        fit.main(["--config", str(folder / "one.yaml")])
    return folder, run_all(folder, 3, configs)


def folders(runs, name):
    folder, statuses = runs
    return folder / "one" / name, folder / "several" / name, [status[name] for status in statuses]


def summary(folder):
    """What summary.json says but for timings, memory, and the folder's name."""
    found = json.loads((folder / "summary.json").read_text())
    left_out = ("seconds", "_seconds", "_per_second", "peak_memory_bytes")
    parts = {"": found, "static": found.pop("static") or {}}
    return {
        f"{part} {name}": value
        for part, values in parts.items()
        for name, value in values.items()
        if not name.endswith(left_out)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "more_processes", "failing"])
def test_files_are_those_of_one_process(runs, name):
    one, several, statuses = folders(runs, name)
    assert statuses == [3 if name == "failing" else 0, 0, 0]
    for file in SAME_FILES:
        assert (one / file).read_bytes() == (several / file).read_bytes(), file
    assert summary(one) == summary(several)
    assert {file.name for file in several.iterdir()} == {file.name for file in one.iterdir()}
    assert json.loads((several / "run.json").read_text())["processes"] == CASES[name][0]["devices"]


@pytest.mark.slow
def test_documents_together_score_the_same_in_other_waves(runs):
    one, several, statuses = folders(runs, "together")
    assert statuses == [0, 0, 0]
    tables = [pd.read_parquet(folder / "segments.parquet") for folder in (one, several)]
    exact = [column for column in tables[0].columns if "nats" not in column]
    assert tables[0][exact].equals(tables[1][exact])
    for column in ("nats", "static_nats"):
        sums = [table.groupby("document")[column].sum() for table in tables]
        pd.testing.assert_series_equal(*sums, rtol=1e-5)


@pytest.mark.slow
def test_the_receipt_is_one_ledger_with_each_commit_once(runs):
    one, several, _ = folders(runs, "alone")
    found, expected = (json.loads((folder / "receipt.json").read_text()) for folder in (several, one))
    assert faults_of(found) == []
    assert [row[:6] for row in found["ledger"]] == [row[:6] for row in expected["ledger"]]
    _, together, _ = folders(runs, "together")
    receipt = json.loads((together / "receipt.json").read_text())
    assert faults_of(receipt) == []
    assert len(receipt["ledger"]) == len(pd.read_parquet(together / "segments.parquet"))


@pytest.mark.slow
def test_one_process_prints_and_the_line_counts_all(runs):
    folder, _ = runs
    printed, shown = (folder / "0.out").read_text(), (folder / "0.err").read_text()
    assert printed.count("report  ") == len(CASES)
    lines = [line for line in shown.splitlines() if "100% · " in line]
    assert [line.split(" · ")[1] for line in lines] == ["7/7 documents"] * 2 + ["2/2 documents", "7/7 documents"]
    assert "failed" in printed
    for rank in (1, 2):
        assert (folder / f"{rank}.out").read_text() == "0 0 0 0\n"
        assert (folder / f"{rank}.err").read_text() == ""


@pytest.mark.slow
def test_the_last_logged_point_is_of_all_processes(runs):
    folder, _ = runs
    found = json.loads((folder / "several/alone/summary.json").read_text())
    last = pd.read_csv(next((folder / "logs").rglob("metrics.csv"))).iloc[-1]
    assert int(last.tokens) == found["tokens"]
    assert int(last.flops) == found["flops"]
    assert last.bits_per_byte == pytest.approx(found["bits_per_byte"])
    assert last.static_bits_per_byte == pytest.approx(found["static"]["bits_per_byte"])
    assert last.word_perplexity == pytest.approx(found["word_perplexity"])


# The command itself, which starts the other processes


def command(folder, config, *arguments):
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = arguments or ["--config", "run.yaml"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment.pop("LOCAL_RANK", None)
    return subprocess.run(
        [sys.executable, "-m", "dynlight.fit", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_the_command_starts_the_other_processes(library, tmp_path):
    out = tmp_path / "out"
    done = command(tmp_path, config_of(library, out, TWO, overwrite=True))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report  ") == 1
    lines = done.stderr.splitlines()  # one each ten seconds, and the last
    assert all(" documents" in line for line in lines) and "7/7 documents" in lines[-1]
    assert json.loads((out / "summary.json").read_text())["documents"] == len(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "message"),
    [
        pytest.param(0, "bug", "RuntimeError: a bug in one process", marks=pytest.mark.exhaustive),
        pytest.param(
            1,
            "bug",
            "error: process 1 failed of RuntimeError: a bug in one process; its traceback stands above",
            marks=pytest.mark.exhaustive,
        ),
        (1, "kill", "error: process 1 ended with status -9"),
    ],
)
def test_an_error_in_one_process_ends_all(library, tmp_path, rank, how, message):
    callback = {"class_path": "meddling.FailIn", "init_args": {"rank": rank, "how": how}}
    # The other process would go on for long.
    config = config_of(
        library, tmp_path / "out", TWO | {"callbacks": [callback]}, context={"init_args": {"segment": 1, "memory": 1}}
    )
    done = command(tmp_path, config)
    assert done.returncode == 1
    assert re.search(f"^{re.escape(message)}$", done.stderr, re.MULTILINE), done.stderr
    assert done.stdout == ""
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices",
    [(2, 1), *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ((1, 2), (2, 1, 2)))],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_devices(runs, library, tmp_path, devices):
    one, _, _ = folders(runs, "alone")
    out = tmp_path / "alone"  # the name stands in the summary
    trainers = {1: {"devices": 1, "strategy": "auto"}, 2: {"devices": 2, "strategy": "document_parallel"}}
    config = config_of(library, out, TWO | trainers[devices[0]] | {"callbacks": [{"class_path": "meddling.StopOnce"}]})
    kept = 0
    for number, count in enumerate(devices):
        changed = [f"--trainer.{setting}={value}" for setting, value in trainers[count].items()]
        is_last = number == len(devices) - 1
        if not is_last:
            # One process has read the first document by then, and begun with the next; of two each has read some.
            first = pd.read_parquet(one / "segments.parquet").document.eq(0).sum()
            (tmp_path / "stop").write_text(str(first + 3 if count == 1 else 20))
        done = command(tmp_path, config, *(["--resume", "alone", *changed] if number else ()))
        assert done.returncode == (0 if is_last else 143), done.stderr
        if number:
            (found,) = re.findall(r"^resume: (\d) of 7 documents are kept, and the others", done.stderr, re.MULTILINE)
            assert 7 > int(found) >= max(kept, 1)
            kept = int(found)
    for file in SAME_FILES:
        assert (one / file).read_bytes() == (out / file).read_bytes(), file
    assert summary(one) == summary(out)
    assert json.loads((out / "run.json").read_text())["processes"] == devices[-1]
    assert faults_of(json.loads((out / "receipt.json").read_text())) == []
    assert not (out / "unfinished").exists()
