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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynlight.documents.document import Document
from dynlight.documents.segments import Segment
from dynlight.durable import draft_of, write_text
from dynlight.errors import SettingError, require, require_at_least
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.processes import way_of
from dynlight.learning.score import Score
from dynlight.recording.meter import Meter
from dynlight.recording.report.ratios import bits_per_byte
from dynlight.recording.report.text import number, one_line

ADAPTER, WEIGHTS = "adapter_model.safetensors", "weights.safetensors"
FILES = (ADAPTER, WEIGHTS, "adapter_config.json", "README.md")


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
class SoFar:
    """What was read of a document so far, and the nats of each rule."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    static_nats: float | None = 0.0
    of_rules: list[float] = field(default_factory=list)

    def add(self, module: DynamicEvaluation, score: Score, row: int) -> None:
        """Adds the score of a row of a segment."""
        self.tokens += score.segment.tokens[row]
        self.bytes += score.segment.bytes[row]
        self.nats += score.sums[row]
        static = None if score.static_sums is None else score.static_sums[row]
        self.static_nats = None if static is None or self.static_nats is None else self.static_nats + static
        nats = [score.sums[row]] if module.rules else []
        if score.experts is not None:
            first = len(module.experts) - len(module.predictor.memories.experts) - len(module.rules)
            of_experts = score.experts.nats[:, row, score.segment.scored[row]].sum(axis=1, dtype=np.float64)
            nats = of_experts[first : first + len(module.rules)].tolist()
        self.of_rules = [before + more for before, more in zip(self.of_rules or [0.0] * len(nats), nats, strict=True)]

    def learned(self, module: DynamicEvaluation, row: int) -> dict[int, dict[str, Tensor]]:
        """By rule what each has learned from the document of a row, that of the fewest nats first; none that has failed."""
        places = [owner for owner in module.weights.owners if owner[1] == row] if module.rules else []
        learned = {owner[0]: module.weights.learned_by(owner) for owner in places}
        rules = sorted(learned, key=(self.of_rules or [0.0] * len(module.rules)).__getitem__)
        return {rule: learned[rule] for rule in rules if all(each.isfinite().all() for each in learned[rule].values())}

    def card(self, module: DynamicEvaluation, rule: int, name: str) -> dict[str, str]:
        """What a model card says of what a rule has learned from the document of this name."""
        static, own = (bits_per_byte(nats, self.bytes) for nats in (self.static_nats, self.of_rules[rule]))
        return {
            "document": one_line(name),
            "read": f"{self.tokens:,} tokens, {self.bytes:,} bytes, from the first",
            "bits per byte": f"{number(static)} by the initial weights, {number(own)} by these, each segment before it was "
            "learned from",
            "rule": names_of_rules(module)[rule],
            "protocol": module.protocol,
        }


class Kept(Meter):
    """Writes what each document taught; of a document that failed, nothing from then on.

    Args:
        folder: of the run.
        keep: what, and when.
        loads: what `from_pretrained` is given to load the model, as in `"x", revision="y"`.
    """

    def __init__(self, folder: Path, keep: Keep, loads: str = "") -> None:
        self._loads = loads
        self._folder = folder
        self._keep = keep
        self._read: dict[int, SoFar] = {}

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        segments = segment.cut.index + 1
        is_due = self._keep.at != "end" and segments % self._keep.at == 0
        for row, document in enumerate(segment.documents):
            if document.index in module.failures.of_documents:
                self._read.pop(document.index, None)
                continue
            assert module.score is not None, "the document has not failed"
            so_far = self._read.setdefault(document.index, SoFar())
            so_far.add(module, module.score, row)
            folder = folder_of(self._folder, document)
            if is_due:
                self._write(folder / f"segment-{segments}", module, document, row)
            if document in segment.finished:
                self._write(folder, module, document, row)
                del self._read[document.index]

    def _write(self, folder: Path, module: DynamicEvaluation, document: Document, row: int) -> None:
        """Writes what the rule of the fewest nats has learned, and of several rules what each has."""
        so_far = self._read[document.index]
        learned = so_far.learned(module, row)
        places = [(folder, rule) for rule in list(learned)[:1]]
        if len(module.rules) > 1:
            names = names_of_rules(module)
            places += [(folder / "rules" / f"{rule}-{_as_file_name(names[rule])}", rule) for rule in learned]
        for place, rule in places:
            write_learned(place, module, learned[rule], so_far.card(module, rule, document.name), self._loads)

    def state_dict(self) -> dict[str, Any]:
        """What was read of each document."""
        return {"read": {document: asdict(so_far) for document, so_far in self._read.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._read = {document: SoFar(**sums) for document, sums in state_dict["read"].items()}


def folder_of(run: Path, document: Document) -> Path:
    """Where a run keeps what a document taught."""
    return run / "kept" / f"{document.index}-{_as_file_name(document.name)}"


def names_of_rules(module: DynamicEvaluation) -> list[str]:
    """The name of each rule, as in the protocol."""
    return [expert.name for expert in module.experts if expert.rule is not None]


def write_learned(
    folder: Path, module: DynamicEvaluation, learned: Mapping[str, Tensor], card: Mapping[str, str], loads: str = ""
) -> None:
    """Writes learned weights as PEFT or transformers loads them, with a model card.

    Args:
        folder: is made where it is not there.
        module: that learned.
        learned: the weights, by their names in the module's model.
        card: what the card's table says.
        loads: see `Kept`.
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
    rows = {"model": f"`{base}`"} | {key: value.replace("|", "\\|") for key, value in card.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    write_text(folder / "README.md", _CARD[name].format(base=base, loads=loads or f'"{base}"', table=table))


def read_learned(folder: Path) -> dict[str, Tensor]:
    """What `write_learned` wrote, by the names of the weights; weights that did not change are left out.

    Raises:
        SettingError: if it is not there.
    """
    for name in (ADAPTER, WEIGHTS):
        if (folder / name).is_file():
            try:
                tensors = load_file(folder / name)
            except (SafetensorError, OSError) as error:
                raise SettingError("run", f"have kept a {name} that is whole", got=f"{folder}: {error}") from error
            return {_of_peft(key): weight for key, weight in tensors.items()} if name == ADAPTER else tensors
    raise SettingError("run", f"have kept {ADAPTER} or {WEIGHTS}", got=folder)


def _of_peft(name: str) -> str:
    """The name of a weight in the model, from PEFT's in a file: `…lora_A.weight` is `…lora_A.default.weight`."""
    own = re.sub(r"(\.lora_(?:A|B)|\.lora_embedding_(?:A|B))", r"\1.default", name)
    return own.removeprefix("base_model.model.")


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
model = AutoModelForCausalLM.from_pretrained({loads}, dtype="float32")
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
model = AutoModelForCausalLM.from_pretrained({loads}, dtype="float32")
model.load_state_dict(safetensors.torch.load_file("this folder/weights.safetensors"), strict=False)
```
""",
}


def _as_file_name(name: str) -> str:
    """A name as one of a file on any system, shortened.

    >>> _as_file_name("books/Emma, vol. 2.txt")
    'books-Emma-vol.-2.txt'
    """
    plain = re.sub(r"[^\w.+=-]+", "-", name).strip("-.")
    return plain.encode()[:120].decode(errors="ignore").rstrip("-.") or "document"
