"""Runs beside one another: margins are paired, what can't be compared is left out and said, the page loads nothing."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from folders import configuration
from recorded import change_run, make_rows

import dynlight
from dynlight import compare as door
from dynlight import fit
from dynlight.errors import SettingError
from dynlight.recording.comparison import pictures
from dynlight.recording.comparison.comparison import compare
from dynlight.recording.comparison.page import bars, best_of, render, verdict
from dynlight.recording.comparison.settings import differing, words
from dynlight.recording.comparison.terminal import WIDTH, printed_comparison
from dynlight.recording.report.text import terminal_width

pytestmark = pytest.mark.page

BIT = math.log(2)
STUDENT_1 = 12.706204736174707  # the 0.975 quantile of Student's t with 1 degree of freedom: tan(0.475 π)
CONFIG = {"update": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.0}}, "seed": 0}


def make(folder, bits, size=10, static=24, names=None, config=CONFIG, hashes=None, files=None, tokens=4):
    """Write a run with a document of one segment for each number of bits."""
    documents = [[(each * BIT, static and static * BIT, tokens, size)] for each in bits]
    make_rows(folder, documents, names or ["a", "b", "c", "d"][: len(bits)])
    change_run(folder, lambda run: run.update(device="cpu", processes=1, versions={"torch": "2.13.0"}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if hashes or files:
        (folder / "receipt.json").write_text(json.dumps({"hashes": hashes or {}, "files": files or {}, "ledger": []}))
    return folder


@pytest.fixture
def base(tmp_path):
    return make(tmp_path / "base", [20, 12])


def notes(*folders, **options):
    return "\n".join(compare([str(folder) for folder in folders], **options).warnings)


def the_other(*folders):
    """The second of two runs beside the first."""
    return compare([str(folder) for folder in folders]).pairs[1]


# Numbers


def test_a_margin_is_paired_by_document(base):
    made = the_other(base, make(base.parent / "better", [15, 11]))
    # δ = 5 and 1 bits of 10 bytes each: m = 6 / 20, and √(2/1 · ((5 − 3)² + (1 − 3)²)) / 20 = 0.2
    assert made.margin == pytest.approx(0.3, rel=1e-12)
    assert (made.low, made.high) == pytest.approx((0.3 - 0.2 * STUDENT_1, 0.3 + 0.2 * STUDENT_1), rel=1e-9)
    assert verdict(made) == "open"
    scores = made.run.scores
    assert (scores.documents, scores.tokens, scores.flops, scores.static_flops, scores.times) == (2, 8, 60, 20, 3.0)
    assert (scores.adapted, scores.static) == pytest.approx((1.3, 2.4))
    assert scores.percent == pytest.approx(100 * 1.1 / 2.4)
    assert (scores.seconds, scores.static_seconds) == (0.5, 0.25)
    assert made.notes == []


def test_the_order_of_documents_does_not_matter_where_each_is_forgotten(base):
    turned = make(base.parent / "turned", [11, 15], names=["b", "a"])
    made = the_other(base, turned)
    assert (made.margin, made.documents, made.notes) == (pytest.approx(0.3), ["a", "b"], [])
    never = CONFIG | {"reset": {"every": "never"}}
    (turned / "config.yaml").write_text(yaml.safe_dump(never))
    assert "another order, which matters as reset.every is never" in notes(base, turned)


def test_only_common_documents_are_compared(base):
    other = make(base.parent / "other", [11, 90], names=["b", "z"])
    made = the_other(base, other)
    assert (made.documents, made.margin, made.low, made.is_drawn) == (["b"], pytest.approx(0.1), None, False)
    said = notes(base, other)
    assert (
        "other: 1 of the baseline's 2 documents can be compared: the margin is over these alone, and no picture" in said
    )
    assert "other: 1 document is in its sums of the table, but neither in the margin nor in a picture" in said
    assert "other: one document can be compared: its margin has no interval" in said
    assert re.search(r"other +2 .* 0\.100 ", printed_comparison(compare([str(base), str(other)])))


def test_further_documents_are_in_no_margin_and_no_picture(base):
    more = make(base.parent / "more", [15, 11, 99])
    made = the_other(base, more)
    assert (made.margin, made.is_drawn) == (pytest.approx(0.3), True)
    (_, drawn) = pictures.drawn_of(compare([str(base), str(more)]))
    assert drawn.scores.adapted == pytest.approx(1.3)
    assert made.run.scores.adapted == pytest.approx(125 / 30)
    assert "1 document is in its sums of the table" in notes(base, more)


def test_an_empty_document_says_nothing_of_how_sure_a_margin_is(base):
    for name, bits in (("x", 20), ("y", 15)):
        make_rows(base.parent / name, [[(bits * BIT, 24 * BIT, 4, 10)], []], ["a", "b"])
    made = the_other(base.parent / "x", base.parent / "y")
    assert (made.margin, made.low) == (pytest.approx(0.5), None)


def test_no_number_comes_of_nothing(base):
    nothing = make(base.parent / "nothing", [12], names=["z"])
    comparison = compare([str(base), str(nothing)])
    assert comparison.pairs[1].margin is None
    assert "no document can be compared: there is no margin, and no picture" in comparison.warnings[0]
    assert best_of(comparison).run is comparison.baseline
    assert "no run is better" in render(comparison)


# What can't be compared


def test_documents_that_are_cut_differently_are_not_compared(base):
    cut = make(base.parent / "cut", [15, 11], size=9, config=CONFIG | {"data": {"max_tokens": 4}})
    assert the_other(base, cut).margin is None
    assert "cut: 2 documents are cut differently, as data.max_tokens differs: not compared" in notes(base, cut)


@pytest.mark.parametrize(
    ("own", "theirs", "documents", "said"),
    [
        (
            {"files": {"a": "1", "b": "2"}},
            {"files": {"a": "1", "b": "3"}},
            ["a"],
            "1 document is other text under the same",
        ),
        (
            {"hashes": {"data": "1"}},
            {"hashes": {"data": "2"}},
            [],
            "texts are not the baseline's, though names and bytes",
        ),
        ({"hashes": {"data": "1"}}, {"hashes": {"data": "1"}}, ["a", "b"], ""),
        (
            {"hashes": {"data": "1", "tokenizer": "1"}},
            {"hashes": {"data": "2", "tokenizer": "2"}},
            ["a", "b"],
            "another tokenizer: compared in bits per byte alone, and not drawn by tokens",
        ),
        (
            {"hashes": {"model": "1"}},
            {"hashes": {"model": "2"}},
            ["a", "b"],
            "other weights of the model, though its settings are the same",
        ),
    ],
    ids=["another file", "other texts", "the same texts", "another tokenizer", "another model"],
)
def test_receipts_tell_what_is_not_the_same(tmp_path, own, theirs, documents, said):
    folders = make(tmp_path / "base", [20, 12], **theirs), make(tmp_path / "other", [15, 11], **own)
    assert the_other(*folders).documents == documents
    assert said in notes(*folders)
    assert bool(said) == bool(notes(*folders))


def test_of_other_tokens_bits_per_byte_alone_are_compared(base):
    finer = make(base.parent / "finer", [15, 11], tokens=8)
    comparison = compare([str(base), str(finer)])
    assert comparison.pairs[1].margin == pytest.approx(0.3)
    drawn = pictures.pictures(comparison, pictures.drawn_of(comparison))
    assert [name for name, svg in drawn.items() if 'id="run-1"' in svg] == ["flops", "seconds"]
    assert "finer: another tokenizer" in notes(base, finer)


def test_another_static_score_of_the_same_model_is_said_with_its_cause(tmp_path):
    contexts = [CONFIG | {"context": {"class_path": "T", "init_args": {"memory": memory}}} for memory in (1, 2)]
    base = make(tmp_path / "base", [20, 12], hashes={"model": "1"}, config=contexts[0])
    other = make(tmp_path / "other", [15, 11], hashes={"model": "1"}, config=contexts[1], static=22)
    said = "another static score of the same model, 2.200 where the baseline has 2.400, as context.memory differs:"
    assert said in notes(base, other)
    near = make(tmp_path / "near", [15, 11], hashes={"model": "1"}, config=contexts[1], static=24 * (1 + 1e-6))
    assert notes(base, near) == ""
    model = make(tmp_path / "model", [15, 11], hashes={"model": "2"}, static=22, config={"model": {"pretrained": "x"}})
    assert "static" not in notes(base, model)


def test_a_run_in_which_nothing_learns_is_one_point(base):
    own = make(base.parent / "own", [24, 16])
    for name in ("segments", "timings"):
        rows = pd.read_parquet(own / f"{name}.parquet")
        rows = rows.assign(static_flops=0) if name == "segments" else rows.assign(static_seconds=1e-4)
        rows.to_parquet(own / f"{name}.parquet")
    comparison = compare([str(base), str(own)])
    scores = comparison.pairs[1].scores(comparison.pairs[1].run)
    assert (scores.static_flops, scores.static_seconds, scores.times) == (None, None, 1.0)
    drawn = pictures.drawn_of(comparison)
    for cost in ("flops", "seconds"):
        assert min(point.cost for point in pictures._points(drawn, cost)) > 1e-3
        assert [point.label for point in pictures._points(drawn, cost)] == ["base", "own", "static"]


def test_adapters_do_not_make_another_model(tmp_path):
    """Their weights are in the hash of the model, so it differs where other parameters learn."""
    lora = CONFIG | {"parameters": {"class_path": "LoRA", "init_args": {"rank": 8}}}
    base = make(tmp_path / "base", [20, 12], hashes={"model": "1"}, config=CONFIG)
    other = make(tmp_path / "other", [15, 11], hashes={"model": "2"}, config=lora)
    assert "other weights" not in notes(base, other)
    worse = make(tmp_path / "worse", [15, 11], hashes={"model": "2"}, config=lora, static=22)
    assert "another static score of the same model" in notes(base, worse)


def test_runs_that_failed_or_lack_something_are_said(base):
    failed = make(base.parent / "failed", [15, 11, 7])
    change_run(failed, lambda run: run["documents"][2].update(failed={"segment": 0, "reason": "nats are infinite"}))
    alone = make(base.parent / "alone", [15, 11], static=None)
    device = make(base.parent / "device", [15, 11])
    change_run(device, lambda run: run.update(device="cuda:0"))
    uncounted = make(base.parent / "uncounted", [15, 11])
    rows = pd.read_parquet(uncounted / "segments.parquet").astype({"flops": "float64"}).assign(flops=np.nan)
    rows.to_parquet(uncounted / "segments.parquet")
    finished = make(base.parent / "finished", [15, 11])
    change_run(finished, lambda run: run["documents"][1].update(finished_static={"segment": 0, "reason": "infinite"}))
    comparison = compare([str(base), *map(str, (failed, alone, device, uncounted, finished))])
    assert comparison.warnings == [
        "failed: 1 of 3 documents failed and is in no sum",
        "alone: no static reference: it has no gain, and no static point",
        "device: seconds are of another device, or of more processes: not drawn against them",
        "uncounted: FLOPs could not be counted: not drawn against them",
        "finished: 1 document is read to the end by the initial weights, as the learned ones had failed",
    ]
    drawn = pictures.pictures(comparison, pictures.drawn_of(comparison))
    assert {name: sorted(set(re.findall(r'id="run-(\d)"', svg))) for name, svg in drawn.items()} == {
        "flops": ["0", "1", "2", "3", "5"],
        "seconds": ["0", "1", "2", "4", "5"],
        "position": ["0", "1", "3", "4", "5"],
        "tokens": ["0", "1", "2", "3", "4", "5"],
    }
    assert [made.margin for made in comparison.pairs[1:]] == pytest.approx([0.3] * 5)


def test_what_is_said_of_many_runs_is_said_once(base):
    for number in range(9):
        make(base.parent / f"sweep/{number}", [15, 11], static=None)
    assert notes(base, base.parent / "sweep").count("no static reference") == 1
    assert "0, 1, 2, 3, 4 and 4 more: no static" in notes(base, base.parent / "sweep")


# Which runs


def test_runs_are_found_by_folder_glob_and_what_holds_them(base, monkeypatch):
    above = base.parent
    for name in ("sweep/lr0.5", "sweep/lr10", "sweep/lr9", "one"):
        make(above / name, [15, 11])
    (above / "sweep/again").symlink_to(above)  # a circle
    (above / "sweep/lr9/wandb").mkdir()
    monkeypatch.chdir(above)
    given = ["base", "sweep", "one", f"{above}/on*", "./base"]
    assert [made.run.name for made in compare(given).pairs] == ["base", "lr0.5", "lr9", "lr10", "one"]
    make(above / "two/lr9", [15, 11])
    assert [made.run.name for made in compare(["sweep", "two"]).pairs][2:] == ["sweep/lr10", "two/lr9"]


def test_unfinished_and_damaged_runs_are_left_out(base):
    runs = base.parent
    make(runs / "other", [15, 11])
    (runs / "unfinished").mkdir()
    (runs / "unfinished/config.yaml").write_text("seed: 0")
    (make(runs / "damaged", [15, 11]) / "segments.parquet").write_text("rows")
    (runs / "x-audit").mkdir()
    given = [str(runs / name) for name in ("base", "other", "unfinished", "damaged", "x-audit")]
    comparison = compare(given)
    assert [made.run.name for made in comparison.pairs] == ["base", "other"]
    left_out = dict(zip(("unfinished", "empty", "damaged"), comparison.warnings, strict=True))
    assert f"{runs / 'unfinished'} is unfinished (no run.json): go on with" in left_out["unfinished"]
    assert left_out["empty"] == f"{runs / 'x-audit'} holds no run; left out"
    assert f"{runs / 'damaged'} is damaged: folder must have a whole segments.parquet" in left_out["damaged"]


def test_the_baseline_is_the_first_or_the_one_that_is_named(base):
    better, best = (make(base.parent / name, bits) for name, bits in (("better", [15, 11]), ("best", [10, 8])))
    given = [str(base), str(better)]
    assert compare(given).baseline.name == "base"
    assert compare(given, "better").pairs[0].margin == pytest.approx(-0.3)
    assert compare(given, str(better) + "/").baseline.name == "better"
    beside = compare(given, str(best))  # a run beside those that are given
    assert [made.run.name for made in beside.pairs] == ["best", "base", "better"]


# Settings


def test_settings_in_which_runs_differ():
    def adam(lr, **others):
        return {"update": "Adam", "update.lr": lr, "update.betas": [0.9, 0.99], "update.amsgrad": False, **others}

    sgd = {"update": "SGD", "update.lr": 0.1, "update.momentum": 0.0}
    assert differing([adam(0.1), adam(0.2)]) == ["update.lr"]
    assert differing([adam(0.1), sgd]) == ["update", "update.betas"]
    assert differing([adam(0.1), adam(0.1, clip=None)]) == []
    assert words(adam(0.002), sgd) == "update Adam, update.lr 0.002, update.betas [0.9, 0.99]"
    assert words(sgd, sgd | {"clip": 1.0}) == ""


def test_only_what_differs_is_shown(base):
    changed = {"update": {"class_path": "SGD", "init_args": {"lr": 0.2, "momentum": 0.0}}, "seed": 0, "out": "runs/x"}
    other = make(base.parent / "other", [15, 11], config=changed | {"trainer": {"logger": {"class_path": "W"}}})
    change_run(other, lambda run: run.update(versions={"torch": "2.11.0"}))
    comparison = compare([str(base), str(other)])
    assert comparison.differing == ["update.lr", "versions.torch"]
    html = render(comparison)
    listed = re.search(r'<dl class="settings">.*</dl>', html, re.S)[0]
    assert re.findall("<dt>(.*?)</dt>", listed) == comparison.differing
    assert "<b>0.1</b> base; <b>0.2</b> other" in listed
    assert "update.lr 0.2, versions.torch 2.11.0" in printed_comparison(comparison)
    assert "The runs do not differ in a setting" in render(
        compare([str(base), str(make(base.parent / "same", [1, 2]))])
    )


# The table and the page


def test_the_printed_table_is_aligned_and_fits(base):
    wide = base.parent / ("戦争" * 40)
    make(wide, [15, 11], config=CONFIG | {"seed": 1})
    make(base.parent / "other", [2000, 1000])
    lines = printed_comparison(compare([str(base), str(wide), str(base.parent / "other")])).splitlines()
    assert max(map(terminal_width, lines)) <= WIDTH
    table = [line for line in lines[: lines.index(lines[1], 2)] if not line.startswith((" ", "─"))]
    assert {terminal_width(line) for line in table} == {WIDTH} and len(table) == 4
    assert lines[0].split()[-1] == "seconds" and "baseline" in lines[2]


def test_the_front_has_what_is_cheaper_or_better_than_all_else():
    points = [(2, 2.0), (1, 3.0), (3, 2.0), (4, 1.0), (1, 4.0), (None, 0.1), (2, None)]
    assert pictures.front(points) == [1, 0, 3]
    assert pictures.front([]) == []


def test_of_many_runs_the_baseline_and_the_front_are_named(base):
    for number in range(20):
        make(base.parent / f"sweep/{number}", [25 - number, 12])
    comparison = compare([str(base), str(base.parent / "sweep")])
    drawn = pictures.drawn_of(comparison)
    assert len(drawn) == 21  # all cost the same, so the best alone is the front
    assert {each.pair.run.name: each.colour for each in drawn if each.colour} == {
        "base": pictures.COLOURS[0],
        "19": pictures.COLOURS[1],
    }
    html = render(comparison)
    assert "the other 19 are pale" in html
    assert "<title>7, 1.500 bits per byte</title>" in html
    few = compare([str(base), *(str(base.parent / f"sweep/{number}") for number in range(6))])
    assert all(each.colour for each in pictures.drawn_of(few))


def test_bars_share_a_line(base):
    better, worse = (make(base.parent / name, bits) for name, bits in (("better", [15, 7]), ("worse", [30, 22])))
    comparison = compare([str(base), str(worse), str(better)])
    zero, placed = bars(comparison.pairs[1:])
    assert [(made.run.name, *place) for made, *place in placed] == [
        ("better", 100.0, 100.0, 0.0),  # both documents by the same: the interval has no length
        ("worse", 0.0, 0.0, 0.0),
    ]
    assert zero == pytest.approx(66.67)
    assert [verdict(made) for made, *_ in placed] == ["better", "worse"]


def test_the_page_loads_nothing_and_escapes_names(base):
    attack = "<script>alert(1)<∕script>$x$"
    make(base.parent / attack, [15, 11], config=CONFIG | {"seed": attack})
    html = render(compare([str(base), str(base.parent / attack)]))
    assert "http" not in html and "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert not re.findall(r"<(?:link|img|iframe|object|base)\b", html)
    assert [value for value in re.findall(r'(?:src|href)="([^"]*)"', html) if value[0] != "#"] == []
    assert html.count("<script>") == 1 and html.count("&lt;script&gt;") > 3
    assert html.count("<svg") == 4


def test_the_page_has_the_style_of_the_report(base):
    make(base.parent / "other", [15, 11])
    html = render(compare([str(base), str(base.parent / "other")]))
    (sheet,) = re.findall(r"<style>(.*?)</style>", html, re.S)[:1]
    own = sheet.partition(".swatch")[2].partition("@media (prefers-color-scheme: dark) {\n")[0]
    assert re.findall(r"#[0-9a-f]{3,6}\b", own) == []  # colours have their dark ones in one place
    assert "prefers-color-scheme: dark" in sheet and "@media print" in sheet and "max-width: 520px" in sheet


def test_the_same_runs_give_the_same_bytes(base):
    make(base.parent / "other", [15, 11])
    given = [str(base), str(base.parent / "other")]
    assert render(compare(given)) == render(compare(given))


# The command


def test_command(base, capsys):
    make(base.parent / "other", [15, 11])
    assert door.main([str(base), str(base.parent / "other")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run ") and out.endswith(f"\n{base.parent / 'compare.html'}\n")
    assert "0.300 ± 2.541" in out and "0.300 ± 2.541" in (base.parent / "compare.html").read_text("utf-8")
    assert door.main([str(base.parent), "--baseline=other", "--out", str(base / "x.html")]) == 0
    assert "−0.300 ± 2.541" in (base / "x.html").read_text("utf-8")
    assert door.main(["--help"]) == 0
    assert capsys.readouterr().out.endswith(door.HELP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "runs must be folders that exist, got {}/nowhere"),
        (["{}/base"], "runs must be at least 2 that were finished, got 1"),
        (["{}/base", "{}/empty"], "runs must be at least 2 that were finished, got 1; {}/empty holds no run"),
        (
            ["{}/base", "{}/other", "--baseline", "x"],
            "baseline must be one of the runs, got x; the first of them: base, oth",
        ),
        (
            ["{}/base", "{}/other", "--out", "{}/x.pdf"],
            "out must be the name of a file that ends with .html, got {}/x.pdf",
        ),
        (["{}/base", "{}/other", "--out", "{}/y/x.html"], "out must lie in a folder that exists, got {}/y/x.html"),
        (["{}/base", "{}/other", "--out"], "out must be given a value, got nothing"),
        (["{}/base", "--sort", "x"], "an option must be one of --baseline, --out, got --sort"),
    ],
)
def test_what_cannot_be_run_is_an_error_of_one_line(base, capsys, arguments, message):
    make(base.parent / "other", [15, 11])
    (base.parent / "empty").mkdir()
    assert door.main([argument.format(base.parent) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(base.parent, base.parent)) and error.count("\n") == 1
    assert not list(base.parent.rglob("*.html"))


def test_a_damaged_receipt_or_configuration_is_named(base):
    for name, text in (("receipt.json", "[]"), ("config.yaml", "- {")):
        damaged = make(base.parent / "damaged", [15, 11])
        (damaged / name).write_text(text)
        with pytest.raises(SettingError, match=f"damaged: folder must have a whole {name}"):
            compare([str(base), str(damaged)])
        shutil.rmtree(damaged)


def test_real_runs_agree_with_their_summaries(tmp_path, library):
    for name, lr in (("slow", 0.01), ("quick", 0.2)):
        config = configuration(library / "model", f"{library}/documents/*.txt", tmp_path / name)
        config["update"]["init_args"]["lr"] = lr
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert fit.main(["--config", str(tmp_path / f"{name}.yaml")]) == 0
    made = the_other(tmp_path / "slow", tmp_path / "quick")
    tables = [pd.read_csv(tmp_path / name / "documents.csv") for name in ("slow", "quick")]
    summary = json.loads((tmp_path / "quick/summary.json").read_text())
    assert (
        made.run.scores.adapted == summary["bits_per_byte"]
        and made.run.scores.static == summary["static"]["bits_per_byte"]
    )
    assert (made.run.scores.flops, made.run.scores.percent) == (summary["flops"], summary["gain_percent"])
    bits = (tables[0].nats - tables[1].nats) / BIT
    size = tables[0].bytes
    assert made.margin == pytest.approx(bits.sum() / size.sum(), rel=1e-9)
    spread = math.sqrt(2 * ((bits - made.margin * size) ** 2).sum()) / size.sum()
    assert made.high - made.margin == pytest.approx(STUDENT_1 * spread, rel=1e-6)
    assert made.notes == []
    assert differing([made.run.settings, made.baseline.settings]) == ["update.lr"]


# Time


def test_needs_no_torch():
    code = "import sys, types; package = types.ModuleType('dynlight'); package.__path__ = sys.argv[1:]; "
    code += "sys.modules['dynlight'] = package; import dynlight.compare; "
    code += "import dynlight.recording.comparison.page, dynlight.recording.comparison.terminal; "
    code += "assert not {'torch', 'transformers', 'lightning', 'scipy.stats'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code, dynlight.__path__[0]], check=True)


@pytest.mark.slow
def test_fifty_runs_take_two_seconds(tmp_path):
    """CPU seconds of the command, its start included; the quickest of three, as the first may read from disk."""
    segments = [(9.0, 10.0, 64, 150)] * 96
    first = make_rows(tmp_path / "runs/0", [segments] * 12)
    (first / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    ledger = [
        [document, segment, 64, 9.0, "0" * 16, "1" * 16, "2" * 64] for document in range(12) for segment in range(96)
    ]
    (first / "receipt.json").write_text(json.dumps({"hashes": {}, "files": {}, "ledger": ledger}))
    for number in range(1, 50):
        shutil.copytree(first, tmp_path / f"runs/{number}")
    seconds = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-m", "dynlight.compare", str(tmp_path / "runs")], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert child.returncode == 0
    assert min(seconds) < 2
    assert (tmp_path / "runs/compare.html").stat().st_size < 1_000_000
