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
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.context import Context
from dynlight.flops import FlopCounter
from dynlight.metrics import PrequentialSum
from dynlight.parameters import All, Parameters
from dynlight.reset import ResetWeights
from dynlight.schedule import UpdateFrequency
from dynlight.strategies import GradientAverage, check_strategy, learns_in_step
from dynlight.updates import RMSDynamic, Update, make_optimizer, new_optimizer
from dynlight.waves import Segment
from dynlight.weights import InPlace, Memory, Stacked, memory_length, rows_of, token_nats


@dataclass(frozen=True)
class Score:
    """What one `training_step` committed, and what it did; meters read it."""

    segment: Segment
    rows: list[int]  # the rows that count: those of documents that have not failed
    nats: Tensor  # fp32 [D, S]
    static_nats: Tensor | None  # fp32 [D, S]
    updates: int
    memory_length: int  # positions in memory that the forward saw
    seconds: dict[str, float] = field(default_factory=dict)  # scoring, learning, static


def check_precision(precision: str | int | None) -> None:
    """Raises ValueError unless learned weights and scores would be fp32."""
    if precision not in (None, 32, "32", "32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision must be 32-true or bf16-mixed, got {precision}; learned weights are fp32 and fp16 "
            "would need its gradients scaled, so for a smaller model set model.dtype: bfloat16"
        )


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
        in_step: list[Callback] = [GradientAverage()] if learns_in_step(self.trainer) else []
        return [self.reset_choice, self.schedule, *in_step]

    def configure_optimizers(self) -> Optimizer | None:
        """The optimizer of the learned weights, which are where they will stay (Lightning has moved the model)."""
        together = getattr(self.trainer.datamodule, "together", 1)  # type: ignore[attr-defined]
        self.weights = (
            InPlace(self.model, self.context) if together == 1 else Stacked(self.model, self.context, together)
        )
        self._random_state = torch.get_rng_state()
        if self.update is None:
            return None
        optimizer = make_optimizer(self.update, self)
        self._unlearned_optimizer = copy.deepcopy(optimizer.state_dict())
        return optimizer

    def setup(self, stage: str) -> None:
        self.check(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]

    def check(self, trainer: Trainer, data: Any) -> None:
        """Raises ValueError where this trainer or these documents cannot be read; a model without data is enough."""
        check_strategy(trainer, self.reset_choice.every, learns=self.update is not None)
        check_precision(trainer.precision)
        # Adapters convert what they read; a layer's own weights must be of the same type as the layers around them.
        weights = [weight for name, weight in self.model.named_parameters() if "lora_" not in name]
        learns = any(weight.requires_grad for weight in weights)
        if learns and trainer.precision == "32-true" and len({weight.dtype for weight in weights}) > 1:
            raise ValueError(
                "trainer.precision must be bf16-mixed where some weights learn, in fp32, and others stay in bf16, "
                "got 32-true; or set model.dtype: float32"
            )
        together = getattr(data, "together", 1)
        together = 1 if together == "auto" else together  # which it is where documents can't adapt together
        if together > 1 and self.reset_choice.every == "never":
            raise ValueError(
                "data.together must be 1 with reset.every never, as what is learned from one document is carried on to "
                f"the next, got {together}"
            )
        if self.update is not None:
            learned = [weight for weight in self.model.parameters() if weight.requires_grad]
            optimizer = new_optimizer(self.update, learned, together)
            if isinstance(optimizer, RMSDynamic):
                optimizer.statistics.check(self.model)

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
        if (optimizer := self._optimizer) is not None:
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

    def reset(self, documents: int = 1) -> None:
        """Restores weights, optimizer state and random state of the documents that begin to what they were at first."""
        self.weights.reset(documents)
        torch.set_rng_state(self._random_state)
        if (optimizer := self._optimizer) is not None:
            optimizer.load_state_dict(copy.deepcopy(self._unlearned_optimizer))

    def training_step(self, segment: Segment, batch_idx: int) -> None:
        """Scores the segment, commits the score, then learns from it if an update is due."""
        self.score = None
        if segment.is_first:
            self._memory = self._static_memory = None
        if self._running(segment):
            optimizer = self._optimizer
            with self.weights.rows(segment, optimizer):
                self._score_and_learn(segment, optimizer)

    def _score_and_learn(self, segment: Segment, optimizer: Optimizer | None) -> None:
        began = self._now()
        static_nats = self._score_static(segment)
        referred = self._now()
        memory = rows_of(self._memory, segment.rows)
        with torch.set_grad_enabled(self.update_due):
            logits, kept = self.weights.read(segment, memory)
            nats = token_nats(logits, segment.targets)
        committed = nats.detach()
        if self.reference is not None and self.update is None:
            static_nats = committed  # nothing is ever learned: the reference is the run itself
        self._stop_failed(segment, committed, static_nats)
        if not (rows := self._running(segment)):
            return
        scored = self._now()
        updates = self._learn(segment, nats, memory, optimizer) if optimizer is not None and self.update_due else 0
        seconds = {"static": referred - began, "scoring": scored - referred, "learning": self._now() - scored}
        if segment.rows.start == 0:  # those who go on; a group that ends here leaves the others' memory alone
            self._memory = kept
        self.score = Score(segment, rows, committed, static_nats, updates, memory_length(memory), seconds)
        self._sum(self.score)

    @property
    def _optimizer(self) -> Optimizer | None:
        # Not Lightning's wrapper of it, which calls hooks that nothing here uses: a segment is short.
        optimizer = None if self.update is None else self.optimizers(use_pl_optimizer=False)
        assert not isinstance(optimizer, list), "configure_optimizers makes one at most"
        return optimizer

    def _running(self, segment: Segment) -> list[int]:
        """Rows of the segment whose documents have not failed."""
        return [row for row, document in enumerate(segment.documents) if document.index not in self.failed]

    def _stop_failed(self, segment: Segment, *nats: Tensor | None) -> None:
        """Marks the documents whose nats are not finite; they are scored no further and stand in no sum."""
        finite = torch.stack([torch.isfinite(each).all(dim=1) for each in nats if each is not None]).all(dim=0)
        for document, is_finite in zip(segment.documents, finite.tolist(), strict=True):
            if not is_finite:
                self.failed.setdefault(document.index, segment.cut.index)

    def _sum(self, score: Score) -> None:
        counts = slice(None) if len(score.rows) == len(score.nats) else score.rows
        nbytes = sum(score.segment.bytes[row] for row in score.rows)
        self.adapted.update(score.nats[counts], nbytes)
        if score.static_nats is not None:
            self.static.update(score.static_nats[counts], nbytes)

    def _score_static(self, segment: Segment) -> Tensor | None:
        if self.reference is None or self.update is None:
            return None
        logits, kept = self.weights.read_static(segment, rows_of(self._static_memory, segment.rows))
        if segment.rows.start == 0:
            self._static_memory = kept
        return token_nats(logits, segment.targets)

    def _learn(self, segment: Segment, nats: Tensor, memory: Memory, optimizer: Optimizer) -> int:
        """Makes the updates that are due; the first learns from the very forward that gave the score."""
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

    def _now(self) -> float:
        if self._waits_for_device:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
