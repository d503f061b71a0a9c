"""Rows: documents that each have weights of their own, read as one ordinary batch.

The model runs once, on a batch whose rows are the documents. Only modules that directly hold learned weights must know of
rows: each becomes, in place, of a class that reads every row with that row's weights. Everything else of the model
(attention and its kernel, caches, experts, `torch.compile`) sees a batch as always. Without a batch of rows these modules
are what they were, with the weights θ0 that the model itself holds.

| module | with R rows |
|---|---|
| linear map, adapter, GPT-2's `Conv1D` | one batched product: x [R, S, I], W [R, O, I] → [R, S, O] |
| embedding, also one tied to the output layer | a lookup by row: ids [R, S], W [R, V, E] → [R, S, E] |
| layer norm, and what has a weight for each feature (found by trial) | weights [R, 1, …, E], which broadcast |
| any other | one row after another |
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dynlight.choices.parameters import NarrowLinear


class Batch:
    """The batch of rows that the model reads at present, if any.

    Args:
        stacks: the learned weights of all modules, with an axis of rows in front: [R, *shape] each.
    """

    def __init__(self, stacks: list[Tensor]) -> None:
        self.stacks = stacks
        self.is_on = False
        self.rows = 0
        self.columns = 0

    @contextmanager
    def of(self, inputs: Tensor) -> Iterator[None]:
        """Within the block the model reads each row of `inputs` [rows, columns] with that row's weights."""
        self.is_on, (self.rows, self.columns) = True, inputs.shape
        try:
            yield
        finally:
            self.is_on = False


class Stacks:
    """Which stacks are the learned weights of one module.

    Args:
        batch: what holds all stacks.
        numbers: of the module's own among them, by the weight's name in the module.
        plain: the module as it was.
    """

    def __init__(self, batch: Batch, numbers: Mapping[str, int], plain: Any) -> None:
        self.batch = batch
        self.numbers = numbers
        self.plain = plain
        self.are_batches: dict[int | str, bool] = {}  # which arguments of a module read one by one are batches of rows

    @property
    def weights(self) -> dict[str, Tensor]:
        """The module's learned weights [R, *shape], by name."""
        return {name: self.batch.stacks[number] for name, number in self.numbers.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stacks":
        # A copy of a model reads with its own weights alone.
        return Stacks(Batch([]), {}, copy.deepcopy(self.plain, memo))


class InRows(nn.Module):
    """A module that reads each row with the row's own weights while its batch is on; put before the module's own class."""

    stacks: Stacks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stacks.batch.is_on:
            return self.read(*args, **kwargs)
        return super().forward(*args, **kwargs)  # of the module's own class

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of a batch, each row with its own weights."""
        raise NotImplementedError

    def weight_of(self, name: str) -> Any:
        """A weight with an axis of rows in front, or without where it doesn't learn."""
        number = self.stacks.numbers.get(name)
        return getattr(self, name) if number is None else self.stacks.batch.stacks[number]


class OnBatch(InRows):
    """One with a single input: a batch [R, …, E], [1, …, E] for all rows, or [R · S, E], where a model has flattened it."""

    def read(self, x: Tensor) -> Tensor:
        rows = self.stacks.batch.rows
        if x.ndim == 2:
            return self.of_batch(x.unflatten(0, (rows, -1))).flatten(0, 1)
        return self.of_batch(x.expand(rows, *x.shape[1:]))

    def of_batch(self, x: Tensor) -> Tensor:
        """The output for a batch [R, …, E]."""
        raise NotImplementedError


class RowsLinear(OnBatch, nn.Linear):
    """y = x Wᵀ + b for each row: W [R, O, I], b [R, O]."""

    def of_batch(self, x: Tensor) -> Tensor:
        return _plus(_linear(x, self.weight_of("weight")), self.weight_of("bias"))


class RowsConv1D(OnBatch, Conv1D):  # type: ignore[misc] # transformers has no types here
    """y = x W + b for each row: W [R, I, O], b [R, O]."""

    def of_batch(self, x: Tensor) -> Tensor:
        return _plus(_product(x, self.weight_of("weight")), self.weight_of("bias"))


class RowsNarrow(OnBatch, NarrowLinear):
    """One side of an adapter for each row, y = x Wᵀ: W [R, O, I]; torch's own gradient adds as that of one row alone."""

    def of_batch(self, x: Tensor) -> Tensor:
        return _product(x, self.weight_of("weight").mT)


class RowsEmbedding(InRows, nn.Embedding):
    """A lookup for each row: ids [R, S], or [1, S] and [S] for all rows, and W [R, V, E] → [R, S, E]."""

    def read(self, ids: Tensor) -> Tensor:
        weight = self.weight_of("weight")
        rows, tokens, _ = weight.shape
        ids = ids.expand(rows, ids.shape[-1])
        first = torch.arange(0, rows * tokens, tokens, device=ids.device)[:, None]
        vectors = F.embedding(ids + first, weight.flatten(0, 1))
        if self.padding_idx is None:
            return vectors
        return torch.where((ids == self.padding_idx).unsqueeze(-1), vectors.detach(), vectors)  # it doesn't learn


class RowsLayerNorm(OnBatch, nn.LayerNorm):
    """Layer norm over the last axis with weight and bias [R, E] of each row."""

    def of_batch(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        weight = self.weight_of("weight")
        return _plus(x if weight is None else x * _spread(weight, x.ndim), self.weight_of("bias"))


class RowsOneByOne(InRows):
    """Any module, one row after another: the module as it was reads each row as a batch of one."""

    def read(self, *args: Any, **kwargs: Any) -> Any:
        stacks, names = self.stacks, [*range(len(args)), *kwargs]
        values = [self._by_row(name, value) for name, value in zip(names, [*args, *kwargs.values()], strict=True)]
        outputs, weights = [], stacks.weights
        for row in range(stacks.batch.rows):
            own = {name: stack[row] for name, stack in weights.items()}
            of_row = [value[row] for value in values]
            named = dict(zip(kwargs, of_row[len(args) :], strict=True))
            outputs.append(functional_call(stacks.plain, own, tuple(of_row[: len(args)]), named))
        if isinstance(outputs[0], tuple):
            return tuple(map(torch.cat, zip(*outputs, strict=True)))
        return torch.cat(outputs)

    def _by_row(self, name: int | str, value: Any) -> Sequence[Any]:
        """An argument as each row's: a batch [R, …] or flattened [R · S, …] is shared out, anything else goes to all."""
        batch = self.stacks.batch
        # Seen in the trial, where no two lengths are equal by chance.
        is_batch = self.stacks.are_batches.setdefault(name, _is_batch(value, batch))
        return value.chunk(batch.rows) if is_batch else [value] * batch.rows


class RowsBroadcast(RowsOneByOne):
    """A module with weights for each feature, which broadcast: the module as it was reads the batch with [R, 1, …, E]."""

    def read(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        if x.ndim < 3 or x.shape[0] != self.stacks.batch.rows:
            return super().read(*args, **kwargs)
        weights = {name: _spread(weight, x.ndim) for name, weight in self.stacks.weights.items()}
        return functional_call(self.stacks.plain, weights, args, kwargs)


def put_in_rows(model: nn.Module, weights: Sequence[Tensor], batch: Batch) -> None:
    """Makes each module that holds some of the learned `weights` read a batch with the row's own, from the batch's stacks."""
    for module in model.modules():
        if isinstance(module, InRows):  # by an earlier run
            module.__class__ = type(module.stacks.plain)
    number_of = {id(weight): number for number, weight in enumerate(weights)}
    for holder, own in list(_holders(model)):
        numbers = {name: number_of[id(weight)] for name, weight in own.items() if id(weight) in number_of}
        if numbers:
            plain = copy.copy(holder)
            holder.__class__ = _class_for(holder, list(numbers))
            object.__setattr__(holder, "stacks", Stacks(batch, numbers, plain))


def kinds_one_by_one(model: nn.Module) -> list[str]:
    """The classes of modules that are read one row after another, as no better way is known for them."""
    modules = [module for module in model.modules() if isinstance(module, RowsOneByOne)]
    return sorted({type(module.stacks.plain).__name__ for module in modules if not isinstance(module, RowsBroadcast)})


def _holders(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """The modules that use weights, and which: their own, those of a list or dictionary in them, and in PEFT's layers all."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside.update(module.modules())
            yield module, dict(module.named_parameters())
        elif not isinstance(module, nn.ParameterDict | nn.ParameterList):
            own = dict(module.named_parameters(recurse=False))
            for name, child in module.named_children():
                if isinstance(child, nn.ParameterDict | nn.ParameterList):
                    own |= child.named_parameters(prefix=name)
            yield module, own


def _class_for(module: nn.Module, weights: Sequence[str]) -> type:
    """The class of a module in rows: a known one, put under a class of the model's own where that builds on the known."""
    own = type(module)
    known = {nn.Linear: RowsLinear, Conv1D: RowsConv1D, NarrowLinear: RowsNarrow, nn.Embedding: RowsEmbedding,
             nn.LayerNorm: RowsLayerNorm}  # fmt: skip
    for plain, in_rows in known.items():
        if isinstance(module, plain):
            return in_rows if own is plain else type(f"Rows{own.__name__}", (own, in_rows), {})
    in_rows = RowsBroadcast if _broadcasts(module, weights) else RowsOneByOne
    return type(f"Rows{own.__name__}", (in_rows, own), {})


def _broadcasts(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module reads rows each with weights of its own when these broadcast over a batch, found by trial."""
    weights = [module.get_parameter(name) for name in names]
    if any(weight.ndim != 1 or len(weight) != len(weights[0]) for weight in weights):
        return False
    draw = torch.Generator().manual_seed(0)
    width, device, dtype = len(weights[0]), weights[0].device, weights[0].dtype
    x = torch.randn(2, 3, width, generator=draw).to(device, dtype)
    stacks = {name: torch.randn(2, 1, width, generator=draw).to(device, dtype) for name in names}
    try:
        with torch.no_grad():
            together = functional_call(module, stacks, (x,))
            alone = [
                functional_call(module, {name: stack[row, 0] for name, stack in stacks.items()}, (x[row : row + 1],))
                for row in (0, 1)
            ]
    except Exception:  # whatever it raises, it is no such module
        return False
    return isinstance(together, Tensor) and torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def _is_batch(value: Any, batch: Batch) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) in (batch.rows, batch.rows * batch.columns)


def _spread(weight: Tensor, ndim: int) -> Tensor:
    """A weight for each feature, [R, E] or [E], in a shape that broadcasts with a batch [R, …, E] of `ndim` axes."""
    return weight.view(weight.shape[0], *[1] * (ndim - 2), -1) if weight.ndim == 2 else weight


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + _spread(bias, y.ndim)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Y = x W: x [R, …, I]; W [R, I, O], or [I, O] for all rows."""
    return (x.flatten(1, -2) @ weight).view(*x.shape[:-1], -1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Y = x Wᵀ: x [R, …, I]; W [R, O, I], or [O, I] for all rows."""
    if weight.ndim == 2:
        return F.linear(x, weight)
    if torch.is_autocast_enabled(x.device.type):  # autocast does not reach into `_Linear`
        x, weight = (each.to(torch.get_autocast_dtype(x.device.type)) for each in (x, weight))
    y: Tensor = _Linear.apply(x.flatten(1, -2), weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """x Wᵀ for each of R rows: x [R, N, I], W [R, O, I] → y [R, N, O].

    torch's own gradient for W is (xᵀ g)ᵀ: the same numbers as gᵀ x, but transposed in memory. Where it is stored beside
    the weight all of it is copied, a quarter of the time on short segments.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        (gradient,) = gradients
        return gradient @ weight if needs_x else None, gradient.mT @ x if needs_weight else None
