"""Documents: every byte belongs to one token, every source gives its texts unchanged, every mistake one line."""

import gzip
import hashlib
import json
import logging
import os
import re
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dynlight import DocumentStream
from dynlight.documents import sources
from dynlight.documents.document import Document, first_tokens, prefix_token, tokenize
from dynlight.errors import SettingError

TEXTS = {
    "plain": "It was a fine day.",
    "emoji": "fine 😀👩‍👩‍👧 day 🏳️‍🌈",
    "right to left": "שלום עולם, مرحبا",
    "combining": "e\u0301te\u0301 n\u0303 Z͑ͫ̓a",
    "line ends": "a\r\nfine\rday\n\n\thouse\r\n",
    "spaces around": "   a fine  day   ",
    "byte order mark": "\ufeffa fine day",
    "special token": "a </s> day <s>",
    "nul and private use": "a\x00b\ue000\U0010fffd",
    "one character": "a",
    "one emoji": "😀",
    "empty": "",
}


@pytest.fixture(scope="session")
def tokenizers(byte_tokenizer, word_tokenizer) -> dict[str, PreTrainedTokenizerFast]:
    def changed(**parts) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
        for part, value in parts.items():
            setattr(tokenizer, part, value)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "d", "▁a", "▁d"]
    llama = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[("▁", "a"), ("▁", "d")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    metaspace, prepend = Tokenizer(llama), Tokenizer(llama)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    prepend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return {
        "byte-level": byte_tokenizer,
        "byte-level, composed": changed(normalizer=normalizers.NFC()),
        "byte-level, trimmed": changed(post_processor=processors.ByteLevel(trim_offsets=True)),
        "byte-level, lower case": changed(normalizer=normalizers.Lowercase()),
        "metaspace": PreTrainedTokenizerFast(tokenizer_object=metaspace, bos_token="<s>"),
        "prepended space": PreTrainedTokenizerFast(tokenizer_object=prepend, bos_token="<s>"),
        "words": word_tokenizer,
        "slow": ByT5Tokenizer(),
    }


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, and an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


def check(document: Document, text: str) -> None:
    """Whether the pieces of the document's tokens make up `text`, and its counts are those of `text`."""
    assert document.text == text
    assert document.tokens.dtype == document.ends.dtype == torch.int64
    assert len(document) == len(document.tokens) == len(document.ends) == len(document.byte_ends) - 1
    assert (document.ends.diff() >= 0).all()
    pieces = document.pieces(0, len(document))
    assert "".join(pieces) == text
    assert [len(piece.encode()) for piece in pieces] == np.diff(document.byte_ends).tolist()
    assert document.byte_ends[-1] == document.bytes == len(text.encode())
    assert document.words == len(text.split())


def texts(stream: DocumentStream, tokenizer) -> dict[str, str]:
    documents = stream.load(tokenizer)
    assert [document.index for document in documents] == list(range(len(documents)))
    for document in documents:
        check(document, document.text)
    assert len({document.name for document in documents}) == len(documents)
    return {document.name: document.text for document in documents}


def write(files: dict[str, str | bytes]) -> None:
    for file, content in files.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)


# Tokens and their pieces


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_byte_belongs_to_one_token(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        document = Document.from_text(0, "x", text, tokenizer)
        assert document.tokens.tolist() == tokenizer(text, add_special_tokens=False).input_ids, name
        check(document, text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \r\n\t😀é▁")), max_size=40))
def test_every_byte_belongs_to_one_token_of_any_text(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        if name == "words" and not tokenizer(text, add_special_tokens=False).input_ids:
            continue
        document = Document.from_text(0, "x", text, tokenizer)
        check(document, text)
        for tokens in range(1, min(len(document), 4)):
            cut = Document.from_text(0, "x", text, tokenizer, max_tokens=tokens)
            assert torch.equal(cut.tokens, document.tokens[:tokens])
            check(cut, "".join(document.pieces(0, tokens)))


def test_first_token_of_a_character_owns_it(byte_tokenizer):
    document = Document.from_text(0, "x", "a😀b", byte_tokenizer)
    assert document.pieces(0, 6) == ["a", "😀", "", "", "", "b"]
    assert np.diff(document.byte_ends).tolist() == [1, 4, 0, 0, 0, 1]
    assert document.pieces(2, 6) == ["", "", "", "b"]
    assert document.pieces(3, 3) == []


def test_what_is_skipped_belongs_to_the_next_token_and_to_the_last(word_tokenizer):
    document = Document.from_text(0, "x", "  a  fine day \n", word_tokenizer)
    assert document.pieces(0, 3) == ["  a", "  fine", " day \n"]


def test_slow_tokenizer_spreads_characters_evenly():
    tokens, ends = tokenize("aé😀", ByT5Tokenizer())
    assert len(tokens) == 7
    assert ends.tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 100])
def test_cut_keeps_the_characters_of_its_tokens(byte_tokenizer, tokens):
    document = Document.from_text(0, "x", "a😀b", byte_tokenizer, max_tokens=tokens)
    assert len(document) == min(tokens, 6)
    check(document, {1: "a", 6: "a😀b", 100: "a😀b"}.get(tokens, "a😀"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \r\n😀é▁aad")), min_size=8, max_size=200))
def test_the_first_tokens_of_a_long_text_are_those_of_the_whole(tokenizers, monkeypatch, text):
    monkeypatch.setattr("dynlight.documents.document._START", 4)
    for name, tokenizer in tokenizers.items():
        tokens, ends = tokenize(text, tokenizer)
        for count in range(1, min(len(tokens), 5)):
            start = first_tokens(text, tokenizer, count)
            assert torch.equal(start[0], tokens[:count]), name
            assert torch.equal(start[1], ends[:count]), name


def test_of_a_long_text_no_more_is_tokenized_than_its_first_tokens_need(byte_tokenizer, monkeypatch):
    lengths = []
    monkeypatch.setattr("dynlight.documents.document._START", 20)
    monkeypatch.setattr(
        "dynlight.documents.document.tokenize", lambda text, _: (lengths.append(len(text)), tokenize(text, _))[1]
    )
    document = Document.from_text(0, "x", "the old house " * 1000, byte_tokenizer, max_tokens=2)
    assert lengths == [32, 64]
    check(document, document.text)
    assert len(document) == 2


def test_cut_counts_what_it_keeps(word_tokenizer):
    document = Document.from_text(0, "x", "a fine day\n", word_tokenizer, max_tokens=2)
    assert (document.text, document.bytes, document.words) == ("a fine", 6, 2)


def test_text_longer_than_the_model_is_read_without_a_warning(byte_tokenizer, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    document = Document.from_text(0, "x", "a fine day " * 20, byte_tokenizer)
    logger.removeHandler(caplog.handler)
    assert len(document) > byte_tokenizer.model_max_length
    assert not caplog.records


def test_truncation_saved_with_a_tokenizer_is_not_applied(byte_tokenizer):
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    check(Document.from_text(0, "x", "a fine day", tokenizer), "a fine day")


class Unusual:
    """A tokenizer of a kind of its own: it knows a text and `add_special_tokens`, and nothing else."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [1 + ord(letter) for letter in text]}


def test_a_tokenizer_need_not_be_of_a_usual_class():
    document = Document.from_text(0, "a", "fine", Unusual(), max_tokens=3)
    assert (document.text, len(document), document.ends.tolist()) == ("fin", 3, [1, 2, 3])


def test_special_tokens_are_not_added(byte_tokenizer):
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert tokenize("a", tokenizer)[0].tolist() == tokenize("a", byte_tokenizer)[0].tolist()


def test_prefix_is_bos_else_eos(byte_tokenizer, word_tokenizer):
    assert prefix_token(byte_tokenizer) == 0
    assert prefix_token(word_tokenizer) == 1
    assert Document.from_text(0, "x", "a", word_tokenizer).prefix == 1


def test_documents_are_compared_by_identity(byte_tokenizer):
    one, other = (Document.from_text(0, "x", "a", byte_tokenizer) for _ in range(2))
    assert len({one, one, other}) == 2
    with pytest.raises(AttributeError):
        one.text = "b"


# Texts in memory


def test_texts_in_memory(byte_tokenizer):
    assert texts(DocumentStream.from_texts(["a", "", "b\n"]), byte_tokenizer) == {
        "text 0": "a",
        "text 1": "",
        "text 2": "b\n",
    }
    stream = DocumentStream.from_texts(("a fine day",) * 3, names="xyz", documents=2, max_tokens=1, together=4)
    assert texts(stream, byte_tokenizer).keys() == {"x", "y"}
    assert all(len(document) == 1 for document in stream.load(byte_tokenizer))
    assert stream.together == 4


# Files


FILES = {
    "books/b.txt": "two\r\nlines\r\n",
    "books/a.txt": b"\xef\xbb\xbfa mark in front, no line end at the end",
    "books/more/c.txt": "old Mac\rand \u2028 strange \x0c\x85 ends\n\n\n",
    "books/empty.txt": "",
    "books/notes.md": "a fine day",
}


def test_text_files_keep_every_byte(byte_tokenizer):
    write(FILES)
    stream = DocumentStream("text", data_files="books/*.txt")
    found = texts(stream, byte_tokenizer)
    assert list(found) == ["a.txt", "b.txt", "empty.txt"]
    for name, text in found.items():
        assert text.encode() == Path("books", name).read_bytes()
    lengths = {document.name: document.bytes for document in stream.load(byte_tokenizer)}
    assert lengths == {name: Path("books", name).stat().st_size for name in found}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ({"path": "text", "data_files": "books/b.txt"}, ["b.txt"]),
        ({"path": "text", "data_files": ["books/b.txt", "books/*.txt"]}, ["b.txt", "a.txt", "empty.txt"]),
        ({"path": "text", "data_files": "books/**/*.txt"}, ["a.txt", "b.txt", "empty.txt", "more/c.txt"]),
        ({"path": "text", "data_files": ["books/more/*.txt", "books/a.txt"]}, ["more/c.txt", "a.txt"]),
        ({"path": "text", "data_files": {"test": "books/a.txt", "train": "books/b.txt"}}, ["a.txt"]),
        ({"path": "text", "data_files": {"x": "books/a.txt", "y": "books/b.txt"}, "split": "y"}, ["b.txt"]),
        ({"path": "text", "data_files": {"x": "books/a.txt", "y": "books/b.txt"}, "split": "y+x"}, ["b.txt", "a.txt"]),
        ({"path": "text", "data_files": {"x": "books/a.txt", "y": "books/*.md"}, "split": "x+x"}, ["a.txt"]),
        ({"path": "text", "data_files": "books/*.txt", "split": "train[1:]"}, ["b.txt", "empty.txt"]),
        ({"path": "text", "data_files": "books/*.txt", "documents": 2}, ["a.txt", "b.txt"]),
        ({"path": "text", "data_files": "*.md", "data_dir": "books"}, ["notes.md"]),
        ({"path": "text", "data_dir": "books/more"}, ["c.txt"]),
        ({"path": "text", "data_files": "books/*.txt", "streaming": True}, ["a.txt", "b.txt", "empty.txt"]),
        ({"path": "books/more"}, ["c.txt"]),
    ],
)
def test_which_files(byte_tokenizer, source, names):
    write(FILES)
    assert list(texts(DocumentStream(**source), byte_tokenizer)) == names


def test_files_by_address_and_compressed(byte_tokenizer, tmp_path):
    write({"a.txt": "a\r\n", "b.txt.gz": gzip.compress(b"b\r\n")})
    files = [f"file://{tmp_path}/a.txt", "b.txt.gz"]
    assert texts(DocumentStream("text", data_files=files), byte_tokenizer) == {"a.txt": "a\r\n", "b.txt.gz": "b\r\n"}


def test_a_path_that_is_there_stands_for_itself_and_is_no_pattern(byte_tokenizer):
    write({"[1984].txt": "one", "1.txt": "another", "[ab]/c.txt": "within", "what?.txt": "asked"})
    for file, name, text in [
        ("[1984].txt", "[1984].txt", "one"),
        ("[ab]/c.txt", "c.txt", "within"),
        ("what?.txt", "what?.txt", "asked"),
    ]:
        assert texts(DocumentStream("text", data_files=file), byte_tokenizer) == {name: text}
        both = DocumentStream("text", data_files={"test": ["1.txt", file]})
        assert sorted(texts(both, byte_tokenizer).values()) == sorted(["another", text])
    assert texts(DocumentStream("text", data_files="[0-9].txt"), byte_tokenizer) == {"1.txt": "another"}
    assert texts(DocumentStream("text", data_dir="[ab]"), byte_tokenizer) == {"c.txt": "within"}
    with pytest.raises(SettingError, match=r"data.path must be a folder without \* \? \[ in its name, got \[ab\]"):
        DocumentStream("[ab]")


@pytest.mark.parametrize(("ending", "package"), [("zst", "zstandard"), ("lz4", "lz4"), ("snappy", "python-snappy")])
def test_a_compressed_file_says_which_package_is_missing(byte_tokenizer, monkeypatch, ending, package):
    write({f"a.txt.{ending}": b"\x28\xb5\x2f\xfd"})
    monkeypatch.setattr(sources, "infer_compression", lambda file: None)
    with pytest.raises(SettingError) as error:
        texts(DocumentStream("text", data_files=f"*.{ending}"), byte_tokenizer)
    expected = f"data.data_files must be read by the package {package}, got '...' without it; pip install {package}"
    assert re.sub("'.*'", "'...'", str(error.value)) == expected


def test_split_folders(byte_tokenizer):
    write({"books/train/a.txt": "a", "books/test/b.txt": "b"})
    for source in ({"path": "books"}, {"path": "text", "data_dir": "books"}):
        assert texts(DocumentStream(**source), byte_tokenizer) == {"b.txt": "b"}
        assert texts(DocumentStream(**source, split="train"), byte_tokenizer) == {"a.txt": "a"}


# Rows

ROWS = [
    {"text": "a\r\nfine day", "title": "One"},
    {"text": " \n", "title": "Two\n words"},
    {"text": "", "title": None},
    {"text": "😀", "title": "One"},
]
NAMED = {"One": "a\r\nfine day", "Two words": " \n", "row 2": "", "One (row 3)": "😀"}


def save(kind: str, rows: list[dict], file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if kind == "json":
        Path(file).write_text(json.dumps(rows))
    elif kind == "jsonl":
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = datasets.Dataset.from_list(rows)
        {"csv": data.to_csv, "parquet": data.to_parquet}[kind](file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_rows_of_files(byte_tokenizer, kind, streaming):
    rows = [row for row in ROWS if row["text"]] if kind == "csv" else ROWS  # in a CSV file, empty text is null
    named = {
        name if kind != "csv" else name.replace("3", "2"): text for name, text in NAMED.items() if text or kind != "csv"
    }
    save(kind, rows, f"data/rows.{kind}")
    path = "json" if kind == "jsonl" else kind
    stream = DocumentStream(path, data_files=f"data/*.{kind}", streaming=streaming)
    assert texts(stream, byte_tokenizer) == named
    assert texts(DocumentStream("data", streaming=streaming, documents=2), byte_tokenizer) == dict(
        list(named.items())[:2]
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_is_told_by_its_contents_and_not_by_its_time(byte_tokenizer, kind):
    file = f"rows.{kind}"
    path = "json" if kind == "jsonl" else kind
    for text in ("a fine day", "a fine sky"):
        save(kind, [{"text": text}], file)
        os.utime(file, (1e9, 1e9))
        stream = DocumentStream(path, data_files=file)
        assert texts(stream, byte_tokenizer) == {"row 0": text}
        assert stream.source.digests == {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()}


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_files_of_a_saved_data_set(byte_tokenizer, streaming):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    stream = DocumentStream("arrow", data_files="saved/*.arrow", streaming=streaming)
    assert texts(stream, byte_tokenizer) == NAMED


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({}, "row 0"),
        ({"id": 7}, "7"),
        ({"id": 7, "name": "seven"}, "seven"),
        ({"name": "seven", "short_book_title": "Seven Men"}, "Seven Men"),
        ({"title": "  ", "id": "x7"}, "x7"),
        ({"url": "x"}, "row 0"),
    ],
)
def test_name_of_a_row(byte_tokenizer, columns, name):
    save("parquet", [{"text": "a", **columns}], "rows.parquet")
    assert texts(DocumentStream("parquet", data_files="rows.parquet"), byte_tokenizer) == {name: "a"}


def test_names_stay_unique(byte_tokenizer):
    titles = ["A (row 2)", "A", "A", "A (row 2)"]
    save("parquet", [{"text": "a", "title": title} for title in titles], "rows.parquet")
    assert len(texts(DocumentStream("parquet", data_files="rows.parquet"), byte_tokenizer)) == 4


def test_text_column(byte_tokenizer):
    save("jsonl", [{"body": "a", "text": 1}], "rows.jsonl")
    stream = DocumentStream("json", data_files="rows.jsonl", text_column="body")
    assert texts(stream, byte_tokenizer) == {"row 0": "a"}


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_asked_split_is_read(byte_tokenizer, streaming):
    """A folder laid out as on the Hub, card and all; the file of the other split is none that could be read."""
    rows = [{"short_book_title": title, "text": title} for title in "abc"]
    save("parquet", rows, "pg19/data/test-00000-of-00001.parquet")
    write({"pg19/data/train-00000-of-00001.parquet": b"no parquet"})
    card = {
        "configs": [
            {"config_name": "books", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]},
            {"config_name": "empty", "data_files": "data/none-*"},
        ],
        "dataset_info": [
            {
                "config_name": "books",
                "features": [{"name": name, "dtype": "string"} for name in ("short_book_title", "text")],
                "splits": [{"name": "train", "num_examples": 9}, {"name": "test", "num_examples": 3}],
            }
        ],
    }
    write({"pg19/README.md": f"---\n{json.dumps(card)}\n---\n"})
    for split, names in {None: "abc", "test": "abc", "test[1:]": "bc"}.items():
        if streaming and split == "test[1:]":
            continue  # datasets doesn't slice what it streams
        stream = DocumentStream("pg19", name="books", split=split, streaming=streaming)
        assert texts(stream, byte_tokenizer) == {name: name for name in names}


def test_streaming_reads_no_more_than_is_asked_for(byte_tokenizer):
    save("jsonl", [{"text": "a"}] * 3, "a.jsonl")
    write({"b.jsonl": "no json"})
    stream = DocumentStream("json", data_files=["a.jsonl", "b.jsonl"], streaming=True, documents=2)
    assert len(stream.load(byte_tokenizer)) == 2


# The standard library


def test_standard_library(byte_tokenizer):
    documents = DocumentStream("python-stdlib").load(byte_tokenizer)
    assert len(documents) == 12
    few = DocumentStream("python-stdlib", documents=2, max_tokens=10).load(byte_tokenizer)
    assert [document.name for document in few] == [document.name for document in documents[:2]]
    for document in documents:
        check(document, document.text)
        assert document.text.encode() == Path(sysconfig.get_path("stdlib"), document.name).read_bytes()
    lengths = [document.bytes for document in documents]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] > 50_000


# Mistakes


JSON = {"path": "json", "data_files": "rows.jsonl"}
MISTAKES = [
    # settings, what lies in the folder, the message
    ({"path": "x", "together": 0}, {}, "data.together must be at least 1, got 0"),
    ({"path": "x", "together": 1.5}, {}, "data.together must be at least 1, got 1.5"),
    ({"path": "x", "together": None}, {}, "data.together must be at least 1, got None"),
    ({"path": "x", "documents": 0}, {}, "data.documents must be at least 1, got 0"),
    ({"path": "x", "documents": True}, {}, "data.documents must be at least 1, got True"),
    ({"path": "x", "max_tokens": -5}, {}, "data.max_tokens must be at least 1, got -5"),
    (
        {"path": "python-stdlib", "data_files": "*.txt"},
        {},
        r"data.data_files must be left out with path python-stdlib, got '\*.txt'",
    ),
    ({"path": "python-stdlib", "split": "test"}, {}, "data.split must be left out with path python-stdlib, got 'test'"),
    ({"path": "text"}, {}, "data.data_files must name the files to read as text, got None"),
    ({"path": "json", "data_files": []}, {}, r"data.data_files must name the files to read as json, got \[\]"),
    ({"path": "text", "data_files": "*.txt"}, {}, r"data.data_files must match at least one file, got '\*.txt'"),
    ({"path": "csv", "data_files": "*.csv"}, {}, r"data.data_files must match at least one file, got '\*.csv'"),
    (
        {"path": "text", "data_files": "a.txt"},
        {},
        "data.data_files must be data that can be read, got 'a.txt': Unable to find '/.*/a.txt'",
    ),
    (
        {"path": "books"},
        {"books/x/y": ""},
        "data.path must be data that can be read, got 'books': No .* data files found in books",
    ),
    (
        {"path": "/none/at/all"},
        {},
        "data.path must be data that can be read, got '/none/at/all': Couldn't find any data file at /none/at/all.",
    ),
    (
        {"path": "emozilla/pg19"},
        {},
        "data.path must be data that can be read, got 'emozilla/pg19': Couldn't reach .*; give a local folder, or go online",
    ),
    (
        {"path": "books/a.txt"},
        FILES,
        "data.path must be a data set, got a file; choose path: text, data_files: books/a.txt",
    ),
    (
        {"path": "text", "data_files": "a.txt"},
        {"a.txt": b"caf\xe9 x"},
        "data.data_files must be .*, got '/.*/a.txt': .* can't decode byte 0xe9 in position 3: .*; convert it to UTF-8",
    ),
    (
        {"path": "text", "data_files": "a.txt.gz"},
        {"a.txt.gz": b"none"},
        r"data.data_files must be data that can be read, got '/.*/a.txt.gz': Not a gzipped file \(b'no'\)",
    ),
    (
        {"path": "text", "data_files": "*.txt", "text_column": "body"},
        {"a.txt": ""},
        "data.text_column must be one of text, got body",
    ),
    (
        {"path": "text", "data_files": "*.txt", "split": "test"},
        {"a.txt": ""},
        "data.split must be one of train, got test",
    ),
    (
        {"path": "text", "data_files": {"one": "a.txt", "two": "a.txt"}},
        {"a.txt": ""},
        "data.split must be one of one, two, got null",
    ),
    (
        {"path": "text", "data_files": {"one": "a.txt", "two": "a.txt"}, "split": "one+three"},
        {"a.txt": ""},
        r"data.split must be one of one, two, got one\+three",
    ),
    (
        {"path": "text", "data_files": "a.txt", "split": "train[x]"},
        {"a.txt": ""},
        r"data.data_files must be data that can be read, got 'a.txt': Unrecognized instruction format: train\[x\]",
    ),
    (
        JSON | {"text_column": "body"},
        [{"text": "a", "title": "x"}],
        "data.text_column must be one of text, title, got body",
    ),
    (
        JSON | {"text_column": "body", "streaming": True},
        [{"text": "a", "title": "x"}],
        "data.text_column must be one of text, title, got body",
    ),
    (JSON, [{"text": "a"}, {"text": None}], "data.text_column must hold text, got null in row 1 of text"),
    (
        JSON | {"streaming": True},
        [{"text": "a"}, {"title": "x"}],
        "data.text_column must hold text, got null in row 1 of text",
    ),
    (JSON | {"text_column": "year"}, [{"year": 1919}], "data.text_column must hold text, got int in row 0 of year"),
    (
        JSON | {"text_column": "parts"},
        [{"parts": ["b"]}],
        "data.text_column must hold text, got list in row 0 of parts",
    ),
    (JSON | {"split": "test"}, [{"text": "a", "title": "x"}], "data.split must be one of train, got test"),
    (
        JSON | {"data_files": "*.json"},
        {"a.json": "{no"},
        r"data.data_files must be data that can be read, got '\*.json': .+",
    ),
    (
        JSON | {"data_files": "*.json", "streaming": True},
        {"a.json": "{no"},
        r"data.data_files must be data that can be read, got '\*.json': .+",
    ),
    (
        {"path": "parquet", "data_files": "a.parquet"},
        {"a.parquet": "no"},
        "data.data_files must be data that can be read, .+",
    ),
    (
        {"path": "books", "name": "small"},
        FILES,
        r"data.path must be data that can be read, got 'books': BuilderConfig 'small' not found. Available: \['default'\]",
    ),
]


@pytest.mark.parametrize(("source", "files", "message"), MISTAKES)
def test_mistakes_are_one_line(byte_tokenizer, capfd, source, files, message):
    if isinstance(files, list):
        save("jsonl", files, "rows.jsonl")
    else:
        write(files)
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        DocumentStream(**source).load(byte_tokenizer)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__) or caught.value.__context__ is None


def test_saved_data_set_says_so(byte_tokenizer):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    with pytest.raises(ValueError, match="^data.path must be data that can be read, got 'saved': .*save_to_disk"):
        DocumentStream("saved").load(byte_tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_data_set(byte_tokenizer, streaming):
    datasets.Dataset.from_dict({"text": []}).to_parquet("none.parquet")
    with pytest.raises(ValueError, match="empty data set: 'parquet'$|corresponds to no data!$"):
        DocumentStream("parquet", data_files="none.parquet", streaming=streaming).load(byte_tokenizer)


def test_mistakes_in_texts(byte_tokenizer, word_tokenizer):
    def message(*texts, tokenizer=byte_tokenizer, **settings):
        with pytest.raises(ValueError, match=".") as caught:
            DocumentStream.from_texts(*texts, **settings).load(tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message([]) == "data.path must hold at least one document, got an empty data set: 'texts in memory'"
    assert message("a fine day") == "texts must be a list of texts, got 'a fine day'"
    assert message(["a", None]) == "texts must be a list of texts, got ['a', None]"
    assert message(["a", "b"], ["x"]) == "names must be 2 different ones, one a text, got 1"
    assert message(["a", "b"], ["x", "x"]) == "names must be 2 different ones, one a text, got 1"
    assert message(["a"], together=0) == "data.together must be at least 1, got 0"
    assert message(["ab\ud800"]).startswith(
        "document 'text 0' must be Unicode text, got a lone surrogate at character 2"
    )
    assert message(["a", " \n"], tokenizer=word_tokenizer).startswith(
        "document 'text 1' must have tokens, got none from its 2 bytes"
    )
    nameless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    assert message(["a"], tokenizer=nameless).startswith(
        "model.pretrained must have a tokenizer with a BOS or EOS token"
    )


# YAML


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "emozilla/pg19", "split": "test", "together": 16},
        {"path": "text", "data_files": "books/*.txt"},
        {"path": "text", "data_files": ["a.txt", "b.txt"]},
        {"path": "json", "data_files": {"train": "a.json", "test": ["b.json"]}, "split": "test", "streaming": True},
        {"path": "python-stdlib", "documents": 3, "max_tokens": 100},
    ],
)
def test_settings_as_in_yaml(settings):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DocumentStream, "data")
    stream = DocumentStream(**parser.parse_object({"data": settings}).data)
    assert {name: getattr(stream, name, getattr(stream.source, name, None)) for name in settings} == settings
