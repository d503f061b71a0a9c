"""Token by token: the prediction of each token of the next segment, before that token is known.

A segment is scored in one forward over all of its tokens, which a decoder does not have yet. What follows reads the same
tokens one at a time, behind the same memory or window, by the same weights; both give the same nats but for the rounding
of sums in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynlight.choices.context import has_cache, has_states
from dynlight.choices.memories import STATIC, Base, log_chances_of
from dynlight.documents.segments import Context, Cut, Segment
from dynlight.errors import require
from dynlight.learning.carried import Memory
from dynlight.learning.failures import FinishStatic
from dynlight.learning.forward import Reading
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.weights import Weights


def check_token_by_token(module: DynamicEvaluation) -> None:
    """Raises SettingError where a module's prediction cannot be had token by token."""
    config = module.model.config
    must = "have a cache of keys and values alone, with which it is read token by token"
    is_cached = has_cache(config) and not has_states(config)
    require(is_cached, "model.pretrained", must, got=f"a model of type {config.model_type}")
    is_left = not isinstance(module.failures, FinishStatic)
    require(is_left, "on_failure", "be stop, as a code ends where numbers go wrong", got="static")
    require(
        not module.has_teacher_expert, "mixture.teacher", "be false, as a teacher is not read token by token", got=True
    )
    require(
        not module.compile_mode,
        "model.compile",
        "be false, as each token would be compiled anew",
        got=module.compile_mode,
    )
    require(module.processes.way != "sharded", "trainer.strategy", "be auto", got="model_parallel")


class TokenByToken:
    """What a module, as it is now, predicts of the next segment: a distribution over the vocabulary for each token.

    Formula: p(x_t) = Σ_e w_t(e) p_e(x_t | context, memory, x of the segment before t; θ), of the experts of a mixture, or of
    the learned weights alone.

    The module is changed by nothing here; the segment is learned from by `training_step`, once it is known.

    Args:
        module: that has its weights.
        sequence: the prefix and all tokens before the segment, int64 [1 + tokens].
        tokens: of the segment.
    """

    def __init__(self, module: DynamicEvaluation, sequence: Tensor, tokens: int) -> None:
        self._module = module
        self._weights = module.weights
        self._sequence = sequence.to(module.model.device)
        self._start = len(sequence) - 1
        self._again = module.context.context(self._start, self._start + tokens)
        self._context = _Growing(module.context)
        is_first = self._start == 0
        self._memory: Memory = None if is_first else self._weights.memory
        self._static_memory: Memory = None if is_first else self._weights.static_memory
        self._log_weights = module.predictor.log_weights()
        self._memories = module.predictor.memories.ahead(begins=is_first)
        self._logs = np.empty((0, 0))  # of the next token ln p of each expert, float64 [E, V]
        self._bases: dict[int, Base] = {}  # what static and rules make of it, for the memories
        self._read_first()

    def probabilities(self) -> np.ndarray:
        """Of the next token, float64 [V]; they sum to 1 unless every expert has failed."""
        return self._module.predictor.distribution(self._log_weights, self._logs)

    def take(self, token: int, is_last: bool = False) -> None:
        """Goes on behind a token; nothing is read behind the last one."""
        self._log_weights = self._module.predictor.weighted(self._log_weights, -self._logs[:, None, [token]])
        if is_last:
            return
        known = self._sequence.new_tensor([token])
        bases = {number: replace(base, nats=-log_chances_of(base)[[token]]) for number, base in self._bases.items()}
        self._memories.take(known, bases)
        self._again += 1
        self._read(known[None], self._place, None)

    @property
    def _place(self) -> int:
        """The position of the input that is read next: counted through the document, or in its window."""
        return self._again + (self._start if self._module.context.memory is not None else 0)

    def _read_first(self) -> None:
        context, start, again = self._module.context, self._start, self._again
        inputs = self._sequence[start - again : start + 1][None].clone()
        if context.prefixes:
            inputs[0, 0] = self._sequence[0]
        has_sinks = context.memory is not None and context.sinks and start > context.memory
        self._read(inputs, self._place, self._sequence[None, : context.sinks] if has_sinks else None)

    @torch.no_grad()
    def _read(self, inputs: Tensor, place: int, sinks: Tensor | None) -> None:
        """Reads inputs [1, C + 1] that end at a position; keeps what each expert says of the token behind them."""
        cut = Cut(1, place + 1 - inputs.shape[1], place + 1, 0)
        segment = Segment((), cut, inputs, inputs[:, -1:], (slice(0, 1),), (0,), sinks)
        module, weights = self._module, self._weights
        with module.trainer.precision_plugin.forward_context(), _lent(weights, self._context):
            weights.memory, weights.static_memory = self._memory, self._static_memory
            static = None
            if module.has_static_expert and module.rules:
                static = weights.score_static(segment, keeps={"logits", *module.predictor.keeps_static})
                self._static_memory = static.memory
            own = weights.score(segment, keeps={"logits", *module.predictor.keeps}, plain=True)
            self._memory = own.memory
        owners = weights.owners if module.rules else []
        if module.has_static_expert and not module.rules:
            static = own
        of_static = None if static is None else _logs(static.logits)
        logs = module.predictor.by_expert(_logs(own.logits), of_static, owners)
        self._bases = {} if static is None else {STATIC: _base(static, 0)}
        self._bases |= {rule: _base(own, row) for row, (rule, _) in enumerate(owners)}
        with torch.autocast(inputs.device.type, enabled=False):
            self._logs = np.concatenate([logs, self._memories.predict(self._bases, logs.shape[1])])


def _base(reading: Reading, row: int) -> Base:
    """What a row of a reading makes of the token behind it."""
    return Base(np.empty(0), **reading.kept_of(row, slice(0, 1)))


def _logs(logits: Tensor | None) -> np.ndarray:
    """Ln p of the only column, float64 [R, V], from an fp32 log-softmax as a score is."""
    assert logits is not None, "they were asked for"
    values: np.ndarray = logits[:, 0].float().log_softmax(dim=-1).double().cpu().numpy()
    return values


class _Growing(Context):
    """A context whose memory, within a segment, takes up every token that is read.

    Args:
        context: of the run, which says what is in view before the segment.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(1)
        self._own = context

    @property
    def memory(self) -> int:
        return self._own.memory or 0

    def kept(self, stop: int) -> int:
        return 1 << 40  # more than there are: what drops out of view does so between segments

    def check(self, config: Any) -> None:
        self._own.check(config)


@contextmanager
def _lent(weights: Weights, context: Context) -> Iterator[None]:
    """Within the block weights read with another context; they have their own, and their memories, afterwards."""
    own = weights.context, weights.memory, weights.static_memory
    weights.context = context
    try:
        yield
    finally:
        weights.context, weights.memory, weights.static_memory = own
