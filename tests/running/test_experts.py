"""A run at many rates, from the configuration to what a person sees."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml
from folders import configuration, save_documents
from scipy.stats import ttest_rel

from dynlight import fit
from dynlight.recording.report import files
from dynlight.recording.report.rates import best_rate_sentence, paired_margin

RATES = [0.02, 0.1]


def run(library, name, **settings):
    config = configuration(library / "model", f"{library}/documents/*.txt", library / name)
    config["trainer"] |= {"logger": settings.pop("logger", False)}
    file = library / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config | settings))
    assert fit.main(["--config", str(file)]) == 0
    return json.loads((library / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def mixed(library):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(library / "logs")}}
    return run(library, "mixed", update={"class_path": "SGD"}, rates=RATES, logger=logger)


def test_the_summary_has_a_row_for_each_rate_as_of_a_run_with_that_rate(library, mixed):
    static, *learned = mixed["experts"]
    assert static["name"] == "static"
    assert static["nats"] == pytest.approx(mixed["static"]["nats"])
    for expert, rate in zip(learned, RATES, strict=True):
        alone = run(library, f"alone {rate}", update={"class_path": "SGD", "init_args": {"lr": rate}})
        assert (expert["rule"], expert["rate"], expert["failed"]) == ("SGD", rate, 0)
        assert expert["nats"] == pytest.approx(alone["nats"], rel=1e-5)
        assert expert["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)
    assert sum(expert["share"] for expert in mixed["experts"]) == pytest.approx(1)
    assert mixed["nats"] <= min(expert["nats"] for expert in mixed["experts"]) + mixed["documents"] * 6
    assert "SGD(lr 0.02) and SGD(lr 0.1) · mixture(switching 0.002)" in mixed["protocol"]


def test_the_flops_are_those_of_all_experts(library, mixed):
    alone = json.loads((library / f"alone {RATES[0]}" / "summary.json").read_text())
    assert mixed["flops"] == 2 * alone["flops"] + alone["static"]["flops"]
    assert mixed["updates"] == 2 * alone["updates"]


def test_tokens_hold_what_every_expert_said_so_that_they_can_be_mixed_again(library, mixed):
    tokens = pd.read_parquet(library / "mixed/tokens.parquet")
    segments = pd.read_parquet(library / "mixed/segments.parquet")
    for document, part in tokens.groupby("document"):
        chances = np.exp(-np.stack(part.expert_nats).astype(np.float64))
        weights = np.full(3, 1 / 3)
        nats = 0.0
        for chance in chances:
            nats -= math.log(weights @ chance)
            weights = (1 - 0.002) * weights * chance / (weights @ chance) + 0.002 / 3
        assert segments[segments.document == document].nats.sum() == pytest.approx(nats, rel=1e-6)
        assert np.stack(part.expert_nats)[:, 0] == pytest.approx(part.static_nats.to_numpy())


def test_experts_are_recorded_segment_by_segment(library, mixed):
    experts = pd.read_parquet(library / "mixed/experts.parquet")
    segments = pd.read_parquet(library / "mixed/segments.parquet")
    assert len(experts) == 3 * len(segments)
    shares = experts.groupby(["document", "segment"]).share.sum()
    np.testing.assert_allclose(shares, 1)
    static = experts[experts.expert == 0].nats.to_numpy()
    np.testing.assert_allclose(static, segments.static_nats, rtol=1e-6)


def test_the_weights_are_logged(library, mixed):
    (log,) = (library / "logs").rglob("metrics.csv")
    logged = pd.read_csv(log)
    weights = logged[["weight/static", "weight/SGD(lr 0.02)", "weight/SGD(lr 0.1)"]]
    np.testing.assert_allclose(weights.sum(axis=1), 1)


@pytest.mark.page
def test_a_person_sees_the_rates(library, mixed, capsys):
    files.write(library / "mixed")
    page = (library / "mixed/report.html").read_text()
    assert "<h2>Experts</h2>" in page
    for name in ("static", "SGD(lr 0.02)", "SGD(lr 0.1)", "mixture", "bits per byte of each rate alone"):
        assert name in page
    assert mixed["best_rate"]["documents"] == mixed["documents"]
    run(library, "seen", update={"class_path": "SGD"}, rates=RATES)
    shown = capsys.readouterr().out
    assert "weight, %" in shown
    assert "was best, by" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80


def test_a_mixture_needs_no_rule_and_no_rate(library):
    summary = run(library, "free", update=None, mixture={})
    assert [expert["rule"] for expert in summary["experts"]] == [None, *["SGD"] * 3, *["Adam"] * 3]
    assert summary["bits_per_byte"] <= summary["static"]["bits_per_byte"] + 0.2


def test_a_rate_that_fails_has_no_score_and_is_not_the_best(library, capsys):
    summary = run(library, "failing", update={"class_path": "SGD"}, rates=[0.05, 1e12])
    failed = summary["experts"][2]
    assert failed["failed"] > 0
    assert failed["nats"] is None
    assert failed["bits_per_byte"] is None
    assert summary["failed"] == []
    assert summary["best_rate"]["rate"] == 0.05
    assert summary["best_rate"]["runner_up"] is None
    shown = capsys.readouterr().out
    assert f"failed on {failed['failed']}" in shown
    assert "beside static, only SGD(lr 0.05) read all documents to their end" in shown


def test_a_document_without_text_is_no_failure_of_the_rates(library):
    folder = save_with_an_empty_one(library)
    summary = run(
        library, "empty", update={"class_path": "SGD"}, rates=RATES, data={"path": "text", "data_files": folder}
    )
    assert [expert["failed"] for expert in summary["experts"]] == [0, 0, 0]
    assert summary["documents"] == 3
    assert summary["best_rate"]["documents"] == 2


def save_with_an_empty_one(library):
    pattern = save_documents(library / "with an empty one")
    (library / "with an empty one/c.txt").write_text("")
    return pattern


def test_rates_without_a_reference(library):
    summary = run(library, "alone", update={"class_path": "SGD"}, rates=RATES, reference=None)
    assert [expert["rate"] for expert in summary["experts"]] == RATES
    assert summary["static"] is None


def test_the_margin_of_documents_of_equal_size_has_students_interval():
    first, second = np.random.default_rng(0).normal(2, 0.1, (2, 9))
    margin, low, high = paired_margin(64 * (second - first), np.full(9, 64))
    expected = ttest_rel(second, first).confidence_interval(0.95)
    assert (margin, low, high) == pytest.approx((np.mean(second - first), expected.low, expected.high))


def test_the_margin_weighs_documents_by_their_bytes_and_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        size = generator.integers(1_000, 30_000, 20)
        bits = size * (0.05 + generator.normal(0, 0.1, 20))
        _, low, high = paired_margin(bits, size)
        covered += low < 0.05 < high
    assert 0.90 < covered / 400 < 0.98


def test_one_document_says_nothing_of_how_sure_it_is():
    assert paired_margin(np.array([3.0]), np.array([10])) == (0.3, None, None)
    best = {"name": "SGD(lr 1)", "runner_up": "SGD(lr 2)", "margin_bits_per_byte": 0.3, "margin_low": None}
    assert "one document says nothing" in best_rate_sentence(best)
    assert best_rate_sentence(None) == "no expert but static read all documents to their end"
