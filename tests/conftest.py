"""What several test files need: small tokenizers, made here, so that no test reads anything from outside."""

import os

# Before any import of Hugging Face code: a test that would go online fails at once instead of trying for a while.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from folders import save_documents, save_model
from shortcuts import shortcuts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROSE = ["It was a fine day, and the old house stood still by the river. " * 3, "def read(line):\n    return line\n"]


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens, as of GPT-2: any text, an emoji in up to four tokens; BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=8)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture of the test is made."""
    shortcuts.choose(item)


@pytest.fixture(scope="session", autouse=True)
def _shortcuts():
    with shortcuts.taken():
        yield


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """That of make_byte_tokenizer."""
    return make_byte_tokenizer()


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    """A folder with `documents/*.txt` and a tiny `model`, as a user has them."""
    root = tmp_path_factory.mktemp("library")
    save_documents(root / "documents")
    save_model(root / "model", byte_tokenizer)
    return root


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Four words and an unknown one, white space dropped; an EOS and no BOS."""
    words = ["<unk>", "</s>", "a", "fine", "day", "house"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
