"""Models in llama.cpp's format: the same scores as from safetensors, quantized ones too, and a clear line where one can't be read."""

import json

import pandas as pd
import pytest
import torch
import yaml
from folders import configuration, save_documents
from gguf_files import save_gguf

from dynlight.errors import SettingError
from dynlight.fit import main
from dynlight.running import pretrained
from dynlight.running.pretrained import Pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny-books as `exact.gguf` and, in 8 bits, `small.gguf`; and two documents."""
    root, tiny = tmp_path_factory.mktemp("gguf"), Pretrained("tiny-books")
    model, tokenizer = tiny.load(), tiny.load_tokenizer()
    save_gguf(root / "exact.gguf", model, tokenizer)
    save_gguf(root / "small.gguf", model, tokenizer, "Q8_0")
    save_documents(root / "documents")
    return root


def scores(folder, model, out):
    settings = configuration("", f"{folder}/documents/*.txt", out) | {"model": model}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["--config", str(folder / "run.yaml")]) == 0
    return pd.read_parquet(out / "segments.parquet"), json.loads((out / "receipt.json").read_text())


def test_a_model_has_the_same_scores_and_tokens_as_from_safetensors(folder, tmp_path, capsys):
    exact = {"pretrained": str(folder), "gguf_file": "exact.gguf"}
    found, receipt = scores(folder, exact, tmp_path / "exact")
    expected, known = scores(folder, {"pretrained": "tiny-books"}, tmp_path / "plain")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6)  # the eps of norms is a float32 in the file
    assert receipt["hashes"]["model"] == known["hashes"]["model"], "the digest is of the weights as they were read"
    assert "de-quantizing" not in capsys.readouterr().err, "a progress bar of transformers' own"


def test_a_quantized_model_is_read_in_fp32(folder):
    exact, small = (Pretrained(str(folder), gguf_file=f"{name}.gguf").load() for name in ("exact", "small"))
    pairs = list(zip(exact.parameters(), small.parameters(), strict=True))
    assert {weight.dtype for _, weight in pairs} == {torch.float32}
    apart = [((one - other).abs().max() / one.abs().max()).item() for one, other in pairs]
    assert 0.001 < max(apart) < 0.01  # of 8 bits
    tokenizers = [
        Pretrained(name, gguf_file=file).load_tokenizer()
        for name, file in (("tiny-books", None), (str(folder), "small.gguf"))
    ]
    text = "It was — été, 1984;\n\n\tdef f(x): return x 😀"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_another_tokenizer_may_be_named(folder, library):
    assert len(Pretrained(str(folder), gguf_file="small.gguf", tokenizer="tiny-books").load_tokenizer()) == 4096
    own, named = (
        Pretrained(str(folder), gguf_file="small.gguf", tokenizer=each) for each in (None, str(library / "model"))
    )
    assert len(named.load_tokenizer()) < len(own.load_tokenizer())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.gguf", "does not appear to have a file named none.gguf"),
        ("text.gguf", "not a GGUF file"),
        ("cut.gguf", ""),
        ("empty.gguf", "empty"),
    ],
)
@pytest.mark.parametrize("asked", ["config", "load", "load_tokenizer"])
def test_a_file_that_cannot_be_read_is_refused(folder, name, reason, asked):
    contents = {
        "text.gguf": b"It was a fine day.",
        "cut.gguf": (folder / "small.gguf").read_bytes()[:20_000],
        "empty.gguf": b"",
    }
    if name in contents:
        (folder / name).write_bytes(contents[name])
    with pytest.raises(SettingError) as refused:
        getattr(Pretrained(str(folder), gguf_file=name), asked)()
    text = str(refused.value)
    assert text.startswith(
        f"model.gguf_file must be a file in {folder}, of a causal language model in llama.cpp's format"
    )
    assert f"got {name}; " in text and reason in text and "\n" not in text


def test_the_package_that_reads_such_files_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
    with pytest.raises(
        SettingError, match=r"gguf_file must be read by the package gguf, got small.gguf without it; pip install"
    ):
        Pretrained(str(folder), gguf_file="small.gguf").config()


def test_a_folder_of_such_a_file_says_that_it_must_be_named(folder, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(SettingError, match="it holds a GGUF file; name that as model.gguf_file"):
        Pretrained(str(tmp_path)).config()


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(SettingError, match=r"got a.gguf; there is no such folder$"):
        Pretrained(str(tmp_path / "none"), gguf_file="a.gguf").config()
