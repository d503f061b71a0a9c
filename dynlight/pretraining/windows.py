"""What a model is pretrained on: text files as one stream of tokens, cut into windows in a seeded shuffled order."""

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from dynlight.errors import require

BOS = "<s>"


def read_texts(files: str | list[str]) -> list[str]:
    """Return the text of each file that a path or glob pattern matches, in the order of the names; a file is one document.

    Of several patterns each must match a file; a file that two of them match is read once.
    """
    paths: set[str] = set()
    for pattern in [files] if isinstance(files, str) else files:
        found = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = {path for path in found if Path(path).is_file()}
        require(bool(matches), "data.files", "be a pattern that matches a file", got=repr(pattern))
        paths |= matches
    require(bool(paths), "data.files", "be a pattern, or several", got=repr(files))
    texts = [Path(path).read_bytes().decode("utf-8", "replace") for path in sorted(paths)]
    require(any(texts), "data.files", "be files with text in them", got=f"{len(paths)} empty files")
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: any text comes back unchanged, and the one special token, `<s>`, is BOS and EOS.

    Args:
        texts: documents to learn the merges from.
        vocabulary: tokens in all, the 256 bytes and `<s>` included; fewer where the texts hold no more pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def token_stream(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """Join documents into one stream of token ids [tokens], a BOS (else EOS) before each."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(bos is not None, "model.pretrained", "be a model whose tokenizer has a BOS or an EOS token", got="neither")
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([bos, *document]) for document in documents])


class WindowStream(IterableDataset):
    """The windows of each update, [windows, W + 1], in a seeded shuffled order, pass after pass, from any update on.

    Window i of a pass holds the stream's tokens o + i·W … o + (i + 1)·W, its last one only as a target. The order of a
    pass and its offset o ≤ W follow from the seed and the pass alone, so a resumed run sees what an unbroken one sees.
    """

    def __init__(
        self, stream: torch.Tensor, window: int, windows: int, updates: int, seed: int, start: int = 0
    ) -> None:
        self.stream, self.window, self.windows = stream, window, windows
        self.updates, self.seed, self.start = updates, seed, start

    def __iter__(self) -> Iterator[torch.Tensor]:
        in_pass = max(1, len(self.stream) // self.window - 1)
        starts: list[int] = []
        of_update: list[torch.Tensor] = []
        pass_drawn = -1
        for i in range(self.start * self.windows, self.updates * self.windows):
            if i // in_pass != pass_drawn:
                pass_drawn = i // in_pass
                starts = self.starts_of(pass_drawn, in_pass)
            start = starts[i % in_pass]
            of_update.append(self.stream[start : start + self.window + 1])
            if len(of_update) == self.windows:
                yield torch.stack(of_update)
                of_update = []

    def starts_of(self, number: int, in_pass: int) -> list[int]:
        """Return where in the stream each window of a pass begins, in the order in which they are read."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        largest_offset = min(self.window, len(self.stream) - 1 - in_pass * self.window)
        offset = int(torch.randint(largest_offset + 1, (1,), generator=draw))
        return (torch.randperm(in_pass, generator=draw) * self.window + offset).tolist()


class TextWindows(LightningDataModule):
    """Text files as shuffled windows of tokens.

    Args:
        files: glob pattern, or a list of them; each file is one document.
        tokens: tokens to learn from in all, repetition counted, rounded up to whole updates; 0 learns nothing.
        window: tokens read together.
        windows: windows in one update.
    """

    def __init__(self, files: str | list[str], tokens: int, window: int = 512, windows: int = 8) -> None:
        super().__init__()
        require(tokens >= 0, "data.tokens", "be at least 0", got=tokens)
        require(window >= 1, "data.window", "be at least 1", got=window)
        require(windows >= 1, "data.windows", "be at least 1", got=windows)
        self.files, self.window, self.windows = files, window, windows
        self.updates = math.ceil(tokens / (window * windows))
        self.seed, self.stream = 0, torch.empty(0, dtype=torch.long)

    def prepare(self, texts: list[str], tokenizer: Any, seed: int) -> None:
        """Turn texts into the stream that windows are cut from, in an order that follows from the seed."""
        self.seed, self.stream = seed, token_stream(texts, tokenizer)
        tokens = len(self.stream)
        require(self.window < tokens, "data.window", f"be shorter than the data ({tokens} tokens)", got=self.window)

    def train_dataloader(self) -> DataLoader:
        """Return the windows of the updates that the module has not made yet."""
        trainer: Any = self.trainer
        start = trainer.lightning_module.updates
        stream = WindowStream(self.stream, self.window, self.windows, self.updates, self.seed, start)
        return DataLoader(stream, batch_size=None)
