"""Dynamic evaluation as a LightningModule: a document is a training stream.

for segment in document:                        # Trainer.fit
    ResetWeights, UpdateFrequency               # policies: on_train_batch_start
    nats = score(segment)                       # training_step: one forward
    commit(nats)                                #   the score is final here
    learn(nats)                                 #   backward and update, if one is due
    Records, FlopsLogger, DocumentProgress      # meters: on_train_batch_end
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.choices.context import Context
from dynlight.choices.mixture import Mixture
from dynlight.choices.parameters import All, Parameters
from dynlight.choices.reset import ResetWeights
from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import RMSDynamic, Update, experts, make_optimizers, new_optimizer, usual_rates
from dynlight.documents.waves import NOT_SCORED, Segment
from dynlight.errors import SettingError
from dynlight.learning.flops import FlopCounter
from dynlight.learning.metrics import PrequentialSum
from dynlight.learning.processes.strategies import (
    GradientAverage,
    check_strategy,
    is_sharded,
    keeps_records,
    learns_in_step,
)
from dynlight.learning.sharded import Sharded, check_sharded, shard
from dynlight.learning.weights import InPlace, Memory, Stacked

if TYPE_CHECKING:
    from dynlight.recording.resume import Kept


@dataclass(frozen=True)
class ExpertScores:
    """What each expert, of those that a mixture is made of, said of a segment: the static model first, if it is one."""

    nats: np.ndarray  # float32 [E, D, S], the columns of the segment; NaN where an expert has failed
    shares: np.ndarray  # float64 [E, D], each expert's mean weight in the mixture over the segment
    learners: np.ndarray  # bool [learning experts, D], those that read the segment


@dataclass(frozen=True)
class Score:
    """What one `training_step` committed, and what it did; meters read it."""

    segment: Segment
    rows: list[int]  # the rows that count: those of documents that have not failed
    nats: Tensor  # fp32 [D, S], the columns of the segment: 0 in those not scored; of a mixture float64
    static_nats: Tensor | None  # fp32 [D, S]
    sums: list[float]  # nats of each row, summed in float64
    static_sums: list[float] | None
    updates: int  # made by each expert
    seconds: dict[str, float] = field(default_factory=dict)  # scoring, learning, static
    experts: ExpertScores | None = None
    unlearned: frozenset[int] = frozenset()  # rows scored by the unlearned weights, as the learned ones have failed

    def updates_of(self, row: int) -> int:
        """Updates that each expert made of a row."""
        return 0 if row in self.unlearned else self.updates


def warn_of_imitated_bf16(trainer: Trainer) -> None:
    """Says on stderr that a run will be slow where bf16 is asked of a CPU that has no instructions for it."""
    on_cpu = trainer.strategy.root_device.type == "cpu" and torch.backends.mkldnn.is_available()
    asked = on_cpu and trainer.is_global_zero and "bf16" in str(trainer.precision)
    if asked and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(
            f"warning: trainer.precision should be 32-true here, got {trainer.precision}: this CPU has no bf16 instructions "
            "and imitates them, some 50 times slower",
            file=sys.stderr,
        )


def check_precision(precision: str | int | None) -> None:
    """Raises SettingError unless learned weights and scores would be fp32."""
    if precision not in (None, 32, "32", "32-true", "bf16-mixed"):
        raise SettingError(
            "trainer.precision",
            "be 32-true or bf16-mixed",
            got=precision,
            advice=(
                "learned weights are fp32 and fp16 would need its gradients scaled, so for a smaller model set "
                "model.dtype: bfloat16"
            ),
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
        update: makes the optimizer of these weights, e.g. `partial(torch.optim.SGD, lr=0.02)`; several are for a
            mixture; None: static evaluation, or in a mixture the rules that it chooses itself.
        schedule: when to learn (default: from every segment).
        reset: when to forget (default: at each document).
        reference: `static` scores the same windows with the unlearned weights too; None saves the cost.
        clip: the largest gradient norm of a document; None: no bound.
        rates: learning rates, each of which learns from every document by itself, in place of the update's own.
        on_failure: what becomes of a document whose nats or gradients are not finite: `stop` leaves it out of all sums;
            `static` reads it to its end with the unlearned weights, from the first token on whose nats are missing.
        mixture: how the static model and the model at each rate predict together; None: as `Mixture()` where there are
            rates, for to report the best of them would be to choose after the fact.

    Raises:
        SettingError: where the choices don't fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: Context,
        parameters: Parameters | None = None,
        update: Update | Sequence[Update] | None = None,
        schedule: UpdateFrequency | None = None,
        reset: ResetWeights | None = None,
        reference: Literal["static"] | None = "static",
        clip: float | None = None,
        rates: Sequence[float] | None = None,
        mixture: Mixture | None = None,
        on_failure: Literal["stop", "static"] = "stop",
    ) -> None:
        super().__init__()
        if on_failure == "static" and reference is None:
            raise SettingError(
                "on_failure", "be stop without a reference", got="static", advice="set reference: static"
            )
        if clip is not None and not clip > 0:
            raise SettingError("clip", "be above 0", got=clip, advice="choose null for no bound")
        context.check(model.config)
        # Learning and scoring share a forward, so nothing in it may be random: dropout stays off while we learn.
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = context
        self.parameters_choice = parameters or All()
        self.mixture = Mixture() if mixture is None and rates is not None else mixture
        width = model.get_input_embeddings().embedding_dim
        usual = partial(usual_rates, width=width, adapters=self.parameters_choice.are_adapters)
        self.updates = experts(update, usual if rates is None else rates, self.mixture)
        self.schedule = schedule or UpdateFrequency()
        self.reset_choice = reset or ResetWeights()
        self.reference = reference
        self.clip = clip
        # Updates are made by training_step itself: Lightning's own loop would scale the loss that callbacks see.
        self.automatic_optimization = False
        if not self.updates:
            model.requires_grad_(False)
        else:
            self.parameters_choice.prepare(model)
        self.adapted = PrequentialSum()
        self.static = PrequentialSum()
        self.passes = 1  # updates to make from the present segment; 0: none is due. Set by UpdateFrequency.
        self.score: Score | None = None
        self.on_failure = on_failure
        self.failed: dict[int, int] = {}  # document index → segment whose nats or gradients were not finite
        self.unlearned: dict[int, int] = {}  # document index → segment from which on the unlearned weights read it
        self.reasons: dict[int, str] = {}  # of both

    def configure_callbacks(self) -> list[Callback]:
        """The two policies; Lightning adds them to the Trainer's own callbacks."""
        in_step: list[Callback] = [GradientAverage()] if learns_in_step(self.trainer) else []
        return [self.reset_choice, self.schedule, *in_step]

    def configure_model(self) -> None:
        """Leaves this process its part of the weights, where they are to lie on several devices."""
        if is_sharded(self.trainer):
            _ = self.flop_counter  # it makes its outline of the model, which is whole until now
            assert self.device_mesh is not None, "Lightning has set it"
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimizer for each expert's learned weights, which are where they will stay (the model has been moved)."""
        together = getattr(self.trainer.datamodule, "together", 1)  # type: ignore[attr-defined]
        rows = max(1, len(self.updates))
        in_place = Sharded if is_sharded(self.trainer) else InPlace
        self.weights = (
            in_place(self.model, self.context)
            if together == 1 and self.mixture is None
            else Stacked(self.model, self.context, together, rows)
        )
        self._begin_mixture(together)
        self._random_state = torch.get_rng_state()
        self.optimizer_of_each_expert = make_optimizers(self.updates, self)
        self._unlearned_optimizers = [
            copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizer_of_each_expert
        ]
        return self.optimizer_of_each_expert

    def setup(self, stage: str) -> None:
        self.check(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        if not keeps_records(self.trainer):
            others = [each for each in self.trainer.callbacks if not getattr(each, "is_record", False)]  # type: ignore[attr-defined]
            self.trainer.callbacks = others  # type: ignore[attr-defined]

    def check(self, trainer: Trainer, data: Any) -> None:
        """Raises SettingError where this trainer or these documents cannot be read; a model without data is enough."""
        check_strategy(trainer, self.reset_choice.every, learns=bool(self.updates))
        if is_sharded(trainer):
            check_sharded(self, getattr(data, "together", 1))
        if self.mixture is not None and learns_in_step(trainer):
            raise SettingError(
                "trainer.strategy",
                "be document_parallel or auto with rates or a mixture",
                got=f"{type(trainer.strategy).__name__}, which averages the gradients of one set of weights",
            )
        check_precision(trainer.precision)
        # Adapters convert what they read; a layer's own weights must be of the same type as the layers around them.
        weights = [weight for name, weight in self.model.named_parameters() if "lora_" not in name]
        learns = any(weight.requires_grad for weight in weights)
        if learns and trainer.precision == "32-true" and len({weight.dtype for weight in weights}) > 1:
            raise SettingError(
                "trainer.precision",
                "be bf16-mixed where some weights learn, in fp32, and others stay in bf16",
                got="32-true",
                advice="or set model.dtype: float32",
            )
        together = getattr(data, "together", 1)
        together = 1 if together == "auto" else together  # which it is where documents can't adapt together
        if together > 1 and self.reset_choice.every == "never":
            raise SettingError(
                "data.together",
                "be 1 with reset.every never, as what is learned from one document is carried on to the next",
                got=together,
            )
        learned = [weight for weight in self.model.parameters() if weight.requires_grad]
        stacked = f"where data.together is {together}" if together > 1 else "in a mixture" if self.mixture else None
        for update in self.updates:
            optimizer = new_optimizer(update, learned, stacked)
            if isinstance(optimizer, RMSDynamic):
                optimizer.statistics.check(self.model)

    @property
    def update_due(self) -> bool:
        """Whether the present segment is learned from."""
        return bool(self.updates) and self.passes > 0

    @property
    def has_reference(self) -> bool:
        """Whether the unlearned model scores beside one that learns."""
        return self.reference is not None and bool(self.updates)

    @property
    def has_static_expert(self) -> bool:
        """Whether the static model is one of those that a mixture is made of."""
        return self.mixture is not None and self.has_reference

    @property
    def expert_names(self) -> list[str]:
        """What scores each document: `static` where it is part of a mixture, then each rule with its rate."""
        names = ["static"] * self.has_static_expert
        for rule in self.optimizer_of_each_expert:
            name = f"{type(rule).__name__}(lr {rule.defaults['lr']:g})"
            same = sum(known.partition(" no. ")[0] == name for known in names)  # they differ in other settings
            names.append(f"{name} no. {same + 1}" if same else name)
        return names

    @cached_property
    def flop_counter(self) -> FlopCounter:
        """What a segment costs, measured once for each shape."""
        return FlopCounter(self)

    @property
    def protocol(self) -> str:
        """The five choices in one line: what a number of this run means."""
        learns = " and ".join(self.expert_names[self.has_static_expert :]) or "nothing (static)"
        learns += f" clipped to {self.clip:g}" if self.clip is not None and self.updates else ""
        mixed = f"{self.mixture} · " if self.mixture is not None else ""
        return (
            f"context {self.context} · learns {self.parameters_choice} · by {learns} · {mixed}"
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
        self._begin_mixture(documents)
        torch.set_rng_state(self._random_state)
        for optimizer, unlearned in zip(self.optimizer_of_each_expert, self._unlearned_optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(unlearned))

    def progress_state(self) -> dict[str, Any]:
        """All that it needs to go on from between two segments: tensors and plain data."""
        return {
            "weights": self.weights.progress_state(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizer_of_each_expert],
            "log_weights": None if self.mixture is None else torch.from_numpy(self._log_weights),
            "failed": self.failed,
            "unlearned": self.unlearned,
            "reasons": self.reasons,
            "adapted": self.adapted.sums(),
            "static": self.static.sums(),
            "random": self._random_state,
        }

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts everything where it was when `progress_state` was called."""
        self.weights.load_progress_state(state["weights"])
        for optimizer, saved in zip(self.optimizer_of_each_expert, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["log_weights"] is not None:
            self._log_weights = state["log_weights"].numpy()
        self.failed, self.unlearned, self.reasons = state["failed"], state["unlearned"], state["reasons"]
        self.adapted.update(**state["adapted"])
        self.static.update(**state["static"])
        self._random_state = state["random"]

    def recount(self, kept: Sequence["Kept"]) -> None:
        """Adds up the documents that are kept from before."""
        for each in kept:
            if each.failure is not None:
                (self.failed if each.failure["stopped"] else self.unlearned)[each.document.index] = each.failure[
                    "segment"
                ]
                self.reasons[each.document.index] = each.failure["reason"]
            tokens, nbytes = int(each.rows.tokens.sum()), int(each.rows.bytes.sum())
            self.adapted.update(math.fsum(each.rows.nats), tokens, nbytes)
            if self.reference is not None:
                self.static.update(math.fsum(each.rows.static_nats), tokens, nbytes)

    def training_step(self, segment: Segment, batch_idx: int) -> None:
        """Scores the segment, commits the score, then learns from it if an update is due."""
        self.score = None
        if segment.is_first:
            self.weights.memory = self.weights.static_memory = None
        if self._running(segment):
            self.weights.narrow(len(segment.documents), self.optimizer_of_each_expert)
            self._score_and_learn(segment)

    def _score_and_learn(self, segment: Segment) -> None:
        began = self._now()
        static_nats = self.weights.score_static(segment) if self.has_reference else None
        referred = self._now()
        with torch.set_grad_enabled(self.update_due):
            nats, memory = self._score_learned(segment, static_nats)
        committed, by_expert = self._commit(segment, nats.detach(), static_nats)
        if self.reference is not None and not self.updates:
            static_nats = committed  # nothing is ever learned: the reference is the run itself
        if self.on_failure == "static" and self.mixture is None and static_nats is not None:
            committed = self._with_unlearned(segment, committed, static_nats)
        sums, static_sums = _sums_of_rows(committed), None if static_nats is None else _sums_of_rows(static_nats)
        self._stop_failed(segment, sums, static_sums)
        if not (rows := self._running(segment)):
            return
        unlearned = frozenset(row for row in rows if segment.documents[row].index in self.unlearned)
        scored = self._now()
        learns = self.update_due and len(nats) > 0 and len(unlearned) < len(rows)
        updates, finite = self._learn(segment, nats) if learns else (0, [True] * len(nats))
        seconds = {"static": referred - began, "scoring": scored - referred, "learning": self._now() - scored}
        self.weights.memory = memory
        self.score = Score(
            segment, rows, committed, static_nats, sums, static_sums, updates, seconds, by_expert, unlearned
        )
        self._sum(self.score)
        if self.mixture is not None:
            self._drop_failed_experts(by_expert)
        else:
            self._mark_not_finite(segment, finite)

    def _score_learned(self, segment: Segment, static_nats: Tensor | None) -> tuple[Tensor, Memory]:
        """Nats under the learned weights, and the memory to go on with; without a forward where none counts."""
        if static_nats is not None and all(document.index in self.unlearned for document in segment.documents):
            return static_nats, self.weights.memory
        return self.weights.score(segment)

    def _with_unlearned(self, segment: Segment, nats: Tensor, static_nats: Tensor) -> Tensor:
        """The nats, but those of the unlearned weights where the learned ones have failed."""
        missing = nats.isnan().any(dim=1).tolist()
        index = [document.index for document in segment.documents]
        if not any(missing[row] or index[row] in self.unlearned for row in range(len(nats))):
            return nats
        nats = nats.clone()
        for row, document in enumerate(index):
            begin = 0 if document in self.unlearned else len(nats[row])
            if missing[row] and document not in self.unlearned and document not in self.failed:
                readable = self._readable(segment, row)
                begin = len(readable)
                nats[row, :begin] = readable
                self.unlearned[document], self.reasons[document] = segment.cut.index, "nats were not finite"
            nats[row, begin:] = static_nats[row, begin:]
        return nats

    @torch.no_grad()
    def _readable(self, segment: Segment, row: int) -> Tensor:
        """The nats of a row's tokens before the first from which on the learned weights give none.

        One that they fail at can spoil those before it (a masked value that is not finite, times 0, is none either). For
        no choice to depend on a token that it is made for, or a later one, shorter and shorter pieces are read.
        """
        readable, unreadable = torch.empty(0, device=segment.targets.device), segment.targets.shape[1]
        while unreadable - len(readable) > 1:
            length = (len(readable) + unreadable) // 2
            nats = self.weights.score(segment.begin(length))[0][row]
            readable, unreadable = (readable, length) if nats.isnan().any() else (nats, unreadable)
        return readable

    def _commit(self, segment: Segment, nats: Tensor, static_nats: Tensor | None) -> tuple[Tensor, ExpertScores | None]:
        """The nats [D, S] that count, from those of all rows [R, S]: their own, or the mixture's."""
        if self.mixture is None:
            return nats, None
        assert isinstance(self.weights, Stacked), "a mixture has a row for each expert"
        documents, columns = segment.targets.shape
        by_expert = nats.new_full((len(self.updates), documents, columns), float("nan"))
        experts, rows = np.array(self.weights.owners, dtype=np.int64).reshape(-1, 2).T
        by_expert[experts, rows] = self._without_spoiled(segment, nats)
        if static_nats is not None:
            by_expert = torch.cat([static_nats[None], by_expert])
        found = by_expert.cpu().numpy()
        is_scored = (segment.targets != NOT_SCORED).cpu().numpy()
        mixed, shares, after = self.mixture.predict(self._log_weights[:, :documents], found, is_scored)
        self._log_weights[:, :documents] = after
        learners = np.zeros((len(self.updates), documents), dtype=bool)
        learners[experts, rows] = True
        return torch.from_numpy(mixed), ExpertScores(found, shares, learners)

    def _without_spoiled(self, segment: Segment, nats: Tensor) -> Tensor:
        """The nats of experts that fail in this segment as they were before a token that spoils them all, then NaN."""
        spoiled = nats.isnan().any(dim=1).nonzero().flatten().tolist()
        nats = nats.clone() if spoiled else nats
        for row in spoiled:
            readable = self._readable(segment, row)
            nats[row] = torch.cat([readable, nats.new_full((nats.shape[1] - len(readable),), float("nan"))])
        return nats

    def _begin_mixture(self, documents: int) -> None:
        if self.mixture is not None:
            self._log_weights = self.mixture.prior(len(self.updates) + self.has_static_expert, documents)

    def _drop_failed_experts(self, scores: ExpertScores | None) -> None:
        """Takes out the rows whose nats are not finite."""
        assert isinstance(self.weights, Stacked) and scores is not None, "a mixture has a row for each expert"
        failed = ~np.isfinite(scores.nats[self.has_static_expert :]).all(axis=2)
        if rows := [row for row, owner in enumerate(self.weights.owners) if failed[owner]]:
            self.weights.drop(rows, self.optimizer_of_each_expert)

    def _running(self, segment: Segment) -> list[int]:
        """Rows of the segment whose documents have not failed."""
        return [row for row, document in enumerate(segment.documents) if document.index not in self.failed]

    def _stop_failed(self, segment: Segment, *sums: list[float] | None) -> None:
        """Marks the documents whose nats are not finite; they are scored no further and stand in no sum."""
        for each in sums:
            for document, nats in zip(segment.documents, each or (), strict=False):
                if not math.isfinite(nats):  # nats are never negative, so none can make up for another
                    self._fail(document.index, segment.cut.index, "nats were not finite")

    def _mark_not_finite(self, segment: Segment, finite: list[bool]) -> None:
        """Marks the documents whose gradients were not finite, unless they have ended: then nothing comes of it."""
        for document, is_finite in zip(segment.documents, finite, strict=True):
            if is_finite or document in segment.finished or document.index in self.unlearned:
                continue
            if self.on_failure == "static":
                self.unlearned[document.index] = segment.cut.index + 1
                self.reasons[document.index] = "gradients were not finite"
            else:
                self._fail(document.index, segment.cut.index, "gradients were not finite")

    def _fail(self, index: int, segment: int, reason: str) -> None:
        if index not in self.failed:
            self.failed[index], self.reasons[index] = segment, reason
            self.unlearned.pop(index, None)

    def _sum(self, score: Score) -> None:
        tokens = sum(score.segment.tokens[row] for row in score.rows)
        nbytes = sum(score.segment.bytes[row] for row in score.rows)
        self.adapted.update(sum(score.sums[row] for row in score.rows), tokens, nbytes)
        if score.static_sums is not None:
            self.static.update(sum(score.static_sums[row] for row in score.rows), tokens, nbytes)

    def _learn(self, segment: Segment, nats: Tensor) -> tuple[int, list[bool]]:
        """Makes the updates that are due; the first learns from the very forward that gave the score.

        Returns how many, and of each row whether its gradients were finite.
        """
        finite = [True] * len(nats)
        for repeat in range(self.passes):
            if repeat > 0:
                nats, _ = self.weights.score(segment)
            # A mean over the segment's tokens, a sum over rows: each row's gradient is its own.
            found = self.learn_from(self.weights.mean(nats, segment).sum())
            finite = [all(both) for both in zip(finite, found, strict=True)]
        return self.passes, finite

    def learn_from(self, loss: Tensor) -> list[bool]:
        """One update from the gradient of a loss; returns of each row whether its gradient was finite."""
        self.manual_backward(loss)
        if self.clip is not None:
            self.weights.clip_gradients(self.clip)
        return self.weights.step(self.optimizer_of_each_expert)

    def _now(self) -> float:
        if self._waits_for_device:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _sums_of_rows(nats: Tensor) -> list[float]:
    return nats.sum(dim=1, dtype=torch.float64).tolist()
