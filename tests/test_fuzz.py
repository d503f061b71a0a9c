"""Bad input: random cases, and texts of every kind; `make torture` tries more of the former."""

import pandas as pd
import pytest
import yaml
from folders import configuration, save_model
from fuzz import fuzz

from dynlight import fit


def test_random_settings_models_and_data_end_in_a_result_or_in_one_line(tmp_path):
    found = fuzz(tmp_path, seed=2, cases={"settings": 40, "model": 15, "data": 15})
    assert not found.faults, "\n\n".join(found.faults)
    assert sum(found.ends.values()) == 70
    assert found.ends["2"] > 20
    assert found.ends["0"] > 5


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
