"""The report of a run: sums are exact, ratios right, failures apart; the page is one bounded, escaped file that loads nothing."""

import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from recorded import FLOPS, SECONDS, change_run, make_rows

import dynlight
from dynlight import report
from dynlight.durable import write_text
from dynlight.errors import SettingError
from dynlight.recording.report import files, mixture_pictures, page
from dynlight.recording.report.files import write
from dynlight.recording.report.pictures import gain_by_position
from dynlight.recording.report.ratios import bits_per_byte, nats_per_token, word_perplexity
from dynlight.recording.report.summary import summarise
from dynlight.recording.report.tables import Rows, documents_table, scores
from dynlight.recording.report.terminal import printed_table
from dynlight.recording.report.text import si, terminal_width

pytestmark = [pytest.mark.page, pytest.mark.filterwarnings("error")]  # no empty mean, no missing glyph

MODULES = "argparse inspect typing ast difflib pickle tarfile turtle decimal doctest zipfile statistics".split()


def make_run(folder, documents=12, segment=64, tokens=3000, reference=True, pieces=True, failed=None, seed=0):
    """Write the folder of a run whose gains grow as its documents are read, each by its own rate; the last is empty."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    entries, rows, timings, texts = [], [], [], []
    for document in range(documents):
        name = f"{MODULES[document % len(MODULES)]}.py"
        source = inspect.getsource(importlib.import_module(name[:-3])) if pieces else ""
        words = re.findall(r"\n *|\s?\w{1,6}|\s?[^\w\s]{1,2}|\s", source)
        count = 0 if document == documents - 1 else int(tokens * random.lognormal(0, 0.6))
        words = (words * (1 + count // max(1, len(words))))[:count] if pieces else ["ab c"] * count
        at = np.arange(count)
        size = np.array([len(word.encode()) for word in words], np.int64)
        static = random.gamma(1.6, 1.3, count) * (1 + 0.4 * np.sin(at / 700 + document)) + 0.05
        learned = (0.42 - 0.045 * (document % 12)) * (1 - np.exp(-(at // segment) * segment / 900))
        adapted = np.maximum(static * (1 - learned) + random.normal(0, 0.5, count) * (at >= segment), 0.001)
        starts = np.arange(0, count, segment)
        block = pd.DataFrame({"document": document, "segment": np.arange(len(starts)), "start": starts})
        block["tokens"] = np.minimum(segment, count - starts)
        for column, values in (("bytes", size), ("nats", adapted), ("static_nats", static)):
            block[column] = np.add.reduceat(values, starts) if count else values
        block["learned"], block["updates"] = True, 1
        for column, per_token in FLOPS.items():
            block[column] = (block.tokens * (per_token + 300 * np.minimum(starts, 384))).astype("int64")
        block["flops"] = sum(block[column] for column in FLOPS)
        block["update_flops"], block["static_flops"] = 2_600_000 * 14, block["forward_flops"] if reference else 0
        seconds = 0.02 * random.lognormal(0, 0.2, (len(starts), 3))
        timings.append(block[["document", "segment"]].assign(**dict(zip(SECONDS, seconds.T, strict=True))))
        failure = {"segment": 9, "reason": "nats are not finite"} if document == failed else None
        if failure:
            block = block[block.segment <= 9].copy()
            block.loc[block.segment == 9, "nats"] = np.nan
        rows.append(block)
        texts.append(
            pd.DataFrame({"token": at, "segment": at // segment, "text": words, "nats": adapted, "static_nats": static})
        )
        texts[-1].insert(0, "document", document)
        entry = {"document": document, "name": name, "tokens": count, "bytes": int(size.sum()), "words": count // 3}
        entries.append({**entry, "failed": failure})
    rows, timings, texts = (pd.concat(parts, ignore_index=True) for parts in (rows, timings, texts))
    timings["seconds"] = timings[SECONDS].sum(axis=1)
    if not reference:
        rows["static_nats"] = texts["static_nats"] = np.nan
    small = ("document", "segment", "tokens", "updates")
    rows = rows.astype({column: "int32" for column in small})
    rows.to_parquet(folder / "segments.parquet", row_group_size=1000)
    timings.to_parquet(folder / "timings.parquet")
    if pieces:
        texts.astype({"nats": "float32", "static_nats": "float32"}).to_parquet(
            folder / "tokens.parquet", row_group_size=5000
        )
    run = {
        "name": "quickstart",
        "documents": entries,
        "protocol": "TransformerXL(segment 64, memory 384) · All · SGD(lr 0.03) · every 1 · reset every document",
        "seconds": 61.3,
        "peak_memory_bytes": 412_000_000,
        "learned_parameters": 2_600_000,
        "parameters": 2_600_000,
        "device": "cpu",
        "versions": {"dynlight": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "command": "python -m dynlight.fit --config configs/quickstart.yaml",
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(
        "model: {pretrained: tiny-books}\nupdate:\n  class_path: SGD\n  init_args: {lr: 0.03}\n"
    )
    return folder


class Page(HTMLParser):
    """What a browser would see: elements, and the text of excerpts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag == "div":
            self.inside = ("class", "text") in attrs
            self.texts += [""] if self.inside else []

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "div"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "quickstart", failed=3)
    write(folder)
    return folder


def test_sums_are_exact_in_any_order(tmp_path):
    folder = make_rows(tmp_path, [[(0.1, 0.3, 4, 9)] * 10, [(1e16, 1.0, 1, 1), (1.0, 1.0, 1, 1), (1.0, 1.0, 1, 1)]])
    rows = pd.read_parquet(folder / "segments.parquet")
    rows.loc[0, "flops"] = 2**60 + 1
    rows.sample(frac=1, random_state=0).to_parquet(folder / "segments.parquet")
    table = documents_table(folder)
    assert sum([0.1] * 10) != 1.0  # what plain addition would give
    assert table.nats.tolist() == [1.0, 1e16 + 2]
    assert table.static_nats.tolist() == [math.fsum([0.3] * 10), 3.0]
    assert table.flops.tolist() == [2**60 + 1 + 9 * 30, 90]
    assert table.tokens.tolist() == [40, 3]
    assert table.bytes.tolist() == [90, 3]
    assert table.columns[:9].tolist() == "document name tokens bytes words nats static_nats updates flops".split()
    assert [table[name].dtype for name in ("tokens", "bytes", "flops", "updates")] == [np.int64] * 4


def test_ratios():
    assert nats_per_token(6.0, 4) == 1.5
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3.0, rel=1e-15)
    assert word_perplexity(math.log(8) * 5, 5) == pytest.approx(8.0, rel=1e-14)
    assert [nats_per_token(1.0, 0), bits_per_byte(1.0, 0), word_perplexity(1.0, 0)] == [None] * 3
    assert word_perplexity(1e6, 1) is None
    assert bits_per_byte(math.nan, 3) is None
    of_arrays = bits_per_byte(np.array([math.log(2), 1.0]), np.array([1, 0]))
    assert of_arrays[0] == 1.0 and np.isnan(of_arrays[1])


def test_summary_holds_sums_and_ratios_of_sums(tmp_path):
    summary = summarise(make_rows(tmp_path, [[(2.0, 3.0, 4, 8), (1.0, 2.0, 2, 3)], [(4.0, 4.5, 4, 10)]]))
    assert {name: summary[name] for name in ("documents", "tokens", "bytes", "words", "nats", "updates")} == {
        "documents": 2, "tokens": 10, "bytes": 21, "words": 5, "nats": 7.0, "updates": 3,
    }  # fmt: skip
    assert summary["nats_per_token"] == 0.7
    assert summary["bits_per_byte"] == pytest.approx(7 / (21 * 0.6931471805599453))
    assert summary["word_perplexity"] == pytest.approx(math.exp(7 / 5))
    assert summary["static"]["nats"] == 9.5
    assert summary["static"]["flops"] == 30
    assert summary["static"]["seconds"] == 0.375
    assert summary["gain_bits_per_byte"] == pytest.approx(2.5 / (21 * 0.6931471805599453))
    assert summary["gain_percent"] == pytest.approx(100 * 2.5 / 9.5)
    assert (summary["flops"], summary["forward_flops"], summary["update_flops"]) == (90, 30, 6)
    assert (summary["seconds"], summary["scoring_seconds"], summary["tokens_per_second"]) == (2.0, 0.375, 5.0)


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    ballast = b"x" * 2**30
    code = "import torch; from dynlight.recording.records import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < len(ballast)


def test_files_agree_with_the_rows(run):
    def refuse(constant):
        raise AssertionError(constant)

    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary == summarise(run)
    always = "documents tokens bytes words nats nats_per_token bits_per_byte word_perplexity updates flops seconds"
    assert {*always.split(), "peak_memory_bytes", "protocol", "static", "failed"} <= summary.keys()
    assert {*always.split()} - {"documents", "updates"} <= summary["static"].keys()
    rows = pd.read_parquet(run / "segments.parquet").query("document != 3")
    assert summary["nats"] == pytest.approx(math.fsum(rows.nats), rel=1e-15)
    assert summary["flops"] == int(rows.flops.sum())
    written = pd.read_csv(run / "documents.csv")
    assert written.columns[:9].tolist() == "document name tokens bytes words nats static_nats updates flops".split()
    assert math.fsum(written.nats.dropna()) == summary["nats"]
    assert not [name for name in written if "seconds" in name]  # the same run twice gives the same file
    assert not list(run.glob(".*"))


def test_failed_documents_are_marked_and_in_no_sum(tmp_path):
    good = [[(2.0, 3.0, 4, 8)], [(4.0, 4.5, 4, 10)]]
    bad = [[(1.0, 1.0, 4, 8), (math.nan, 1.0, 4, 8)], [(1.0, 1.0, 4, 8)], [(1.0, 1.0, 4, 8)]]
    folder = make_rows(tmp_path / "all", [good[0], *bad, good[1]])
    reason = {"segment": 7, "reason": "nats are infinite"}

    def fail(run):
        run["documents"][2]["failed"] = reason
        run["documents"][3]["tokens"] = 9

    change_run(folder, fail)
    summary, alone = summarise(folder), summarise(make_rows(tmp_path / "good", good))
    assert {**summary, "failed": []} == alone
    assert summary["failed"] == [
        {"document": 1, "name": "document 1", "segment": 1, "reason": "nats are not finite"},
        {"document": 2, "name": "document 2", **reason},
        {"document": 3, "name": "document 3", "segment": None, "reason": "4 of 9 tokens were scored"},
    ]
    table = documents_table(folder)
    assert table.nats.isna().tolist() == [False, True, True, True, False]
    assert table.flops.tolist() == [30, 60, 30, 30, 30]
    write(folder)
    assert "3 of 5 documents failed" in (folder / "report.html").read_text()
    printed = printed_table(folder)
    assert "not in the sums: document 2 failed in segment 7: nats are infinite" in printed
    assert printed.count("failed") == 6


@pytest.mark.parametrize("documents", [[], [[]], [[], []]], ids=["no document", "an empty one", "two empty ones"])
def test_nothing_to_divide_by(tmp_path, documents):
    summary = write(make_rows(tmp_path, documents))
    assert summary["documents"] == len(documents)
    assert (summary["nats"], summary["tokens"], summary["flops"]) == (0.0, 0, 0)
    assert [summary[name] for name in ("nats_per_token", "bits_per_byte", "word_perplexity", "static")] == [None] * 4
    assert len(pd.read_csv(tmp_path / "documents.csv")) == len(documents)
    assert f"all {len(documents)}" in printed_table(tmp_path)


def test_an_empty_document_adds_nothing(tmp_path):
    summary = write(make_rows(tmp_path, [[(2.0, 3.0, 4, 8)], []]))
    assert (summary["documents"], summary["tokens"], summary["failed"]) == (2, 4, [])
    assert documents_table(tmp_path).static_nats.tolist() == [3.0, 0.0]


def test_without_a_reference_nothing_static_is_shown(tmp_path):
    folder = make_run(tmp_path, documents=3, reference=False)
    summary = write(folder)
    assert summary["static"] is None and summary["gain_bits_per_byte"] is None
    assert "static" not in printed_table(folder)
    html = (folder / "report.html").read_text()
    assert "A gain needs the static model" in html and ">static " not in html
    assert re.search(r'class="plain\d"', html) and not re.search(r'class="(better|worse)\d"', html)


def test_page_loads_nothing(tmp_path):
    write(make_run(tmp_path, documents=4, pieces=False))
    html = (tmp_path / "report.html").read_text()
    seen = Page(html)
    assert "http" not in html and "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert not {"link", "img", "iframe", "object", "base"} & set(seen.tags)
    assert not [
        value for _, name, value in seen.attributes if name in ("src", "href", "xlink:href") and value[0] != "#"
    ]
    assert seen.tags.count("svg") == 3
    assert "The scores of single tokens were not kept" in html


def test_the_page_has_a_dark_a_printed_and_a_narrow_form(run):
    (sheet,) = re.findall(r"<style>(.*?)</style>", (run / "report.html").read_text(), re.S)[:1]
    light, dark, printed, narrow = re.split(r"\n@media \([^)]*\) \{|\n@media print \{", sheet)
    defined = [set(re.findall(r"(--[a-z]+): #", part)) for part in (light, dark)]
    assert defined[1] == defined[0] >= {"--page", "--ink", "--line"}  # each colour has its dark one
    elsewhere = light.split("* { box-sizing")[1]
    assert re.findall(r"#[0-9a-f]{3,6}\b", elsewhere) == []
    assert "invert" in dark
    assert "print-color-adjust: exact" in printed
    assert "figure svg { min-width" in narrow


def test_page_escapes_whatever_a_document_holds(tmp_path):
    attack = "<script>alert(1)</script>"
    text = [attack, "\n\n    ", "</div>", "&amp;", "\t", "\"'", "\x00\x1b", "\u202e", "é", ""] * 20
    folder = make_rows(
        tmp_path, [[(2.0, 3.0, len(text), 8)], [(9.0, 1.0, 1, 8)]], [attack, "\x1b[31m\u202e\n\ud800name"]
    )
    pieces = pd.DataFrame({"document": 0, "token": range(len(text)), "segment": 0, "text": text, "nats": 1.0})
    pieces.assign(static_nats=3.0).to_parquet(folder / "tokens.parquet")
    (folder / "config.yaml").write_text(f"out: '{attack}'")
    change_run(
        folder,
        lambda run: run.update(name=attack + "\ud800", protocol=attack, command=attack, versions={attack: attack}),
    )
    change_run(folder, lambda run: run["documents"][1].update(failed={"segment": 0, "reason": attack}))
    write(folder)
    html = (folder / "report.html").read_text()
    seen = Page(html)
    assert attack not in html and html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    assert seen.tags.count("script") == 1  # the page's own
    assert not {"\x00", "\x1b", "\u202e"} & set(html + printed_table(folder))
    shown = "".join(text).translate({0: "␀", 0x1B: "␛", 0x202E: "�"})
    assert seen.texts == [shown]  # blanks and line ends too


def test_excerpts_are_beginning_middle_and_end_of_three_documents(run):
    table = scores(documents_table(run))
    documents, limit = page.excerpts(run / "tokens.parquet", table, has_static=True)
    gains = table.gain[(table.failed == "") & (table.tokens > 0)]
    assert [document["which"] for document in documents] == ["largest", "median", "smallest"]
    assert [document["row"].gain for document in documents] == [
        gains.max(), gains.sort_values(ascending=False).iloc[len(gains) // 2], gains.min(),
    ]  # fmt: skip
    first, middle, last = documents[0]["parts"]
    tokens = documents[0]["row"].tokens
    assert (first.token.iloc[0], first["last"].iloc[-1], last["last"].iloc[-1]) == (0, page.EXCERPT - 1, tokens - 1)
    assert abs(middle.token.iloc[0] + page.EXCERPT / 2 - tokens / 2) <= 1
    assert (first.hue[first.static_nats < first.nats] == "worse").all() and limit > 0
    assert (middle.hue[middle.static_nats > middle.nats] == "better").all()
    assert middle.loc[(middle.static_nats - middle.nats).idxmax(), "shade"] == page.SHADES


def test_nats_of_a_cut_character_are_shown_where_its_text_is(tmp_path):
    folder = make_rows(tmp_path, [[(2.0, 3.0, 4, 8)]])
    pieces = pd.DataFrame({"document": 0, "token": range(4), "text": ["a", "é", "", "b"], "nats": [1.0, 2.0, 3.0, 4.0]})
    pieces.assign(static_nats=pieces.nats + 1, segment=0).to_parquet(folder / "tokens.parquet")
    (document,), _ = page.excerpts(folder / "tokens.parquet", scores(documents_table(folder)), True)
    (part,) = document["parts"]
    assert part[["text", "nats", "static_nats"]].values.tolist() == [["a", 1, 2], ["é", 5, 7], ["b", 4, 5]]


def test_gain_by_position(tmp_path):
    bit = math.log(2)
    long = [(10 * bit, 10 * bit, 4, 10), (10 * bit, 20 * bit, 4, 10), (10 * bit, 30 * bit, 4, 10), (0.0, bit, 1, 2)]
    edges, gains = gain_by_position(Rows(make_rows(tmp_path, [long, long[:2]]) / "segments.parquet"))
    assert edges.tolist() == [0, 4, 8, 12, 13]
    np.testing.assert_allclose(gains, [[0, 1, 2, 0.5], [0, 1, np.nan, np.nan]])


def test_bars_of_many_documents_show_both_ends(tmp_path):
    folder = make_rows(tmp_path, [[(1.0, 1.0 + gain, 4, 8)] for gain in range(-10, 90)])
    first, last, between = page.bars(scores(documents_table(folder)))
    assert (len(first), len(last), between) == (20, 20, 60)
    assert (first[0][0], last[-1][0]) == ("document 99", "document 0")
    assert first[0][2:] == pytest.approx((10 / 99 * 100, 89 / 99 * 100), abs=0.01)
    assert last[-1][2:] == pytest.approx((0, 10 / 99 * 100), abs=0.01)


def test_the_same_rows_give_the_same_bytes(run):
    names = ("documents.csv", "summary.json", "report.html")
    before = [(run / name).read_bytes() for name in names]
    for name in names:
        (run / name).unlink()
    write(run)
    assert [(run / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("shape", [{"documents": 40, "tokens": 75_000}, {"documents": 20_000, "tokens": 120}])
def test_page_of_a_long_run_is_small(tmp_path, shape):
    random = np.random.default_rng(0)
    documents, segments = shape["documents"], 200_000 // shape["documents"]
    rows = pd.DataFrame({"document": np.repeat(range(documents), segments)})
    rows["segment"] = np.tile(range(segments), documents)
    rows = rows.assign(start=rows.segment * 16, tokens=16, bytes=60, nats=random.gamma(9, 4, len(rows)), learned=True)
    rows = rows.assign(static_nats=rows.nats + random.normal(1, 3, len(rows)), updates=1, flops=3 << 20)
    rows = rows.assign(**dict.fromkeys([*FLOPS, "update_flops", "static_flops"], 1 << 20))
    rows.to_parquet(tmp_path / "segments.parquet")
    rows[["document", "segment"]].assign(seconds=0.1, **dict.fromkeys(SECONDS, 0.03)).to_parquet(
        tmp_path / "timings.parquet"
    )
    entry = {"tokens": 16 * segments, "bytes": 60 * segments, "words": segments, "failed": None}
    entries = [{"document": index, "name": f"{index}.txt", **entry} for index in range(documents)]
    (tmp_path / "run.json").write_text(json.dumps({"documents": entries}))
    began = time.perf_counter()
    summary = write(tmp_path)
    assert time.perf_counter() - began < 20
    assert summary["tokens"] == 3_200_000
    html = (tmp_path / "report.html").read_text()
    assert len(html) < 400_000
    longest = max(path.count("L ") for path in re.findall(r'<path d="([^"]*)"', html))
    assert 100 < longest <= 2000


def test_printed_table_is_aligned_and_fits(run):
    lines = printed_table(run).splitlines()
    end = lines.index("")
    table = [line for line in lines[:end] if not line.startswith("─")]
    assert len(table) == 1 + 12 + 1 and max(map(len, lines)) <= 80
    assert {len(line) for line in lines[:end]} == {len(lines[0])}
    for title in ("tokens", "static", "adapted", "gain", "FLOPs"):  # flush right, two blanks apart
        right = lines[0].index(title) + len(title)
        assert all(line[right - 1] != " " and line[right : right + 2].strip() == "" for line in table)
    assert table[-1].startswith("all 11 ")
    assert lines[-2].endswith("× the FLOPs of static")


def test_printed_table_cuts_long_and_wide_names(tmp_path):
    names = ["x" * 200, "戦争と平和" * 20, "e\u0301" * 5, "a\nb"]
    folder = make_rows(tmp_path, [[(2.0e6, 3.0e6, 4_000_000, 8_000_000)]] * 4, names)
    lines = printed_table(folder).splitlines()[:7]
    assert {terminal_width(line) for line in lines} == {80}
    assert lines[2].split()[0].endswith("x…") and lines[3].split()[0].endswith("…") and lines[5].startswith("a b ")


def test_si():
    values = (0, 12, 999.6, 1000, 3.14159e12, 4.2e10, 9.1e19, None)
    shown = ["0 FLOP", "12 FLOP", "1.00 kFLOP", "1.00 kFLOP", "3.14 TFLOP", "42.0 GFLOP", "91.0 EFLOP", "–"]
    assert [si(value, "FLOP") for value in values] == shown
    assert (si(20_000, form=".3g"), si(1_500.0)) == ("20 k", "1.50 k")


def test_command(run, capsys):
    (run / "report.html").unlink()
    assert report.main([str(run)]) == 0
    assert (run / "report.html").exists()
    out = capsys.readouterr().out
    assert out.startswith("document") and out.rstrip().endswith("report.html")


def without_tokens(run):
    del run["documents"][0]["tokens"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "segments.parquet").unlink(), "be the folder of a run, got {}; it has no segments.p"),
        (lambda folder: (folder / "run.json").write_text("{"), "have a run.json that is an object with a list of doc"),
        (lambda folder: (folder / "run.json").write_text("{}"), "have a run.json that is an object with a list of do"),
        (lambda folder: change_run(folder, without_tokens), "have a run.json with whole numbers document, tokens, by"),
        (lambda folder: (folder / "segments.parquet").write_text("rows"), "have a whole segments.parquet"),
        (lambda folder: (folder / "tokens.parquet").write_text("tokens"), "have a whole tokens.parquet, got {}"),
        (lambda folder: change_run(folder, lambda run: run["documents"].pop()), "got {}; run.json lacks documents [1]"),
        (lambda folder: (folder / "timings.parquet").replace(folder / "segments.parquet"), "it has no timings.parquet"),
        (
            lambda folder: pd.DataFrame({"document": [0], "segment": [0]}).to_parquet(folder / "segments.parquet"),
            "have a column nats in segments.parquet, got {}\n",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_an_error_of_one_line(tmp_path, capsys, damage, message):
    damage(make_rows(tmp_path, [[(2.0, 3.0, 4, 8)]] * 2))
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: folder must ") and message.format(tmp_path) in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_file_of_experts_is_named(tmp_path):
    folder = make_rows(tmp_path, [[(2.0, 3.0, 4, 8)]])
    change_run(folder, lambda run: run.update(experts=[{"name": "static", "rule": None, "rate": None}]))
    (folder / "experts.parquet").write_text("experts")
    with pytest.raises(SettingError, match=f"folder must have a whole experts.parquet, got {folder}"):
        write(folder)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def mistaken(*arguments):
        raise ValueError("ours")

    monkeypatch.setattr(page, "render", mistaken)
    with pytest.raises(ValueError, match="ours"):
        report.main([str(make_rows(tmp_path, [[(2.0, 3.0, 4, 8)]]))])


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    folder = make_rows(tmp_path, [[(2.0, 3.0, 4, 8)]])
    write(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(files, "write_text", lambda path, text: write_text(path, text + "half a pair: \ud800"))
    with pytest.raises(UnicodeEncodeError):
        write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_needs_no_torch_and_only_the_page_needs_slow_libraries():
    code = "import sys, types; package = types.ModuleType('dynlight'); package.__path__ = sys.argv[1:]; "
    code += "sys.modules['dynlight'] = package; import dynlight.recording.report.terminal; "
    code += "assert not {'matplotlib', 'jinja2', 'scipy'} & set(sys.modules), 'slow'; "
    code += "import dynlight.recording.report.files; assert 'matplotlib' in sys.modules; "
    code += "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code, dynlight.__path__[0]], check=True)


def test_kinds_of_memories_have_colours_of_their_own_and_short_names():
    names = [
        "static",
        "Adam(lr 0.1)",
        "n-grams(3 to 4, concentration 2) over static",
        "n-grams(3 to 4, concentration 2) over Adam(lr 0.1)",
    ]
    experts = [
        {"name": names[0], "rule": None, "rate": None, "memory": None},
        {"name": names[1], "rule": "Adam", "rate": 0.1, "memory": None},
        *({"name": name, "rule": None, "rate": None, "memory": name} for name in names[2:]),
        {"name": "cache(9) over static", "rule": None, "rate": None, "memory": "cache(9)"},
    ]
    assert len(set(mixture_pictures.expert_colours(experts))) == 5
    assert [mixture_pictures._short(name) for name in names] == [*names[:2], "n-grams over static", "n-grams over Adam"]
