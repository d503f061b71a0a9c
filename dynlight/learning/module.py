"""Dynamic evaluation as a LightningModule: a document is a training stream.

for segment in document:                        # Trainer.fit
    ResetWeights, UpdateFrequency               # policies: on_train_batch_start
    nats = score(segment)                       # training_step: one forward
    commit(nats)                                #   the score is final here, before any weight changes
    learn(nats)                                 #   from its gradients, if an update is due
    Records, FlopsLogger, DocumentProgress      # meters: on_train_batch_end
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.choices.gradient import Clip, Gradient
from dynlight.choices.memories import DocumentMemory
from dynlight.choices.mixture import Mixture
from dynlight.choices.objective import NextToken, Objective
from dynlight.choices.parameters import All, Parameters, adapters_of
from dynlight.choices.reset import ResetWeights
from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import Update, factors_of, rules_of, usual_rates
from dynlight.documents.segments import Context, Segment
from dynlight.errors import require
from dynlight.learning.advice import advise
from dynlight.learning.checks import check_run
from dynlight.learning.clock import Clock
from dynlight.learning.digests import WeightDigests
from dynlight.learning.failures import FinishStatic, Stop
from dynlight.learning.fetch import Fetch, Later
from dynlight.learning.finished import Finished
from dynlight.learning.flops import FlopCounter
from dynlight.learning.forward import Guide, Reading
from dynlight.learning.mixing import Alone, Mixed, Scored
from dynlight.learning.optimizers import make_optimizers
from dynlight.learning.processes.gradients import GradientAverage, OwnGradients
from dynlight.learning.processes.processes import Processes, processes_of, way_of
from dynlight.learning.protocol import Expert, experts_of, protocol
from dynlight.learning.pruning import Pruning
from dynlight.learning.refreshing import Refreshing
from dynlight.learning.rows import kinds_one_by_one
from dynlight.learning.score import Digests, Score
from dynlight.learning.sharded import Sharded, shard
from dynlight.learning.stacked import Stacked
from dynlight.learning.statistics import load_or_collect
from dynlight.learning.stream import stream_of
from dynlight.learning.teacher import Teacher, check_teacher, try_teacher
from dynlight.learning.totals import Totals
from dynlight.learning.trial import check_model
from dynlight.learning.trigger import Trigger
from dynlight.learning.updater import Updater
from dynlight.learning.weights import InPlace, Weights


class DynamicEvaluation(LightningModule):
    """Scores each segment of a document, then learns from it.

    Formula: nats_i = −Σ_t ln p(x_t | context, memory; θ_i) over the tokens of segment i, then, if an update is due,
    θ_{i+1} = update(θ_i, ∇_θ mean nats_i). The score and the gradient come from one forward. Source: Krause et al. 2018
    (arXiv 1709.07432), Rannen-Triki et al. 2024 (arXiv 2403.01518).

    Args:
        model: a causal language model of transformers; it is prepared in place.
        tokenizer: what makes tokens of the documents.
        context: what is scored next, with what in view.
        parameters: which weights may learn (default: all).
        objective: what is learned from a segment (default: every token alike).
        update: makes the optimizer of these weights, e.g. `partial(torch.optim.SGD, lr=0.02)`; several for a mixture;
            None: static evaluation, or with a mixture SGD and Adam at their usual rates.
        schedule: when to learn (default: from every segment).
        reset: when to forget (default: at each document).
        reference: `static` scores the same windows with the initial weights too; None saves the cost.
        clip: the largest gradient norm of a document; None: no bound. The same as `Clip` in front of `gradient`.
        gradient: what becomes of the gradient before the update, change by change (default: nothing).
        rates: learning rates in place of the update's own; every document is learned from at each, separately.
        rate_factors: by what the learning rate of some weights is multiplied, by a regular expression in their names.
        teacher: another language model with the same tokens, which reads the same windows and learns nothing: its score stands
            beside, and it may be learned from (`Distilled`) or be an expert of the mixture.
        mixture: how the static model and the rules predict together. Default: `Mixture()` when `rates` or `memories` are
            given, because the best single rate is known only afterwards; otherwise no mixture.
        memories: what else is remembered of a document, each memory as an expert of the mixture over the static model or over
            each rule. With them, `update` None is static evaluation even where there is a mixture.
        on_failure: what becomes of a document whose nats or gradients are not finite: `stop` leaves it out of all sums;
            `static` reads it to its end with the initial weights, from the first token without nats on.
        digests: whether scores carry digests of the learned weights, which a receipt needs.
        compile: whether forward and backward run through `torch.compile`; or its mode, as `reduce-overhead`.

    Raises:
        SettingError: where the choices don't fit the model.
    """

    optimizers_of_rules: list[Optimizer]
    weights: Weights

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: Context,
        parameters: Parameters | None = None,
        objective: Objective | None = None,
        update: Update | Sequence[Update] | None = None,
        schedule: UpdateFrequency | None = None,
        reset: ResetWeights | None = None,
        reference: Literal["static"] | None = "static",
        clip: float | None = None,
        gradient: Sequence[Gradient] | None = None,
        rates: Sequence[float] | None = None,
        rate_factors: Mapping[str, float] | None = None,
        teacher: PreTrainedModel | None = None,
        mixture: Mixture | None = None,
        memories: Sequence[DocumentMemory] | None = None,
        on_failure: Literal["stop", "static"] = "stop",
        digests: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        finishes = on_failure == "static"
        require(reference is not None or not finishes, "on_failure", "be stop without a reference", got=on_failure,
                advice="set reference: static")  # fmt: skip
        require(clip is None or clip > 0, "clip", "be above 0", got=clip, advice="choose null for no bound")
        context.check(model.config)
        require(not adapters_of(model), "model", "hold no adapter of its own", got=f"{type(model).__name__} with one",
                advice="merge it into the model's weights first (merge_and_unload of peft)")  # fmt: skip
        # Learning and scoring share a forward, so nothing in it may be random: dropout stays off while we learn.
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = context
        self.learnable = parameters or All()  # a module has `parameters` of its own
        self.objective = objective or NextToken()
        self.schedule = schedule or UpdateFrequency()
        self.reset_weights = reset or ResetWeights()
        self.reference = reference
        self.teacher_model = None if teacher is None else teacher.eval().requires_grad_(False)
        self._check_teacher(mixture)
        self.gradient = [*([Clip(clip)] if clip is not None else []), *(gradient or [])]
        self.memories = list(memories or [])
        is_mixed = rates is not None or bool(self.memories)
        self.mixture = Mixture() if mixture is None and is_mixed else mixture
        width = model.get_input_embeddings().weight.shape[-1]
        usual = partial(usual_rates, width=width, adapters=self.learnable.are_adapters)
        learns = not self.memories or update is not None or rates is not None
        self.rules = rules_of(update, usual if rates is None else rates, self.mixture) if learns else []
        if self.rules:
            self.learnable.prepare(model)
        else:
            model.requires_grad_(False)
            self.gradient = []
        self.rate_factors = {str(name): factor for name, factor in (rate_factors or {}).items()} if self.rules else {}
        self._factors = self._factors_of_weights()
        self.predictor = self._predictor()
        # A CUDA graph would write over the activations of the score while another segment is read.
        is_kept = self.objective.replayed_share == 0 or not isinstance(compile, str)
        require(is_kept, "model.compile", "be true or false with objective Replayed", got=compile)
        self.trigger = Trigger(self.schedule, self.objective, len(self.rules))
        may_differ = self.trigger.is_set and context.refresh is not None
        require(not may_differ, "context.refresh", "be null where each row asks its score whether to learn",
                got=context.refresh, advice="choose another schedule or objective")  # fmt: skip
        self.refreshing = Refreshing(context)
        self.pruning = Pruning(self.learnable if self.rules else All(), model)
        is_steady = not compile or not self.pruning.is_set or self.learnable.are_adapters
        require(is_steady, "model.compile", "be false where modules are Pruned, each set of which would be compiled anew",
                got=compile)  # fmt: skip
        self.failures = FinishStatic() if finishes and self.has_reference and not self.mixture else Stop()
        self.gradients = OwnGradients()
        self.fetch = Fetch()
        self._processes: Processes | None = None
        self._last_read: list[int] = []  # the documents of the last segment
        self._guide: Guide | None = None  # what another makes of the present segment, where learning is guided by it
        self.totals = Totals()
        self.takes_digests = digests
        self.compile_mode = compile
        self.goes_on = (
            False  # whether the next Trainer.fit begins with what the last one has learned, as of a text that goes on
        )
        self.updates_due = 1  # how many to make from the present segment; the schedule sets it
        self.score: Score | None = None  # of the present segment; None: all documents of it have stopped
        # Updates are made by training_step itself: Lightning's own loop would scale the loss that callbacks see.
        self.automatic_optimization = False

    def training_step(self, segment: Segment, batch_idx: int) -> None:
        """Scores the segment, commits the score, then learns from it."""
        self.score, self._last_read = None, [document.index for document in segment.documents]
        self.weights.enter(segment, self.optimizers_of_rules)
        before = self._digests(segment)
        score = self._score_and_learn(segment) if self.failures.rows(segment) else None
        self.gradients.end_round(self)
        if score is not None:
            after = self._digests(segment)
            self.score = replace(score, digests=None if before is None or after is None else Digests(before, after))
            self.totals.add(self.score)
        self.totals.leave_out(self.failures)

    def _score_and_learn(self, segment: Segment) -> Score | None:
        """The committed score; None: every document has just failed.

        Gradients change no weight, so they are taken while the nats are still on the device: then the host waits for it
        once, for nats and for whether gradients are finite. Gradients that other processes would learn from too must wait
        for the commit, which shows that the nats are finite; so must those that depend on the nats.
        """
        with self.clock("static"):
            static = self._fetched(self._score_static(segment))
        taught = self._fetched(self._score_teacher(segment))
        with self.clock("scoring"):
            # The one forward, with a graph if an update is due.
            rows = self._fetched(self._score(segment, static, taught))
            assert rows is not None, "rows are always read"
        with self.clock("learning"):
            waits = self.gradients.are_shared or self.trigger.is_set
            early = None if waits else self._gradients(segment, rows.reading, rows.reading, self._all_rows)
        with self.clock("scoring"):
            committed = self._commit(segment, rows, static, taught)
        with self.clock("learning"):
            learners = self.trigger.learners(segment, rows.nats, self.weights.owners)
            finite = self._learn(segment, rows.reading, committed, learners, early)
            updates = self._updates(segment, None if finite is None else learners)
            reread = self._carry_on(segment, rows.reading, committed, finite) if committed else range(0)
        seconds = self.clock.take()
        return replace(committed, updates=updates, reread=reread, seconds=seconds) if committed else None

    def _fetched(self, reading: Reading | None) -> Scored | None:
        """A reading whose nats are on their way to the host."""
        return None if reading is None else Scored(reading, self.fetch.later(reading.nats))

    def _score_static(self, segment: Segment) -> Reading | None:
        """What θ0 makes of the segment, if it is the reference, or learning is guided by it."""
        if not (self.has_reference or self.is_guided):
            return None
        guides = self.is_guided and self.update_due
        return self.weights.score_static(
            segment, keeps={*self.predictor.keeps_static, *(("logits",) if guides else ())}
        )

    def _score_teacher(self, segment: Segment) -> Reading | None:
        """What the teacher makes of the segment, if there is one."""
        if self.teacher is None:
            return None
        is_guide = self.objective.guide == "teacher" and self.update_due
        with self.clock("teacher"):
            return self.teacher.score(segment, keeps={"logits"} if is_guide else ())

    def _guide_of(self, static: Scored | None, taught: Scored | None) -> Guide | None:
        """What learning from the segment is guided by, if it is."""
        guide = {"initial": static, "teacher": taught, None: None}[self.objective.guide]
        if not self.update_due or guide is None or guide.reading.logits is None:
            return None
        return Guide(guide.reading.logits, self.objective.temperature)

    def _score(self, segment: Segment, static: Scored | None, taught: Scored | None) -> Reading:
        """Reads each row; no forward where the initial weights have taken over every document."""
        if static is not None and self.failures.all_static(segment):
            return Reading(static.reading.nats, self.weights.memory)
        self._guide = self._guide_of(static, taught)
        with torch.set_grad_enabled(self.update_due):
            return self.weights.score(segment, self._guide, self.predictor.keeps)

    def _commit(self, segment: Segment, rows: Scored, static: Scored | None, teacher: Scored | None) -> Score | None:
        """The final score: the prediction, mended where learning failed; None: every document has stopped."""
        static = static if self.has_reference else None
        prediction = self.predictor.predict(segment, rows, static, teacher, self.weights)
        static_nats = None if static is None else static.nats
        nats = self.failures.mend(segment, prediction.nats, static_nats, self.weights)
        if self.reference is not None and not self.rules:
            static_nats = rows.nats  # nothing is ever learned: what reads is its own reference
        score = Score.of(segment, nats, static_nats, None if teacher is None else teacher.nats, prediction.experts)
        self.failures.stop(segment, score.sums, score.static_sums)
        left = self.failures.rows(segment)
        if not left:
            return None
        by_static, stopped = self.failures.by_static(segment), self.weights.left_out
        return replace(score, rows=left, by_static=by_static, stopped=stopped)

    def _gradients(self, segment: Segment, reading: Reading, scored: Reading, learners: Sequence[bool]) -> Later | None:
        """Takes the gradients of the rows that learn; asks whether they are finite. None: none learns.

        `scored` is the reading that gave the score; `reading` is another where it is a second pass.
        """
        if not self.update_due or not any(learners) or self.failures.all_static(segment):
            return None
        return self.updater.gradients(segment, reading, scored, learners)

    def _learn(
        self,
        segment: Segment,
        reading: Reading,
        committed: Score | None,
        learners: Sequence[bool],
        early: Later | None,
    ) -> list[bool] | None:
        """Makes the updates that are due, the first from the forward that gave the score.

        Returns of each row whether its gradients were finite; None: no update was made.
        """
        if committed is None or len(committed.by_static) == len(committed.rows):
            self.weights.give_up()
            return None
        if (gradients := early or self._gradients(segment, reading, reading, learners)) is None:
            self.weights.drop_gradients()
            return None
        finite = self.updater.update(gradients, learners)
        for _ in range(self.updates_due - 1):
            again = self._gradients(segment, self.weights.score(segment, self._guide), reading, learners)
            assert again is not None, "an update is due"
            finite = [all(both) for both in zip(finite, self.updater.update(again, learners), strict=True)]
        return finite

    def _carry_on(self, segment: Segment, reading: Reading, committed: Score, finite: Sequence[bool] | None) -> range:
        """Carries the memory on, drops what has failed; returns which segments were read again for a new memory."""
        self.weights.keep(reading.memory)
        settled = self.predictor.settle(committed, finite, self.weights, self.optimizers_of_rules)
        self.failures.mark(segment, settled)
        return self.refreshing.after(segment, 0 if finite is None else self.updates_due, self.weights)

    def learn_from(self, loss: Tensor) -> list[bool]:
        """Makes one update from the gradient of a loss; returns of each row whether its gradient was finite."""
        return self.updater.learn_from(loss)

    def _updates(self, segment: Segment, learners: Sequence[bool] | None) -> np.ndarray:
        """How many updates each rule made from each document, [rules, D]; `learners`: of each row, None: of none."""
        updates = np.zeros((len(self.rules), len(segment.documents)), dtype=np.int64)
        for owner, learns in zip(self.weights.owners if learners else [], learners or [], strict=True):
            updates[owner] = self.updates_due * learns
        return updates

    @property
    def _all_rows(self) -> list[bool]:
        return [True] * len(self.weights.owners)

    def reset(self, documents: int = 1, keep: float = 0.0) -> None:
        """Restores the initial weights, optimizer state and random state, for the `documents` documents that begin.

        `keep` is the share of what was learned that stays; of a document that failed, nothing does.
        """
        has_failed = any(document in self.failures.of_documents for document in self._last_read)
        self.weights.reset(documents, 0.0 if has_failed else keep)
        self.pruning.begin(self.weights)
        self.predictor.begin(documents)
        _set_random_state(self._random_state, self.device)
        for optimizer, initial in zip(self.optimizers_of_rules, self._initial_optimizer_states, strict=True):
            optimizer.load_state_dict(copy.deepcopy(initial))

    def _check_teacher(self, mixture: Mixture | None) -> None:
        asking = "objective Distilled" if self.objective.guide == "teacher" else "mixture.teacher true"
        is_asked = self.objective.guide == "teacher" or (mixture is not None and mixture.teacher)
        require(self.teacher_model is not None or not is_asked, "teacher", f"be given with {asking}", got="null")
        if self.teacher_model is not None:
            check_teacher(self.teacher_model, self.model, self.context)

    def _predictor(self) -> Alone:
        if self.mixture is None:
            return Alone()
        if self.rules and not self.has_reference:
            for memory in self.memories:
                require(memory.over == "learned", "memories.over", "be learned without a reference", got=memory.over,
                        advice="set reference: static")  # fmt: skip
        return Mixed(self.mixture, len(self.rules), self.has_static_expert, self.memories)

    def _factors_of_weights(self) -> list[float] | None:
        """Of each learned weight the factor of its rate; None: all are 1."""
        names = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        return factors_of(names, self.rate_factors) if self.rate_factors else None

    def _digests(self, segment: Segment) -> WeightDigests | None:
        return self.weights.digests(len(segment.documents), self.fetch) if self.takes_digests else None

    @property
    def update_due(self) -> bool:
        """Whether the present segment is learned from."""
        return bool(self.rules) and self.updates_due > 0

    @property
    def updates_of_segment(self) -> int:
        """How many updates are made from a segment that is learned from."""
        return self.schedule.passes

    @property
    def has_reference(self) -> bool:
        """Whether the static model scores beside the learning one."""
        return self.reference is not None and bool(self.rules)

    @property
    def is_guided(self) -> bool:
        """Whether learning needs to know what the initial weights predict."""
        return bool(self.rules) and self.objective.guide == "initial"

    @property
    def has_teacher_expert(self) -> bool:
        """Whether the teacher is one of the experts of a mixture."""
        return self.mixture is not None and self.mixture.teacher

    @property
    def has_static_expert(self) -> bool:
        """Whether the static model is one of the experts of a mixture."""
        return self.mixture is not None and (self.has_reference or not self.rules)

    @property
    def experts(self) -> list[Expert]:
        """What scores each document: the static model, if it is an expert of a mixture, then each rule and memory."""
        memories = self.predictor.memories.experts
        return experts_of(self.optimizers_of_rules, self.has_static_expert, self.has_teacher_expert, memories)

    @property
    def protocol(self) -> str:
        """The choices in one line: what a number of this run means."""
        chosen = self.context, self.learnable, self.experts, self.schedule, self.reset_weights
        return protocol(
            *chosen, mixture=self.mixture, gradient=self.gradient, objective=self.objective, factors=self.rate_factors
        )

    @cached_property
    def flop_counter(self) -> FlopCounter:
        """What counts the FLOPs of a segment."""
        return FlopCounter(
            self.model,
            self.context,
            self.rules,
            self.has_reference,
            bool(self.rules) and self.has_static_expert,
            self.is_guided,
            self.reference is not None and not self.rules and bool(self.memories),
            self.objective.replayed,
            self.predictor.memories.experts,
        )

    @cached_property
    def teacher_flop_counter(self) -> FlopCounter:
        """What counts the FLOPs of the teacher's forward."""
        assert self.teacher_model is not None
        return FlopCounter(self.teacher_model, self.context, [])

    @property
    def processes(self) -> Processes:
        """How the processes of this run share its work; found out once a run."""
        if self._processes is None:
            self._processes = processes_of(self.trainer)
        return self._processes

    def configure_callbacks(self) -> list[Callback]:
        """The policies, which Lightning adds to the Trainer's callbacks at the start of a run."""
        self._processes = None
        average = GradientAverage() if way_of(self.trainer.strategy) == "in_step" else None
        self.gradients = average or OwnGradients()
        return [self.reset_weights, self.schedule, *([average] if average else [])]

    def setup(self, stage: str) -> None:
        self.check(self.trainer, stream_of(self.trainer).together)

    def configure_model(self) -> None:
        """Leaves this process its shard of the weights, where several devices hold them."""
        if self.processes.way == "sharded":
            _ = self.flop_counter  # made now, as it copies the shapes of a model that is still whole
            assert self.device_mesh is not None, "Lightning has set it"
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimizer for each rule's weights; Lightning calls this once the model lies on its device."""
        if self.goes_on:
            return self.optimizers_of_rules
        together = int(stream_of(self.trainer).together)
        with self.trainer.precision_plugin.forward_context():  # a trial forward needs the run's precision
            is_whole = self.processes.way != "sharded"
            check_model(self.model, self.context, self.learnable, self.memories, is_whole)
            if self.teacher_model is not None:
                try_teacher(self.teacher_model, self.context)
            if is_whole:  # else the model has no device of its own yet
                advise(self.model, self.context, stream_of(self.trainer).loaded, self.trainer, self.compile_mode)
        if together > 1 or self.mixture is not None:
            with self.trainer.precision_plugin.forward_context():
                self.weights = stacked = Stacked(
                    self.model,
                    self.context,
                    together,
                    max(1, len(self.rules)),
                    self.compile_mode,
                    apart=self.trigger.is_set or self.pruning.is_set,
                )
            alone = stacked.reason_against_batch
            if alone or (kinds := ", ".join(kinds_one_by_one(self.model))):
                what = f"{self.model.config.model_type}, {alone}" if alone else kinds
                rank_zero_warn(f"read one row after another, which takes longer: {what}")
        else:
            kind = {"sharded": Sharded}.get(self.processes.way, InPlace)
            self.weights = kind(self.model, self.context, self.compile_mode)
        self.weights.keep_errors(self.gradient)
        self.teacher = self._teacher(together)
        if self.pruning.is_set:
            _ = self.flop_counter  # made now, as it copies the model while all that is to learn does
            self.pruning.begin(self.weights)
        self.predictor.begin(together)
        self.clock = Clock(self.device)
        self._random_state = _random_state(self.device)
        statistics_of = partial(load_or_collect, model=self.model, tokenizer=self.tokenizer, context=self.context)
        self.optimizers_of_rules = make_optimizers(
            self.rules, self.weights, self.gradient, statistics_of, self._factors
        )
        self.updater = Updater(
            self.weights,
            self.optimizers_of_rules,
            self.objective,
            self.gradient,
            self.pruning,
            self.context,
            self.manual_backward,
            self.fetch,
        )
        self._initial_optimizer_states = [copy.deepcopy(each.state_dict()) for each in self.optimizers_of_rules]
        return self.optimizers_of_rules

    def _teacher(self, together: int) -> Teacher | None:
        if self.teacher_model is None:
            return None
        with self.trainer.precision_plugin.forward_context():
            teacher = Teacher(self.teacher_model, self.context, together, self.compile_mode)
        if alone := teacher.reason_against_batch:
            of_teacher = f"the teacher, {self.teacher_model.config.model_type}, {alone}"
            rank_zero_warn(f"read one document after another, which takes longer: {of_teacher}")
        return teacher

    def check(self, trainer: Trainer, together: int | Literal["auto"] = 1) -> None:
        """Raises SettingError where this Trainer or `together` don't fit the choices; weights may lie on `meta`."""
        is_mixed = self.mixture is not None
        is_sharded = way_of(trainer.strategy) == "sharded"
        require(self.teacher_model is None or not is_sharded, "teacher", "be null with trainer.strategy model_parallel",
                got="a model, which each device would hold as a whole")  # fmt: skip
        shares = way_of(trainer.strategy) in ("sharded", "in_step")
        require(not (self.pruning.is_set and shares), "parameters", "not be Pruned where processes learn one set of weights",
                got=type(trainer.strategy).__name__, advice="choose document_parallel or auto")  # fmt: skip
        check_run(
            trainer, self.model, self.rules, self.gradient, is_mixed, self.reset_weights, together, self.trigger.is_set
        )

    def on_train_start(self) -> None:
        # The Trainer leaves the mode as it is, and a caller may have set another.
        self.model.eval()
        if self.teacher_model is not None:
            self.teacher_model.eval()

    def on_train_end(self) -> None:
        if self.pruning.is_set and not self.goes_on:  # the model's weights are as they were given to it
            self.weights.stop({})

    def on_train_epoch_end(self) -> None:
        # Documents are read once: a Trainer without max_epochs would begin again, on weights that have seen them.
        self.trainer.should_stop = True

    def release(self) -> None:
        """Frees the device of everything but the model, after a run has failed there."""
        self.score, self.fetch = None, Fetch()
        if self.pruning.is_set and hasattr(self, "weights"):
            self.weights.stop({})
        for name in ("weights", "optimizers_of_rules", "updater", "teacher"):
            vars(self).pop(name, None)

    def progress_state(self) -> dict[str, Any]:
        """The state between two segments, from which a run can go on: tensors and plain data."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers_of_rules]
        states = {name: keeper.progress_state() for name, keeper in self._state_keepers.items()}
        return states | {"optimizers": optimizers, "random": self._random_state, "last_read": self._last_read}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Puts back what `progress_state` gave."""
        for name, keeper in self._state_keepers.items():
            if name in state:  # a checkpoint of an earlier version knows of fewer
                keeper.load_progress_state(state[name])
        self.pruning.go_on(self.weights)
        for optimizer, saved in zip(self.optimizers_of_rules, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._last_read = state.get("last_read", [])
        random = state["random"]
        self._random_state = {"cpu": random} if isinstance(random, Tensor) else random  # one tensor in dynlight 0.1

    def recount(self, finished: Sequence[Finished]) -> None:
        """Counts the documents that were read to their end before the run was resumed."""
        self.failures.recount(finished)
        self.totals.recount(finished)

    @property
    def _state_keepers(self) -> dict[str, Any]:
        """The collaborators whose state changes from segment to segment."""
        return ({} if self.teacher is None else {"teacher": self.teacher}) | {
            "weights": self.weights,
            "predictor": self.predictor,
            "failures": self.failures,
            "totals": self.totals,
            "trigger": self.trigger,
            "refreshing": self.refreshing,
            "pruning": self.pruning,
        }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a forward on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:  # not in a state that was kept on a CPU
        torch.cuda.set_rng_state(state["cuda"], device)
