"""Cells: the ways in which dynlight reads a tiny model, each beside the loop."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynlight import (
    Context,
    Document,
    DocumentStream,
    DynamicEvaluation,
    LoRA,
    Mixture,
    Overlapping,
    Pretrained,
    Records,
    SettingError,
    TransformerXL,
)
from experiments.families import loop

SEGMENT, WINDOW = 16, 48
ALL, ROOM = 256, 32  # positions of memory: more than a document has, and fewer
RATES = (0.01, 1e-3, 1e-4)  # the first at which learning is stable, so that it moves nats by more than the tolerance
RATE_OF_ADAPTERS = 1e-3
RANK, ALPHA = 4, 16
TOLERANCE = 1e-4  # of a document's nats, for the sum of its tokens' differences
_TRAINER: dict[str, Any] = {
    "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip

Kind = Literal["right", "refused", "unknown", "untried", "WRONG", "TRACEBACK"]


@dataclass(frozen=True)
class Outcome:
    """What came of one cell, with the reason or the error in a line."""

    kind: Kind
    text: str = ""


def random_tokens(length: int) -> list[int]:
    """Tokens with something to learn: a random walk over part of the vocabulary."""
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(0, 7, (length,), generator=generator).cumsum(0) % 500).tolist()


DOCUMENTS = [random_tokens(length) for length in (200, 70, 5)]


class Nats(Callback):
    """Keeps the nats of each document's tokens, segment by segment; NaN of those that were not read."""

    def __init__(self) -> None:
        self.has_begun = False
        self.of_documents = [torch.full((len(tokens),), torch.nan, dtype=torch.float64) for tokens in DOCUMENTS]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.has_begun = True
        score, start = pl_module.score, batch.cut.start
        for row in score.rows if score else ():
            nats = score.nats[row, batch.scored[row]]
            self.of_documents[batch.documents[row].index][start : start + len(nats)] = nats


class Subject:
    """A tiny model, to be read by dynlight and by the loop.

    Args:
        folder: where `save_pretrained` has written it.

    Raises:
        SettingError: if dynlight refuses to load it.
    """

    def __init__(self, folder: Path) -> None:
        self._pretrained = Pretrained(str(folder))
        self._pretrained.load()
        self.plain = AutoModelForCausalLM.from_pretrained(folder).eval()

    def by_dynlight(
        self, context: Context, together: int = 1, meters: Sequence[Callback] = (), **choices: Any
    ) -> list[Tensor]:
        """The nats of each token of each document by dynlight.

        Raises:
            SettingError: if dynlight refuses before the first segment.
            RuntimeError: if it does so later.
        """
        documents = [_document(tokens, index) for index, tokens in enumerate(DOCUMENTS)]
        nats = Nats()
        try:
            model = self._pretrained.load()
            module = DynamicEvaluation(model, None, context=context, **({"reference": None} | choices))
            Trainer(callbacks=[nats, *meters], **_TRAINER).fit(module, DocumentStream.of(documents, together))
        except SettingError as error:
            if nats.has_begun:
                raise RuntimeError(f"refused after a segment was read: {error}") from error
            raise
        return nats.of_documents

    def by_loop(
        self,
        view: Callable[[], loop.View],
        update: loop.Update | None = None,
        segment: int = SEGMENT,
        model: PreTrainedModel | None = None,
    ) -> list[Tensor]:
        """The nats of each token of each document by the loop, read by the tiny model or by a `model` made of it."""
        return [loop.read(model or self.plain, tokens, segment, view(), update) for tokens in DOCUMENTS]

    @cached_property
    def stable(self) -> tuple[float, list[Tensor]]:
        """The highest rate at which weights off in their last bit give the loop the same nats; and these nats."""
        disturbed, view = loop.disturbed(self.plain), partial(loop.Windows, WINDOW)
        for rate in RATES:
            update = partial(SGD, lr=rate)
            nats = self.by_loop(view, update)
            if apart(self.by_loop(view, update, model=disturbed), nats) < TOLERANCE / 10:
                break
        return rate, nats

    @property
    def rate(self) -> float:
        """The rate at which all weights learn."""
        return self.stable[0]

    @property
    def sgd(self) -> loop.Update:
        """How they learn."""
        return partial(SGD, lr=self.rate)

    @cached_property
    def static(self) -> list[Tensor]:
        """The loop's nats of each token, in windows, nothing learning."""
        return self.by_loop(partial(loop.Windows, WINDOW))

    @cached_property
    def in_windows(self) -> list[Tensor]:
        """The loop's nats of each token, in windows, all weights learning."""
        return self.stable[1]

    @cached_property
    def with_memory(self) -> list[Tensor]:
        """The loop's nats of each token, carrying all, all weights learning."""
        return self.by_loop(loop.Carried, self.sgd)


def _document(tokens: Sequence[int], index: int) -> Document:
    """A document of these tokens, each of which stands for a letter."""
    ends = torch.arange(1, len(tokens) + 1)
    return Document(index, f"document {index}", "x" * len(tokens), torch.tensor(tokens), ends, loop.PREFIX)


def windows(subject: Subject) -> Outcome:
    """`Overlapping(16, 48)`; all weights learn from each segment by SGD."""
    mine = subject.by_dynlight(Overlapping(SEGMENT, WINDOW), update=subject.sgd)
    return compared(mine, lambda: subject.in_windows)


def memory(subject: Subject) -> Outcome:
    """`TransformerXL(16, 256)`, room for all; all weights learn by SGD. The loop carries transformers' own cache."""
    mine = subject.by_dynlight(TransformerXL(SEGMENT, ALL), update=subject.sgd)
    return compared(mine, lambda: subject.with_memory)


def one_forward(subject: Subject) -> Outcome:
    """`TransformerXL(16, 256)`; nothing learns. The loop reads each document in one plain forward."""
    mine = subject.by_dynlight(TransformerXL(SEGMENT, ALL))
    return compared(mine, lambda: subject.by_loop(partial(loop.Windows, ALL), segment=ALL))


def trimmed(subject: Subject) -> Outcome:
    """`TransformerXL(16, 32)`; nothing learns. The loop cuts keys and values in its cache to the last 32 positions."""
    mine = subject.by_dynlight(TransformerXL(SEGMENT, ROOM))
    if not loop.Trimmed.suits(subject.plain):
        return Outcome("untried")
    return compared(mine, lambda: subject.by_loop(partial(loop.Trimmed, ROOM)))


def lora(subject: Subject) -> Outcome:
    """`Overlapping(16, 48)`; adapters of rank 4 learn by AdamW at 0.001. The loop has PEFT's own."""
    learning = partial(AdamW, lr=RATE_OF_ADAPTERS)
    mine = subject.by_dynlight(Overlapping(SEGMENT, WINDOW), parameters=LoRA(RANK, ALPHA), update=learning)

    def expected() -> list[Tensor]:
        model = loop.adapted(subject.plain, RANK, ALPHA)
        return subject.by_loop(partial(loop.Windows, WINDOW), learning, model=model)

    return compared(mine, expected)


def together(subject: Subject) -> Outcome:
    """As windows, with three documents together. The loop reads one after another."""
    mine = subject.by_dynlight(Overlapping(SEGMENT, WINDOW), together=len(DOCUMENTS), update=subject.sgd)
    return compared(mine, lambda: subject.in_windows)


def together_with_memory(subject: Subject) -> Outcome:
    """As memory, with three documents together. The loop reads one after another."""
    mine = subject.by_dynlight(TransformerXL(SEGMENT, ALL), together=len(DOCUMENTS), update=subject.sgd)
    return compared(mine, lambda: subject.with_memory)


def mixture(subject: Subject) -> Outcome:
    """As windows, `Mixture()` of static and of one rule. The loop has the formula written out."""
    choices = {"update": SGD, "rates": [subject.rate], "mixture": Mixture(), "reference": "static"}
    mine = subject.by_dynlight(Overlapping(SEGMENT, WINDOW), **choices)

    def expected() -> list[Tensor]:
        experts = zip(subject.static, subject.in_windows, strict=True)
        return [loop.mixed(of_document, Mixture().switching) for of_document in experts]

    return compared(mine, expected)


def flops(subject: Subject) -> Outcome:
    """As windows: their FLOPs are a finite number, or unknown, and a warning says why."""
    records = Records()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        subject.by_dynlight(Overlapping(SEGMENT, WINDOW), meters=[records], update=subject.sgd)
    counted = records.documents["flops"]
    if counted.map(math.isfinite).all() and (counted > 0).all():
        return Outcome("right")
    reasons = [" ".join(str(each.message).split()) for each in warned if "FLOPs" in str(each.message)]
    return Outcome("unknown", reasons[0]) if reasons else Outcome("WRONG", f"{list(counted)} without a warning")


CELLS: dict[str, Callable[[Subject], Outcome]] = {
    "windows": windows,
    "memory": memory,
    "one forward": one_forward,
    "trimmed": trimmed,
    "LoRA": lora,
    "together": together,
    "together, memory": together_with_memory,
    "mixture": mixture,
    "FLOPs": flops,
}


def compared(mine: Sequence[Tensor], expected: Callable[[], Sequence[Tensor]]) -> Outcome:
    """Whether each document's nats are those of the loop; untried where the loop itself cannot read it."""
    try:
        of_loop = expected()
    except Exception as error:  # whatever a model raises that is not made for it
        return Outcome("untried", f"the loop fails: {raised(error)}")
    far = apart(mine, of_loop)
    return Outcome("right") if far <= TOLERANCE else Outcome("WRONG", f"{far:.1g}")


def apart(mine: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest Σ |difference| / Σ nats of a document; NaN if nats are not finite."""
    of_documents = [
        (own - nats.double()).abs().sum() / nats.double().sum() for own, nats in zip(mine, expected, strict=True)
    ]
    return float(torch.stack(of_documents).max())


def tried(name: str, subject: Subject) -> Outcome:
    """What comes of a cell, whatever it raises."""
    try:
        return CELLS[name](subject)
    except SettingError as error:
        return Outcome("refused", str(error))
    except Exception as error:  # what nothing has foreseen
        return Outcome("TRACEBACK", raised(error))


def raised(error: Exception) -> str:
    """An error in a line, with the place that raised it."""
    place = extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:160]} ({Path(place.filename).name}, line {place.lineno})"
