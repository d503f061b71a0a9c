"""Dynamic evaluation as a LightningModule: a document is a training stream.

    for segment in document:                        # Trainer.fit
        ResetWeights, UpdateFrequency               # policies: on_train_batch_start
        nats = score(segment)                       # training_step: one forward
        commit(nats)                                #   the score is final here
        learn(nats)                                 #   backward and update, if one is due
        Records, FlopsLogger, DocumentProgress      # meters: on_train_batch_end
"""

import copy
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.context import Context
from dynlight.flops import FlopCounter
from dynlight.metrics import PrequentialSum
from dynlight.parameters import All, Parameters
from dynlight.reset import ResetWeights
from dynlight.schedule import UpdateFrequency
from dynlight.updates import Update, make_optimizer
from dynlight.waves import Segment
from dynlight.weights import InPlace, Memory, memory_length, token_nats


@dataclass(frozen=True)
class Score:
    """What one `training_step` committed, and what it did; meters read it."""

    segment: Segment
    nats: Tensor  # fp32 [D, S]
    static_nats: Tensor | None  # fp32 [D, S]
    updates: int
    memory_length: int  # positions in memory that the forward saw
    seconds: dict[str, float] = field(default_factory=dict)  # scoring, learning, static


class DynamicEvaluation(LightningModule):
    """Scores each segment of a document, then learns from it.

    Formula: nats_i = −Σ_t ln p(x_t | context, memory; θ_i) over the tokens of segment i, then, if an update is due,
    θ_{i+1} = update(θ_i, ∇_θ mean nats_i). The score and the gradient come from one forward. Source: Krause et al. 2018
    (arXiv 1709.07432), Rannen-Triki et al. 2024 (arXiv 2403.01518).

    Args:
        model: a causal language model of transformers; it is prepared in place.
        tokenizer: the tokenizer of its documents.
        context: what is scored next, with what in view.
        parameters: which weights may learn (default: all).
        update: makes the optimizer of these weights, e.g. `partial(torch.optim.SGD, lr=0.02)`; None: static evaluation.
        schedule: when to learn (default: from every segment).
        reset: when to forget (default: at each document).
        reference: `static` scores the same windows with the unlearned weights too; None saves the cost.
        clip: the largest gradient norm of a document; None: no bound.

    Raises:
        ValueError: where the choices don't fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: Context,
        parameters: Parameters | None = None,
        update: Update | None = None,
        schedule: UpdateFrequency | None = None,
        reset: ResetWeights | None = None,
        reference: Literal["static"] | None = "static",
        clip: float | None = None,
    ) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0, got {clip}; choose null for no bound")
        context.check(model.config)
        # Learning and scoring share a forward, so nothing in it may be random: dropout stays off while we learn.
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = context
        self.parameters_choice = parameters or All()
        self.update = update
        self.schedule = schedule or UpdateFrequency()
        self.reset_choice = reset or ResetWeights()
        self.reference = reference
        self.clip = clip
        # Updates are made by training_step itself: Lightning's own loop would scale the loss that callbacks see.
        self.automatic_optimization = False
        if update is None:
            model.requires_grad_(False)
        else:
            self.parameters_choice.prepare(model)
        self.adapted = PrequentialSum()
        self.static = PrequentialSum()
        self.passes = 1  # updates to make from the present segment; 0: none is due. Set by UpdateFrequency.
        self.score: Score | None = None
        self.failed: dict[int, int] = {}  # document index → segment whose nats were not finite
        self._memory: Memory = None
        self._static_memory: Memory = None

    def configure_callbacks(self) -> list[Callback]:
        """The two policies; Lightning adds them to the Trainer's own callbacks."""
        return [self.reset_choice, self.schedule]

    def configure_optimizers(self) -> Optimizer | None:
        """The optimizer of the learned weights, which are where they will stay (Lightning has moved the model)."""
        self.weights = InPlace(self.model, self.context)
        self._random_state = torch.get_rng_state()
        if self.update is None:
            return None
        optimizer = make_optimizer(self.update, self)
        self._unlearned_optimizer = copy.deepcopy(optimizer.state_dict())
        return optimizer

    @property
    def update_due(self) -> bool:
        """Whether the present segment is learned from."""
        return self.update is not None and self.passes > 0

    @cached_property
    def flop_counter(self) -> FlopCounter:
        """What a segment costs, measured once for each shape."""
        return FlopCounter(self)

    @property
    def protocol(self) -> str:
        """The five choices in one line: what a number of this run means."""
        update = "nothing (static)"
        if self.update is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            update = f"{type(optimizer).__name__}(lr {optimizer.defaults['lr']:g})"
            update += f" clipped to {self.clip:g}" if self.clip is not None else ""
        return (
            f"context {self.context} · learns {self.parameters_choice} · by {update} · "
            f"schedule {self.schedule} · reset {self.reset_choice}"
        )

    def on_train_start(self) -> None:
        # Lightning's Trainer puts no module into train mode by itself, but a caller may have.
        self.model.eval()
        self._waits_for_device = self.device.type == "cuda"

    def on_train_epoch_end(self) -> None:
        # Documents are read once: a Trainer without max_epochs would begin again, on weights that have seen them.
        self.trainer.should_stop = True

    def reset(self) -> None:
        """Restores weights, optimizer state and random state to what they were before anything was learned."""
        self.weights.reset()
        torch.set_rng_state(self._random_state)
        if self.update is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.load_state_dict(copy.deepcopy(self._unlearned_optimizer))

    def training_step(self, segment: Segment, batch_idx: int) -> None:
        """Scores the segment, commits the score, then learns from it if an update is due."""
        self.score = None
        if segment.is_first:
            self._memory = self._static_memory = None
        if segment.documents[0].index in self.failed:
            return
        began = self._now()
        static_nats = self._score_static(segment)
        referred = self._now()
        memory = self._memory
        with torch.set_grad_enabled(self.update_due):
            logits, self._memory = self.weights.read(segment, memory)
            nats = token_nats(logits, segment.targets)
        committed = nats.detach()
        if self.reference is not None and self.update is None:
            static_nats = committed  # nothing is ever learned: the reference is the run itself
        if not self._is_finite(committed, static_nats):
            self.failed[segment.documents[0].index] = segment.cut.index
            return
        scored = self._now()
        updates = self._learn(segment, nats, memory) if self.update_due else 0
        seconds = {"static": referred - began, "scoring": scored - referred, "learning": self._now() - scored}
        self.score = Score(segment, committed, static_nats, updates, memory_length(memory), seconds)
        self.adapted.update(committed, sum(segment.bytes))
        if static_nats is not None:
            self.static.update(static_nats, sum(segment.bytes))

    def _score_static(self, segment: Segment) -> Tensor | None:
        if self.reference is None or self.update is None:
            return None
        logits, self._static_memory = self.weights.read_static(segment, self._static_memory)
        return token_nats(logits, segment.targets)

    def _learn(self, segment: Segment, nats: Tensor, memory: Memory) -> int:
        """Makes the updates that are due; the first learns from the very forward that gave the score."""
        # Lightning's wrapper of the optimizer counts updates and calls hooks that nothing here uses; a segment is short.
        optimizer = self.optimizers(use_pl_optimizer=False)
        for repeat in range(self.passes):
            if repeat > 0:
                logits, _ = self.weights.read(segment, memory)
                nats = token_nats(logits, segment.targets)
            # A mean over the segment's tokens, a sum over documents: each document's gradient is its own.
            self.manual_backward(nats.mean(dim=1).sum())
            if self.clip is not None:
                self.weights.clip_gradients(self.clip)
            optimizer.step()
            self.weights.clear_gradients()
        return self.passes

    def _is_finite(self, *nats: Tensor | None) -> bool:
        return all(bool(torch.isfinite(each).all()) for each in nats if each is not None)

    def _now(self) -> float:
        if self._waits_for_device:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
