"""Kept: what each document taught, in the form in which PEFT and transformers load it.

runs/x/kept/0-inspect.py/                    what the document taught; of several rules, the one with the fewest nats
    adapter_model.safetensors, adapter_config.json   of `LoRA`, for `PeftModel.from_pretrained`
    weights.safetensors                      of other weights: those that changed, under the model's own names
    README.md                                a model card
    segment-64/                              the same after 64 segments, where it is kept on the way
    rules/0-AdamW-lr-0.001/                  the same of each rule, where there are several
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

from dynlight.documents.document import Document
from dynlight.documents.segments import Segment
from dynlight.durable import draft_of, write_text
from dynlight.errors import require, require_at_least
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.processes import way_of
from dynlight.learning.score import Score
from dynlight.recording.meter import Meter
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.text import number, one_line

ADAPTER, WEIGHTS = "adapter_model.safetensors", "weights.safetensors"


@dataclass
class Keep:
    """What is kept of what each document taught, and when.

    Args:
        what: `adapters` where `LoRA` learns, else `weights`: those that changed.
        at: `end` of the document, or besides after every so many segments.

    Raises:
        SettingError: if `at` is neither.
    """

    what: Literal["adapters", "weights"]
    at: int | Literal["end"] = "end"

    def __post_init__(self) -> None:
        if self.at != "end":
            require_at_least("keep.at", 1, self.at, because=", or end")

    @classmethod
    def of(cls, setting: Any) -> Self | None:
        """What a setting asks for: `adapters` alone, say, or everything."""
        return cls(setting) if isinstance(setting, str) else setting  # type: ignore[arg-type] # one of the two words

    def check(self, module: DynamicEvaluation, trainer: Trainer) -> None:
        """Raises SettingError where a run learns nothing that could be kept so; weights may lie on `meta`."""
        require(
            bool(module.rules), "keep", "be null where nothing is learned", got=self.what, advice="choose an update"
        )
        fits = "adapters" if module.learnable.are_adapters else "weights"
        require(self.what == fits, "keep", f"be {fits} with parameters {module.learnable}", got=self.what)
        is_whole = way_of(trainer.strategy) != "sharded"
        require(is_whole, "keep", "be null with trainer.strategy model_parallel", got=self.what)


@dataclass
class _Sums:
    """What was read of a document so far, and the nats of each rule."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    static_nats: float | None = 0.0
    of_rules: list[float] = field(default_factory=list)

    def add(self, module: DynamicEvaluation, score: Score, row: int) -> None:
        self.tokens += score.segment.tokens[row]
        self.bytes += score.segment.bytes[row]
        self.nats += score.sums[row]
        static = None if score.static_sums is None else score.static_sums[row]
        self.static_nats = None if static is None or self.static_nats is None else self.static_nats + static
        nats = [score.sums[row]]
        if score.experts is not None:
            first = [expert.rule is not None for expert in module.experts].index(True)
            of_experts = score.experts.nats[:, row, score.segment.scored[row]].sum(axis=1, dtype=np.float64)
            nats = of_experts[first : first + len(module.rules)].tolist()
        self.of_rules = [before + more for before, more in zip(self.of_rules or [0.0] * len(nats), nats, strict=True)]


class Kept(Meter):
    """Writes what each document taught; of a document that failed, nothing.

    Args:
        folder: of the run.
        keep: what, and when.
    """

    def __init__(self, folder: Path, keep: Keep) -> None:
        self._folder = folder
        self._keep = keep
        self._sums: dict[int, _Sums] = {}

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        segments = segment.cut.index + 1
        is_due = self._keep.at != "end" and segments % self._keep.at == 0
        for row, document in enumerate(segment.documents):
            if document.index in module.failures.of_documents:
                self._sums.pop(document.index, None)
                continue
            assert module.score is not None, "the document has not failed"
            sums = self._sums.setdefault(document.index, _Sums())
            sums.add(module, module.score, row)
            folder = folder_of(self._folder, document)
            if is_due:
                _write(folder / f"segment-{segments}", module, document, row, sums)
            if document in segment.finished:
                _write(folder, module, document, row, self._sums.pop(document.index))

    def state_dict(self) -> dict[str, Any]:
        """The sums of each document that is being read."""
        return {"sums": {document: asdict(sums) for document, sums in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = {document: _Sums(**sums) for document, sums in state_dict["sums"].items()}


def folder_of(run: Path, document: Document) -> Path:
    """Where a run keeps what a document taught."""
    return run / "kept" / f"{document.index}-{_as_file_name(document.name)}"


def _write(folder: Path, module: DynamicEvaluation, document: Document, row: int, sums: _Sums) -> None:
    """Writes what the rule of the fewest nats has learned, and of several rules what each has."""
    learned = {rule: module.weights.learned_by((rule, place)) for rule, place in module.weights.owners if place == row}
    alive = [rule for rule, weights in learned.items() if all(weight.isfinite().all() for weight in weights.values())]
    if not alive:
        return
    rules = [expert for expert in module.experts if expert.rule is not None]
    best = min(alive, key=sums.of_rules.__getitem__)
    places = {folder: best}
    if len(rules) > 1:
        places |= {folder / "rules" / f"{rule}-{_as_file_name(rules[rule].name)}": rule for rule in alive}
    for place, rule in places.items():
        static, own = (bits_per_byte(nats, sums.bytes) for nats in (sums.static_nats, sums.of_rules[rule]))
        read = {
            "document": one_line(document.name),
            "read": f"{sums.tokens:,} tokens, {sums.bytes:,} bytes, from the first",
            "bits per byte": f"{number(static)} by the initial weights, {number(own)} by these, each segment before it was "
            "learned from",
            "rule": rules[rule].name,
            "protocol": module.protocol,
        }
        write_learned(place, module, learned[rule], read)


def write_learned(
    folder: Path, module: DynamicEvaluation, learned: Mapping[str, Tensor], card: Mapping[str, str]
) -> None:
    """Writes learned weights as PEFT or transformers loads them, with a model card.

    Args:
        folder: is made where it is not there.
        module: that learned.
        learned: the weights, by their names in the module's model.
        card: what the card's table says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = module.model
    base = str(model.name_or_path)
    if module.learnable.are_adapters:
        name = ADAPTER
        tensors = {f"base_model.model.{key.replace('.default', '')}": weight for key, weight in learned.items()}
        config = copy.copy(model.peft_config["default"])
        config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
        config.save_pretrained(folder)
    else:
        name = WEIGHTS
        initial = dict(zip(module.weights.names, module.weights.initial, strict=True))
        tensors = {key: weight for key, weight in learned.items() if not torch.equal(weight, initial[key])}
    with draft_of(folder / name) as draft:
        # A copy: safetensors refuses a row of a stack, which shares its storage with the others.
        save_file({key: weight.detach().cpu().clone() for key, weight in tensors.items()}, draft, {"format": "pt"})
    table = "\n".join(f"| {key} | {value} |" for key, value in {"model": f"`{base}`", **card}.items())
    write_text(folder / "README.md", _CARD[name].format(base=base, table=table))


_TABLE = """
# What a document taught a language model

These weights were learned while a document was read by [dynamic evaluation](https://arxiv.org/abs/2403.01518): each of its
segments was scored first and then learned from. They remember the document, and are no better model of other text.

| | |
|---|---|
{table}

"""
_CARD = {
    ADAPTER: """---
library_name: peft
base_model: {base}
tags: [dynamic-evaluation, dynlight, lora]
---
"""
    + _TABLE
    + """```python
model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "this folder")
```
""",
    WEIGHTS: """---
library_name: transformers
base_model: {base}
tags: [dynamic-evaluation, dynlight]
---
"""
    + _TABLE
    + """```python
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="float32")
model.load_state_dict(safetensors.torch.load_file("this folder/weights.safetensors"), strict=False)
```
""",
}


def _as_file_name(name: str) -> str:
    """A name as one of a file on any system, shortened.

    >>> _as_file_name("books/Emma, vol. 2.txt")
    'books-Emma-vol.-2.txt'
    """
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.")[:80] or "document"
