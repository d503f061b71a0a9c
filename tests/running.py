"""Running dynlight on documents made of token ids, as short as a test wants it."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from dynlight import All, Context, Document, DocumentStream, DynamicEvaluation, LoRA, Overlapping, TransformerXL

TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def document(tokens: Sequence[int], index: int = 0, prefix: int = 0) -> Document:
    """A document of these tokens; each stands for one letter."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    return Document(index, f"document {index}", "x" * len(ids), ids, torch.arange(1, len(ids) + 1), prefix)


def random_tokens(length: int, seed: int, vocabulary: int = 61) -> list[int]:
    """Tokens with something to learn: a random walk over part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 7, (length,), generator=generator).cumsum(0) % vocabulary).tolist()


# Both contexts, each with the reference's words for it, and with weights of the model or adapters beside them.
IN_BOTH_CONTEXTS = pytest.mark.parametrize(
    ("context", "window", "parameters"),
    [
        (TransformerXL(16, 24), {"segment": 16, "memory": 24}, All()),
        (Overlapping(16, 40), {"segment": 16, "window": 40}, LoRA(rank=3)),
    ],
    ids=["memory", "windows"],
)


class Collect(Callback):
    """Keeps the nats of every segment, by document."""

    def __init__(self) -> None:
        self.nats: dict[int, list[Tensor]] = {}
        self.static: dict[int, list[Tensor | None]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for row in pl_module.score.rows if pl_module.score else ():
            each = batch.documents[row]
            columns = batch.scored[row]
            self.nats.setdefault(each.index, []).append(pl_module.score.nats[row, columns])
            static = pl_module.score.static_nats
            self.static.setdefault(each.index, []).append(None if static is None else static[row, columns])


class Experts(Callback):
    """Keeps what each expert said, by document: nats [experts, tokens]."""

    def __init__(self) -> None:
        self.nats: dict[int, list[np.ndarray]] = {}
        self.shares: dict[int, list[np.ndarray]] = {}
        self.read: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        score = pl_module.score
        for row in score.rows if score else ():
            index = batch.documents[row].index
            self.nats.setdefault(index, []).append(score.experts.nats[:, row, batch.scored[row]])
            self.shares.setdefault(index, []).append(score.experts.weights[:, row])
            self.read.append((index, batch.cut.index, score.experts.learners[:, row].tolist()))


def run(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    context: Context,
    callbacks: Sequence[Callback] = (),
    together: int = 1,
    **choices: Any,
) -> SimpleNamespace:
    """Reads documents of token ids; returns nats and static nats (by document and segment), and the module."""
    stream = DocumentStream.of([document(tokens, i) for i, tokens in enumerate(documents)], together)
    module = DynamicEvaluation(model, None, context=context, **({"reference": None} | choices))
    collect = Collect()
    Trainer(callbacks=[collect, *callbacks], **TRAINER).fit(module, stream)
    return SimpleNamespace(
        nats=[collect.nats.get(i, []) for i in range(len(documents))],
        static=[collect.static.get(i, []) for i in range(len(documents))],
        module=module,
    )


def as_ours(update: Callable[[Any], Any], learned: Any) -> Any:
    """The optimizer as dynlight makes it: with torch's fused kernel where there is one."""
    optimizer = update(learned)
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True
        elif "foreach" in group:
            group["foreach"] = True
    return optimizer


def stopped(module: DynamicEvaluation) -> dict[int, int]:
    """The documents that were read no further, each with the segment in which it failed."""
    return {index: failure.segment for index, failure in module.failures.of_documents.items() if failure.stopped}


def finished_static(module: DynamicEvaluation) -> dict[int, int]:
    """The documents that the initial weights have taken over, each with the first segment that they read."""
    return {index: failure.segment for index, failure in module.failures.of_documents.items() if not failure.stopped}


Make = Callable[[Any], Any]
