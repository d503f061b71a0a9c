"""Stacked: learned weights of many documents, or of one document at many rates, with an axis of rows in front."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dynlight.choices.gradient import Gradient
from dynlight.documents.segments import NOT_SCORED, Context, Segment
from dynlight.errors import require
from dynlight.learning.carried import Memory, each_of, restored
from dynlight.learning.digests import WeightDigests, sums_of_bits
from dynlight.learning.fetch import Fetch
from dynlight.learning.forward import Guide, Keeps, Reading, read_alone
from dynlight.learning.rows import Batch, put_in_rows
from dynlight.learning.trial import reason_against_rows, reason_against_rows_alone
from dynlight.learning.weights import Owner, Weights, all_finite


class Stacked(Weights):
    """Learned weights with an axis of rows in front, [rows, *shape]: each row is one rule's learning from one document.

    The model reads all rows as one batch (`rows.py`), or, where a trial shows that it cannot, one row after another, with
    the row's weights in the place of its own. Its own parameters stay θ0, with which the static reference reads all
    documents in one batch. Rows lie rule by rule, so that the optimizer of a rule, which must be elementwise, updates the
    rows of all documents at once:

        rows of 2 rules and a wave of 3 documents       r0 d0 · r0 d1 · r0 d2 · r1 d0 · r1 d1 · r1 d2
        when document 2 has ended                       r0 d0 · r0 d1 · r1 d0 · r1 d1
        when rule 1 has failed on document 0            r0 d0 · r0 d1 · r1 d1

    A row that is not needed any more is dropped from weights, memory and optimizer state, and costs nothing.

    Args:
        model: that reads.
        context: what a forward has in view.
        documents: of a wave, at most.
        rules: that learn from each.
        compile: whether forward and backward are compiled; or the mode of it.
        apart: whether rows may learn from a segment while others don't: then an optimizer has a parameter for each row of a
            weight, so that each row has its own count of updates; else one for all rows, which is faster.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: Context,
        documents: int,
        rules: int = 1,
        compile: bool | str = False,
        apart: bool = False,
    ) -> None:
        super().__init__(model, context, compile)
        learnable = [weight for weight in model.parameters() if weight.requires_grad]
        self.initial = [weight.detach() for weight in learnable]
        self._storage = [initial.repeat(documents * rules, *[1] * initial.ndim) for initial in self.initial]
        self._error_storage: list[list[Tensor]] = []  # of `errors`
        self.learned = [_leaf(storage) for storage in self._storage]
        self._apart = apart
        tensors = [weight[0] for weight in self.learned] * documents if apart else self.learned
        self.of_rules = [[nn.Parameter(weight.detach()) for weight in tensors] for _ in range(rules)]
        self.owners = []
        self._spans: list[slice] = []  # of each rule, its rows
        self._running = documents  # documents of the wave that have not ended: its first ones
        self._batch = Batch(self.learned)
        put_in_rows(model, learnable, self._batch)
        self.reason_against_batch = reason_against_rows(model, context, learnable, self._batch)
        if self.reason_against_batch is not None:
            put_in_rows(model, [], self._batch)
            reason = reason_against_rows_alone(model, context, self.names, self.learned)
            must = f"be 1, without rates and mixture, for {model.config.model_type}, {reason}"
            require(reason is None, "data.together", must, got=documents)
        self.reset(documents)

    def enter(self, segment: Segment, optimizers: Sequence[Optimizer]) -> None:
        super().enter(segment, optimizers)
        # Something may have changed the weights since the last commit, and torch counts changes of all rows together.
        self._sums = None

    def _narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        if documents < self._running:
            self._running = documents
            self.static_memory = _rows_of(self.static_memory, slice(documents))
            self._take([row for row, (_, document) in enumerate(self.owners) if document < documents], optimizers)

    def drop(self, rows: Collection[int], optimizers: Sequence[Optimizer]) -> None:
        """Drops rows for good: those of rules that have failed."""
        self._take([row for row in range(len(self.owners)) if row not in rows], optimizers)

    def score(self, segment: Segment, guide: Guide | None = None, keeps: Keeps = (), plain: bool = False) -> Reading:
        if not self.owners:
            return Reading(segment.inputs.new_empty((0, segment.targets.shape[1]), dtype=torch.float32), None)
        spread = segment.changed(self._spread)
        beside = None if guide is None else guide._replace(logits=self._spread(guide.logits))
        if self.reason_against_batch is not None:
            return read_alone(self.model, self.names, self.learned, spread, self.memory, self.context, beside, keeps)
        with self._batch.of(spread.inputs):
            return self._read(spread, self.memory, beside, keeps, plain)

    def scored(self, segment: Segment) -> Tensor:
        return self._spread(segment.targets != NOT_SCORED)

    @torch.no_grad()
    def score_static(self, segment: Segment, keeps: Keeps = ()) -> Reading:
        memory = self.static_memory
        with self.under_initial():
            if self.reason_against_batch is None:
                reading = self._read(segment, memory, keeps=keeps)
            else:
                reading = read_alone(self.model, [], [], segment, memory, self.context, keeps=keeps)
        self.static_memory = reading.memory
        return reading

    def gradients(self) -> dict[int, Tensor]:
        return {place: stack.grad for place, stack in enumerate(self.learned) if stack.grad is not None}

    def values(self) -> list[Tensor]:
        return [stack.detach() for stack in self.learned]

    @contextmanager
    def under_initial(self) -> Iterator[None]:
        self._switch_adapters(False)
        try:
            yield
        finally:
            self._switch_adapters(True)

    @contextmanager
    def put_in_model(self, owner: Owner) -> Iterator[None]:
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for weight, learned in zip(weights, self.learned_by(owner).values(), strict=True):
            weight.data = learned
        try:
            yield
        finally:
            for weight, initial in zip(weights, self.initial, strict=True):
                weight.data = initial

    def norms(self) -> Tensor:
        squares = [gradient.flatten(1).pow(2).sum(dim=1) for gradient in self.gradients().values()]
        return torch.stack(squares).sum(dim=0).sqrt()

    def change_gradients(self, changes: Sequence[Gradient], learners: Sequence[bool]) -> None:
        if self.owners:
            super().change_gradients(changes, learners)

    def keep_errors(self, changes: Sequence[Gradient]) -> None:
        self._error_storage = [
            [torch.zeros_like(storage) for storage in self._storage * change.keeps_errors] for change in changes
        ]
        self._bind()

    def finite(self) -> Tensor:
        sums = [stack.grad.flatten(1).sum(dim=1) for stack in self.learned if stack.grad is not None]
        return all_finite(sums, len(self.owners), self.model.device)

    def step(self, optimizers: Sequence[Optimizer], finite: Sequence[bool], learners: Sequence[bool]) -> None:
        for rule, optimizer in enumerate(optimizers):
            parts = list(self._parts(rule))
            for number, (weight, stack, rows) in enumerate(parts):
                learns = isinstance(rows, slice) or (
                    learners[rows] and number % len(self.learned) not in self.stopped.get(self.owners[rows], ())
                )
                weight.grad = stack.grad[rows] if learns and stack.grad is not None else None
            if parts:
                optimizer.step()
            for weight, _, _ in parts:
                weight.grad = None
        self.drop_gradients()
        self._sums = None

    @torch.no_grad()
    def reset(self, documents: int, keep: float = 0.0) -> None:
        rows = documents * len(self.of_rules)
        kept = [(row, rule) for row, (rule, _) in enumerate(self.owners)] if keep else []  # of one document
        for storage, initial in zip(self._storage, self.initial, strict=True):
            learned = [storage[row] - initial for row, _ in kept]
            storage[:rows].copy_(initial)
            for (_, rule), change in zip(kept, learned, strict=True):
                storage[rule].add_(change, alpha=keep)
        for error in chain(*self._error_storage):
            error.zero_()
        self._running = documents
        self.owners = [(rule, document) for rule in range(len(self.of_rules)) for document in range(documents)]
        self._bind()

    def digests(self, documents: int, fetch: Fetch) -> WeightDigests:
        if self._sums is None:
            sums = [sums_of_bits(weight.detach().flatten(1)) for weight in self.learned]
            none = torch.empty(len(self.owners), 0, dtype=torch.int64, device=self.model.device)
            self._sums = fetch.later(torch.stack(sums, dim=1) if sums else none)
        owners = [document for _, document in self.owners]
        rows_of = [[row for row, owner in enumerate(owners) if owner == document] for document in range(documents)]
        return WeightDigests(self._sums, rows_of)

    def progress_state(self) -> dict[str, Any]:
        return {
            "learned": [weight.data for weight in self.learned],
            "errors": self.errors,
            "earlier": self.earlier,
            "memory": self.memory,
            "static_memory": self.static_memory,
            "owners": self.owners,
            "running": self._running,
        }

    @torch.no_grad()
    def load_progress_state(self, state: dict[str, Any]) -> None:
        for storage, saved in zip(self._storage, state["learned"], strict=True):
            storage[: len(saved)].copy_(saved)
        for storage, saved in zip(chain(*self._error_storage), chain(*state.get("errors", ())), strict=True):
            storage[: len(saved)].copy_(saved)
        self.memory, self.static_memory = (
            restored(state[name], self.model.device) for name in ("memory", "static_memory")
        )
        self.earlier = [restored(memory, self.model.device) for memory in state.get("earlier", [])]
        self._running, self.owners = state["running"], state["owners"]
        self._bind()

    def _bind(self) -> None:
        """Lets the storage's first rows be the learned weights, and points each rule's weights at its own."""
        # New leaves, as autograd keeps the shape of one.
        self.learned[:] = [_leaf(storage[: len(self.owners)]) for storage in self._storage]
        self.errors = [[storage[: len(self.owners)] for storage in storages] for storages in self._error_storage]
        documents = [document for _, document in self.owners]
        self._documents = torch.tensor(documents, dtype=torch.int64, device=self.model.device)
        counts = Counter(rule for rule, _ in self.owners)
        stops = list(accumulate(counts[rule] for rule in range(len(self.of_rules))))
        self._spans = [slice(stop - counts[rule], stop) for rule, stop in enumerate(stops)]
        for rule in range(len(self.of_rules)):
            for weight, stack, rows in self._parts(rule):
                weight.data = stack.data[rows]

    @torch.no_grad()
    def _take(self, keep: list[int], optimizers: Sequence[Optimizer]) -> None:
        """Narrows weights, memory and optimizer state to the rows `keep`."""
        narrow = self._drop_states if self._apart else self._narrow_states
        narrow(keep, optimizers)
        index = as_index(keep)
        if isinstance(index, Tensor) or index.start > 0:
            for storage in chain(self._storage, *self._error_storage):  # to its start, to take up no second storage
                storage[: len(keep)] = storage[index].clone()
        self.memory = _rows_of(self.memory, index)
        self.earlier = [_rows_of(memory, index) for memory in self.earlier]
        self.owners = [self.owners[row] for row in keep]
        self._bind()
        self._sums = None

    def _narrow_states(self, keep: list[int], optimizers: Sequence[Optimizer]) -> None:
        """Narrows optimizer state to the rows `keep`, where a parameter is of all rows."""
        for rows, weights, optimizer in self._by_rule(optimizers):
            rows_left = as_index([row - rows.start for row in keep if row in range(rows.start, rows.stop)])
            for weight in weights:
                state = optimizer.state[weight]
                optimizer.state[weight] = {key: _narrowed(value, weight, rows_left) for key, value in state.items()}

    def _drop_states(self, keep: list[int], optimizers: Sequence[Optimizer]) -> None:
        """Drops optimizer state of all rows but `keep`, where each row has parameters of its own."""
        for rule, optimizer in enumerate(optimizers):
            for weight in [weight for weight, _, row in self._parts(rule) if row not in keep]:
                optimizer.state.pop(weight, None)

    def _by_rule(self, optimizers: Sequence[Optimizer]) -> list[tuple[slice, list[nn.Parameter], Optimizer]]:
        """Each rule's rows and weights with its optimizer; nothing in static evaluation, which has none."""
        return list(zip(self._spans, self.of_rules, optimizers, strict=True)) if optimizers else []

    def _parts(self, rule: int) -> Iterator[tuple[nn.Parameter, Tensor, slice | int]]:
        """Each parameter of a rule's optimizer with the stack, and the rows of it, that it is."""
        rows, weights, count = self._spans[rule], self.of_rules[rule], len(self.learned)
        if not self._apart:
            yield from zip(weights, self.learned, [rows] * (count if rows.start < rows.stop else 0), strict=False)
            return
        for row in range(rows.start, rows.stop):
            first = self.owners[row][1] * count
            yield from zip(weights[first : first + count], self.learned, [row] * count, strict=True)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the documents of a segment, [D, …], as values of the rows, [R, …]."""
        if len(self.of_rules) == 1 and len(self.owners) == len(values):
            return values
        return values[self._documents]


def _leaf(data: Tensor) -> Tensor:
    """A tensor by which gradients are taken, on the same data."""
    return data.detach().requires_grad_()


def _rows_of(memory: Memory, rows: slice | Tensor) -> Memory:
    """The memory of these rows."""
    return each_of(memory, lambda tensor: tensor[rows])


def as_index(rows: Sequence[int]) -> slice | Tensor:
    """Row numbers as an index: a slice, which needs no copy, where they are neighbours."""
    if not rows:
        return slice(0, 0)
    neighbours = range(rows[0], rows[0] + len(rows))
    return slice(neighbours.start, neighbours.stop) if list(rows) == list(neighbours) else torch.tensor(rows)


def _narrowed(value: Any, weight: Tensor, rows: slice | Tensor) -> Any:
    """These rows of an entry of an optimizer's state; what belongs to no row (a count of updates) stays whole."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0:
        return value.clone()  # a count of updates, which goes on apart from the old state's
    return value[rows] if value.shape == weight.shape else value
