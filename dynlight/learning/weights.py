"""Weights: where the learned weights of the documents live.

`Weights` is what learning asks for. Behind it are

- `InPlace`: the model's own parameters learn, one document at a time; works with any model and `torch.compile`;
- `Sharded` (`sharded.py`): the same, where each of several devices holds a shard of every weight;
- `Stacked` (`stacked.py`): an axis of rows in front of every learned weight, for many documents at once, or one document
  learned from at many rates; frozen weights are shared.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dynlight.choices.gradient import Gradient, RowGradients
from dynlight.choices.parameters import adapters_of
from dynlight.documents.segments import NOT_SCORED, Context, Segment
from dynlight.learning.carried import Memory, restored
from dynlight.learning.digests import WeightDigests, sums_of_bits
from dynlight.learning.fetch import Fetch, Later
from dynlight.learning.forward import Guide, Keeps, Reading, nats_function


def all_finite(sums: list[Tensor], rows: int, device: torch.device) -> Tensor:
    """Whether all of each row's gradients are finite, bool [rows], from sums of them: one is finite only if all terms are.

    Shapes: of each weight that has a gradient, sums [rows], or a number where there is one row.
    """
    if not sums:
        return torch.ones(rows, dtype=torch.bool, device=device)
    return torch.stack(sums).view(len(sums), rows).isfinite().all(dim=0)


Owner = tuple[int, int]  # of a row: its rule, and its document's place in the wave


class Weights(ABC):
    """The learned weights of the documents that are being read, the initial weights θ0, and the memory.

    Shapes: D documents, S columns of a segment, R rows: one for each rule's learning from each document.
    """

    learned: list[Any]  # the tensors by which gradients are taken
    initial: list[Tensor]  # θ0 of each
    of_rules: list[list[nn.Parameter]]  # of each rule, the tensors that its optimizer changes
    owners: list[Owner]  # of each row
    earlier: list[Memory]  # that which stood before each of the last segments, where the memory is made anew from these
    # Of each change of the gradient what it has left out so far, of each learned weight; none where it keeps no errors.
    errors: list[list[Tensor]]  # [R, *shape]

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        self.model = model
        self.context = context
        self._nats_of = nats_function(model, compile)
        self._plain_nats_of = nats_function(model, False) if compile else self._nats_of
        # Of the learned weights; taken first, as modules in rows may hold theirs under others.
        self.names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self.memory: Memory = None
        self.static_memory: Memory = None
        self.errors, self.earlier = [], []
        # Of rows by their owner the weights that learn no more, by their place in `learned`.
        self.stopped: dict[Owner, frozenset[int]] = {}
        self._adapters = adapters_of(model)
        self._sums: Later | None = None  # of the bits of the present weights; None: not taken since they changed

    def enter(self, segment: Segment, optimizers: Sequence[Optimizer]) -> None:
        """Prepares for a segment: a new wave begins without memory, and documents that have ended are dropped."""
        if segment.is_first:
            self.memory = self.static_memory = None
            self.earlier = []
        self._narrow(len(segment.documents), optimizers)

    def keep(self, memory: Memory) -> None:
        """Sets the memory that the next segment is read with."""
        if self.context.refresh is not None:
            segments = -(-(self.context.memory or 0) // self.context.segment)  # of which the memory is full
            self.earlier = [*self.earlier, self.memory][-segments:]
        self.memory = memory

    @torch.no_grad()
    def refresh(self, segments: Sequence[Segment]) -> None:
        """Makes the memory anew: the last segments are read again by the present weights, behind what stood before them."""
        self.memory = self.earlier[0]
        for place, segment in enumerate(segments):
            self.earlier[place] = self.memory
            self.memory = self.score(segment).memory

    @abstractmethod
    def _narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """Drops all but the first `documents` documents of a wave from weights, memory and optimizer state."""

    @abstractmethod
    def score(self, segment: Segment, guide: Guide | None = None, keeps: Keeps = (), plain: bool = False) -> Reading:
        """Reads a segment, each row under its own weights.

        Args:
            segment: of the documents.
            guide: what each row is compared with.
            keeps: what the reading keeps besides nats and memory.
            plain: whether it is not compiled.
        """

    def read_again(self, segment: Segment) -> Tensor:
        """Nats [R, S] of an earlier segment of the documents, each row under its own weights, without a memory."""
        memory, self.memory = self.memory, None
        try:
            return self.score(segment).nats
        finally:
            self.memory = memory

    @abstractmethod
    def score_static(self, segment: Segment, keeps: Keeps = ()) -> Reading:
        """Reads a segment under θ0, which has a memory of its own.

        Not to be called between a forward and its backward, as θ0 may take the place of the learned weights.
        """

    @abstractmethod
    def scored(self, segment: Segment) -> Tensor:
        """The columns of a segment that each row scores, bool [R, S]."""

    @abstractmethod
    def gradients(self) -> dict[int, Tensor]:
        """The rows' gradients [R, *shape], in place, by the weight's place in `learned`, of those that have one."""

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The rows of each learned weight, [R, *shape], in place."""

    def learned_by(self, owner: Owner) -> dict[str, Tensor]:
        """The learned weights of a row by their names, in place."""
        row = self.owners.index(owner)
        return {name: rows[row] for name, rows in zip(self.names, self.values(), strict=True)}

    @abstractmethod
    def put_in_model(self, owner: Owner) -> AbstractContextManager[None]:
        """Within the block the model reads with a row's weights where nothing else is said, as in `model.generate`."""

    @abstractmethod
    def under_initial(self) -> AbstractContextManager[None]:
        """Within the block the model reads with θ0."""

    def stop(self, stopped: Mapping[Owner, frozenset[int]]) -> None:
        """Lets these weights of rows learn no more, and all others learn."""
        self.stopped = dict(stopped)

    @property
    def left_out(self) -> frozenset[int]:
        """The weights, by their place, for which no gradient is taken."""
        return frozenset()

    @abstractmethod
    def norms(self) -> Tensor:
        """The norm of each row's gradient over all weights, ‖g‖₂, [R]."""

    @torch.no_grad()
    def change_gradients(self, changes: Sequence[Gradient], learners: Sequence[bool]) -> None:
        """Makes each of these changes of the rows' gradients, in their order; a row that doesn't learn keeps its errors."""
        others = [row for row, learns in enumerate(learners) if not learns]
        for change, errors in zip(changes, self.errors, strict=True):
            before = [error[others] for error in errors]
            gradients = self.gradients()
            absent = sum(self.initial[place].numel() for place in self.left_out - gradients.keys())
            change.change(RowGradients(gradients, self.norms, errors, absent))
            for error, kept in zip(errors, before, strict=True):
                error[others] = kept

    @abstractmethod
    def keep_errors(self, changes: Sequence[Gradient]) -> None:
        """Makes room for what each of these changes of the gradient will leave out."""

    @abstractmethod
    def finite(self) -> Tensor:
        """Whether all of each row's gradients are finite, bool [R], on the device."""

    @abstractmethod
    def step(self, optimizers: Sequence[Optimizer], finite: Sequence[bool], learners: Sequence[bool]) -> None:
        """Makes one update by each rule from the gradients of the last backward, which are then dropped.

        A row that is not among the `learners` stays as it was. Where gradients are not `finite`, weights of a single row stay
        as they were; one of several rows, from whose document nothing more is learned, is spoiled and changes no other.
        """

    def drop_gradients(self) -> None:
        """Forgets the gradients of the last backward."""
        for weight in self.learned:
            weight.grad = None

    def give_up(self) -> None:
        """Forgets gradients of which no update was made; what is no number of what they have left out is forgotten, too."""
        self.drop_gradients()
        for error in chain(*self.errors):
            error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @abstractmethod
    def reset(self, documents: int, keep: float = 0.0) -> None:
        """θ ← θ0 + keep · (θ − θ0) for the documents of a new wave, which is a single one if anything is kept."""

    @abstractmethod
    def digests(self, documents: int, fetch: Fetch) -> WeightDigests:
        """Digests of the learned weights of each of a wave's first documents."""

    @abstractmethod
    def progress_state(self) -> dict[str, Any]:
        """Learned weights and memory, and which row is whose: tensors and plain data."""

    @abstractmethod
    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` gave."""

    def _read(
        self,
        segment: Segment,
        memory: Memory,
        guide: Guide | None = None,
        keeps: Keeps = (),
        plain: bool = False,
    ) -> Reading:
        """Reads a segment by the model as it is now; `plain`: not compiled."""
        nats_of = self._plain_nats_of if plain else self._nats_of
        return nats_of(segment, memory, self.context, guide, keeps)

    def _switch_adapters(self, on: bool) -> None:
        for adapter in self._adapters:
            adapter.enable_adapters(on)


class InPlace(Weights):
    """Learned weights in the model itself, for one document at a time.

    θ0 is kept beside them: reset copies it back, and the static reference reads with it. Where adapters learn, they are
    switched off for the reference instead.
    """

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        super().__init__(model, context, compile)
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.of_rules = [self.learned]
        self.owners = [(0, 0)]
        self.initial = [parameter.detach().clone() for parameter in self.learned]
        self._summed: list[tuple[int, int]] = []  # address and version of each weight, when `_sums` were taken

    def _narrow(self, documents: int, optimizers: Sequence[Optimizer]) -> None:
        """One document at a time: there is none to drop."""

    def score(self, segment: Segment, guide: Guide | None = None, keeps: Keeps = (), plain: bool = False) -> Reading:
        return self._read(segment, self.memory, guide, keeps, plain)

    @torch.no_grad()
    def score_static(self, segment: Segment, keeps: Keeps = ()) -> Reading:
        with self.under_initial():
            reading = self._read(segment, self.static_memory, keeps=keeps)
        self.static_memory = reading.memory
        return reading

    def scored(self, segment: Segment) -> Tensor:
        return segment.targets != NOT_SCORED

    def gradients(self) -> dict[int, Tensor]:
        return {place: weight.grad[None] for place, weight in enumerate(self.learned) if weight.grad is not None}

    def values(self) -> list[Tensor]:
        return [weight.detach()[None] for weight in self.learned]

    def put_in_model(self, owner: Owner) -> AbstractContextManager[None]:
        return nullcontext()  # they are there

    def stop(self, stopped: Mapping[Owner, frozenset[int]]) -> None:
        super().stop(stopped)
        places = stopped.get((0, 0), frozenset())
        for place, weight in enumerate(self.learned):
            weight.requires_grad_(place not in places)  # the backward ends above the lowest that does
            if place in places:
                weight.grad = None

    @property
    def left_out(self) -> frozenset[int]:
        return self.stopped.get((0, 0), frozenset())

    def norms(self) -> Tensor:
        return torch.nn.utils.get_total_norm([weight.grad for weight in self.learned if weight.grad is not None])[None]

    def keep_errors(self, changes: Sequence[Gradient]) -> None:
        kept = [self.learned if change.keeps_errors else [] for change in changes]
        self.errors = [[torch.zeros_like(weight.detach())[None] for weight in weights] for weights in kept]

    def finite(self) -> Tensor:
        sums = [weight.grad.sum() for weight in self.learned if weight.grad is not None]
        return all_finite(sums, 1, self.model.device)

    def step(self, optimizers: Sequence[Optimizer], finite: Sequence[bool], learners: Sequence[bool]) -> None:
        for optimizer in optimizers if finite[0] and learners[0] else ():
            optimizer.step()
        for error in () if finite[0] else chain(*self.errors):  # what is left out of NaN is NaN
            error.zero_()
        self.drop_gradients()
        self._sums = None

    @torch.no_grad()
    def reset(self, documents: int = 1, keep: float = 0.0) -> None:
        if keep:
            for weight, initial in zip(self.learned, self.initial, strict=True):
                weight.copy_(torch.add(initial, weight - initial, alpha=keep))
        elif self.learned:
            torch._foreach_copy_(self.learned, self.initial)
        for error in chain(*self.errors):
            error.zero_()

    def digests(self, documents: int, fetch: Fetch) -> WeightDigests:
        # To avoid a second pass over all weights, the digest is taken again only if torch's count of changes to a tensor
        # has moved. Writes through `.data` go round that count; they still change the digest after the next update.
        version = [(weight.data_ptr(), weight._version) for weight in self.learned]
        if self._sums is None or version != self._summed:
            self._sums, self._summed = fetch.later(self._sums_of_bits()[None]), version
        return WeightDigests(self._sums, [[0]] * documents)

    def _sums_of_bits(self) -> Tensor:
        """Σ of the bits of each weight, int64 [weights]."""
        sums = [sums_of_bits(weight.detach().reshape(1, -1)) for weight in self.learned]
        return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=self.model.device)

    def progress_state(self) -> dict[str, Any]:
        memories = {"memory": self.memory, "static_memory": self.static_memory}
        return {"learned": self.learned, "errors": self.errors, "earlier": self.earlier, **memories}

    @torch.no_grad()
    def load_progress_state(self, state: dict[str, Any]) -> None:
        for weight, saved in zip(self.learned, state["learned"], strict=True):
            weight.copy_(saved)
        for error, saved in zip(chain(*self.errors), chain(*state.get("errors", ())), strict=True):
            error.copy_(saved)
        self.memory, self.static_memory = (
            restored(state[name], self.model.device) for name in ("memory", "static_memory")
        )
        self.earlier = [restored(memory, self.model.device) for memory in state.get("earlier", [])]

    @contextmanager
    def under_initial(self) -> Iterator[None]:
        if self._adapters:
            self._switch_adapters(False)
        else:
            self._exchange()
        try:
            yield
        finally:
            if self._adapters:
                self._switch_adapters(True)
            else:
                self._exchange()

    def _exchange(self) -> None:
        # Exchanging storages copies nothing, and parameters stay the same objects, on which optimizers rely.
        for parameter, initial in zip(self.learned, self.initial, strict=True):
            parameter.data, initial.data = initial.data, parameter.data
