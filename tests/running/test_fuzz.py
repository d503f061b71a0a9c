"""Bad input: random cases, and texts of every kind; `make torture` tries more of the former."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from folders import configuration, save_model
from fuzz import VALUES, Fuzz, fuzz, paths, quickly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynlight import fit


def test_random_settings_models_and_data_end_in_a_result_or_in_one_line(tmp_path):
    found = fuzz(tmp_path, seed=2, cases={"settings": 40, "model": 15, "data": 15})
    assert not found.faults, "\n\n".join(found.faults)
    assert sum(found.ends.values()) == 70
    assert found.ends["2"] > 20
    assert found.ends["0"] > 5


def _is_key(value):
    return value is None or isinstance(value, str | int | float)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Tries cases one by one."""
    root = tmp_path_factory.mktemp("tried")
    found = Fuzz(root, seed=0)
    with quickly(root):
        yield found


CHARACTERS = st.characters(exclude_categories=())  # lone surrogates too
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=20) | st.sampled_from(VALUES)
)
ANY = st.recursive(
    PLAIN,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(PLAIN.filter(_is_key), each, max_size=3),
    max_leaves=5,
)
MORE = ["model.tokenizer", "model.dtype", "model.revision", "model.attention", "data.name", "data.data_dir"]
MORE += ["data.text_column", "trainer.precision", "trainer.strategy", "trainer.logger", "parameters.init_args"]


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_setting_ends_in_a_result_or_in_one_line(tried, data):
    config = tried.configuration()
    changed = [path for path in paths(config) if path != ("out",)]  # it may be any folder of this machine
    changed += [tuple(name.split(".")) for name in MORE]
    *sections, last = data.draw(st.sampled_from(changed))
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = data.draw(ANY)
    tried.faults.clear()
    tried.try_case(config, f"{'.'.join([*sections, last])}: {section[last]!r}")
    assert not tried.faults, tried.faults[0]


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(
        st.text(CHARACTERS | st.sampled_from(list("\x00\x1b\r\n\u202e\u05d0\ufeff\U0010ffff")), max_size=80), max_size=4
    )
)
def test_any_texts_end_in_a_result_or_in_one_line(tried, texts):
    rows = tried.root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = tried.configuration() | {"data": {"path": "json", "data_files": str(rows), "together": 2}}
    tried.faults.clear()
    before = tried.ends["0"]
    tried.try_case(config, repr(texts))
    assert not tried.faults, tried.faults[0]
    is_right = bool(texts) and not any(0xD800 <= ord(sign) < 0xE000 for sign in "".join(texts))
    assert (tried.ends["0"] > before) == is_right, texts
    if is_right:
        documents = pd.read_csv(tried.root / "out/documents.csv")
        assert documents.bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.mark.slow
def test_of_a_line_of_50_megabytes_the_first_tokens_are_read_in_little_time_and_memory(byte_tokenizer, tmp_path):
    sign = "день 🙂 "
    with (tmp_path / "line.txt").open("w") as file:
        for _ in range(50):
            file.write(sign * (1_000_000 // len(sign.encode())))
    model = save_model(tmp_path / "model", byte_tokenizer, num_hidden_layers=1)
    config = configuration(model, f"{tmp_path}/line.txt", tmp_path / "out")
    config["data"]["max_tokens"] = 1000
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dynlight.fit", "--config", str(tmp_path / "run.yaml")]
    began = os.times().children_user
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - began < 120
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    tokens = pd.read_parquet(tmp_path / "out/tokens.parquet")
    assert summary["tokens"] == len(tokens) == 1000
    read = "".join(tokens.text)
    assert (sign * 1000).startswith(read)
    assert summary["bytes"] == len(read.encode())
    assert summary["peak_memory_bytes"] < 2e9


TEXTS = {
    "empty": "",
    "one byte": "a",
    "one character of each plane": "".join(chr(plane * 0x10000 + 0x100) for plane in range(17)),
    "the ends of planes": "".join(chr(plane * 0x10000 + 0xFFFD) for plane in range(17)),
    "control characters": "".join(map(chr, [*range(32), 127, *range(0x80, 0xA0)])),
    "right to left": "שלום עולם — مرحبا بالعالم " * 5,
    "signs that turn the direction": "a\u202eb\u202cc\u2066d\u2069",
    "marks on marks": "e" + "\u0301" * 60,
    "joined signs": "👩‍👩‍👧‍👦🏳️‍🌈" * 10,
    "line ends": "a\r\nb\rc\n\n\u2028d\u2029",
    "a mark of byte order": "\ufeffa text",
    "not in normal form": "é" + "e\u0301" + "ﬁ" + "①",
    "white space": " \t\u00a0\u3000" * 20,
    "one long word": "x" * 3000,
    "HTML": "<script>alert(1)</script>&amp;\"'" * 4,
    "NUL": "a\x00b\x00",
    "numbers": "0123456789" * 30,
}


@pytest.mark.page
@pytest.mark.parametrize("together", [1, 4])
def test_every_byte_of_any_text_is_counted_and_scored(byte_tokenizer, tmp_path, together):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS.values()):
        (tmp_path / f"texts/{number:02}.txt").write_bytes(text.encode())
    model = save_model(tmp_path / "model", byte_tokenizer, num_hidden_layers=1)
    config = configuration(model, f"{tmp_path}/texts/*.txt", tmp_path / "out")
    config["data"]["together"] = together
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 0
    documents = pd.read_csv(tmp_path / "out/documents.csv")
    assert documents.bytes.tolist() == [len(text.encode()) for text in TEXTS.values()]
    tokens = pd.read_parquet(tmp_path / "out/tokens.parquet")
    read = tokens.groupby("document").text.sum()
    for number, text in enumerate(TEXTS.values()):
        assert read.get(number, "") == text
    assert tokens.nats.gt(0).all()
    assert (tmp_path / "out/report.html").read_text("utf-8").count("<script>alert") == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "\ud800"}', "data.data_files must be data that can be read, got "),
        (r'{"text": ["a"]}', "data.text_column must hold text, got list in row 1 of text"),
        ('{"text": null}', "data.text_column must hold text, got null in row 1 of text"),
        ('{"other": "a"}', "data.text_column must hold text, got null in row 1 of text"),
        ('{"text": ', "data.data_files must be data that can be read, got "),
        ("\x00", "data.data_files must be data that can be read, got "),
    ],
    ids=["a lone surrogate", "a list", "null", "no text", "torn", "NUL"],
)
def test_a_row_that_is_no_text_is_told_in_one_line(byte_tokenizer, tmp_path, capsys, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    model = save_model(tmp_path / "model", byte_tokenizer, num_hidden_layers=1)
    config = configuration(model, "", tmp_path / "out") | {
        "data": {"path": "json", "data_files": f"{tmp_path}/rows.jsonl"}
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
