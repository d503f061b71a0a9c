"""Local folders as a user has them: models with their tokenizers, and documents."""

import copy
from pathlib import Path

import torch
from models import CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

DOCUMENTS = {
    "a.txt": "It was a fine day, and the old house stood still by the river. " * 4,
    "b.txt": "def read(line):\n    return line\n\n\n" * 6,
}


def save_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    architecture: str = "llama",
    rows: int | None = None,
    **changes: object,
) -> Path:
    """A tiny model as `save_pretrained` leaves it, with `rows` in its embedding (default: one for each token)."""
    config = copy.deepcopy(CONFIGS[architecture])
    for name, value in ({"vocab_size": rows or len(tokenizer)} | changes).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_documents(folder: Path) -> str:
    """Two text files; returns the pattern that finds them."""
    folder.mkdir(parents=True)
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, "utf-8")
    return f"{folder}/*.txt"


def save_sentences(folder: Path, sentences: dict[str, int]) -> None:
    """Text files of so many sentences each, no two of them alike."""
    folder.mkdir(parents=True)
    for name, count in sentences.items():
        (folder / f"{name}.txt").write_text("".join(f"It was a fine day, the {i}th. " for i in range(count)))


def configuration(model: Path, documents: str, out: Path) -> dict[str, dict]:
    """A whole configuration that runs in a moment."""
    return {
        "model": {"pretrained": str(model)},
        "data": {"path": "text", "data_files": documents},
        "context": {"class_path": "TransformerXL", "init_args": {"segment": 16, "memory": 32}},
        "parameters": {"class_path": "All"},
        "update": {"class_path": "SGD", "init_args": {"lr": 0.05}},
        "trainer": {"accelerator": "cpu"},
        "out": str(out),
    }
