"""The host waits for the device once a segment: counted on a CPU, as no wait is seen there."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from models import tiny
from running import random_tokens, run
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynlight import LoRA, Mixture, Overlapping, TransformerXL, UpdateFrequency
from dynlight.learning.fetch import Fetch
from dynlight.recording.receipt import Receipt
from dynlight.recording.records import Records

READS = {"cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__array__"}
LENGTHS_BY_DATA = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class Waits(TorchFunctionMode):
    """Counts calls that would wait for a device: those that read a tensor other than what one of them brought."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_host = bool(tensors) and all(getattr(each, "is_on_host", False) for each in tensors)
        name = getattr(func, "__name__", "")
        with Lengths(self, on_host or name in READS):
            result = func(*args, **(kwargs or {}))
        if name in READS and not on_host:
            self.calls.append(name)
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (on_host or name == "cpu"):
                each.is_on_host = True
        return result


class Lengths(TorchDispatchMode):
    """Counts operators that read a number, or whose result is as long as data says."""

    def __init__(self, waits: Waits, known: bool) -> None:
        super().__init__()
        self.waits, self.known = waits, known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        is_mask = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if not self.known and (name in LENGTHS_BY_DATA or is_mask):
            self.waits.calls.append(name)
        return func(*args, **(kwargs or {}))


class Begin(Callback):
    """Begins to count before a segment's step; put before all other callbacks."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for document in batch.documents:
            document.tokens.is_on_host = document.ends.is_on_host = True
        self.waits = Waits()
        self.waits.__enter__()


class End(Callback):
    """Counts until a segment's meters have seen it; put after all other callbacks."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.of_segments: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.begin.waits.__exit__(None, None, None)
        # Files are written when a document ends, and FLOPs are counted on the host when a shape is new.
        if not batch.finished and batch.cut.index > 3:
            self.of_segments.append(self.begin.waits.calls)


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    def sums_of_bits(weight, start=0):  # on a CPU numpy adds them
        return weight.contiguous().view(torch.int32).sum(1)

    from_numpy = torch.from_numpy  # no mode sees a call of it

    def marked(array):
        tensor = from_numpy(array)
        tensor.is_on_host = True
        return tensor

    monkeypatch.setattr("torch.from_numpy", marked)
    monkeypatch.setattr("dynlight.learning.weights.sums_of_bits", sums_of_bits)
    monkeypatch.setattr("dynlight.learning.stacked.sums_of_bits", sums_of_bits)


SGD = partial(torch.optim.SGD, lr=0.1)
CHOICES: dict[str, dict[str, Any]] = {
    "one": {"update": SGD},
    "static": {"update": None},
    "windows": {"update": SGD, "context": Overlapping(8, 16)},
    "adam": {"update": partial(torch.optim.Adam, lr=0.01)},
    "together": {"update": SGD, "together": 3},
    "adapters": {"update": partial(torch.optim.Adam, lr=0.01), "together": 3, "parameters": LoRA(rank=2)},
    "clip": {"update": SGD, "together": 3, "clip": 0.1},
    "rates": {"update": SGD, "rates": [0.1, 0.01]},
    "mixture": {"update": [SGD, partial(torch.optim.Adam, lr=0.01)], "together": 2, "mixture": Mixture()},
    "finish static": {"update": SGD, "together": 2, "on_failure": "static"},
    "every other": {"update": SGD, "schedule": UpdateFrequency(2)},
}


@pytest.mark.parametrize(
    ("chosen", "architecture"), [*product(CHOICES, ["llama"]), *product(["together", "adapters"], ["gpt2", "gemma3"])]
)
def test_the_host_waits_once_a_segment(chosen, architecture):
    begin = Begin()
    end = End(begin)
    context = Overlapping(8, 16) if architecture == "gpt2" else TransformerXL(8, 16)
    choices = {"context": context, "reference": "static", "digests": True} | CHOICES[chosen]
    documents = [random_tokens(length, seed) for seed, length in enumerate((90, 90, 60))]
    run(tiny(architecture), documents, callbacks=[begin, Records(), Receipt(), end], **choices)
    assert len(end.of_segments) >= 6
    assert {tuple(waits) for waits in end.of_segments} == {("cpu",)}


def test_each_pass_waits_once():
    begin = Begin()
    end = End(begin)
    choices = {"update": SGD, "schedule": UpdateFrequency(passes=3), "reference": "static", "digests": True}
    run(tiny("llama"), [random_tokens(90, 0)], TransformerXL(8, 16), [begin, Records(), Receipt(), end], **choices)
    assert {tuple(waits) for waits in end.of_segments} == {("cpu",) * 3}


def test_waits_are_seen():
    with Waits() as waits:
        x = torch.randn(3)
        bool(x.sum() > 0)
        x.tolist()
        x[x > 0]
        x.nonzero()
        host = x.cpu()
        host.tolist()
        host.sum().item()
    assert waits.calls == ["__bool__", "tolist", "index", "nonzero", "cpu"]


def test_values_of_all_types_come_in_one_wait():
    values = [torch.tensor([True, False]), torch.randn(2, 3).T, torch.arange(3), torch.randn(0, 4), torch.tensor(1.5)]
    values = [*values, torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.bfloat16)]
    fetch = Fetch()
    asked = [fetch.later(value) for value in values]
    with Waits() as waits:
        brought = [later() for later in asked]
    assert waits.calls == ["cpu"]
    for value, got in zip(values, brought, strict=True):
        assert got.dtype == value.dtype and torch.equal(got, value)


def test_what_is_asked_later_comes_later():
    fetch = Fetch()
    first = fetch.later(torch.tensor([1.0]))
    assert first().item() == 1.0
    second = fetch.later(torch.tensor([2.0]))
    assert first().item() == 1.0 and not second.has_arrived
    assert second().item() == 2.0


def test_what_is_asked_for_does_not_hold_the_graph():
    weight = torch.ones(3, requires_grad=True)
    assert not Fetch().later(2 * weight).value.requires_grad
