"""FLOPs: what a segment costs, measured, and logged against loss.

Counted are the floating-point operations of matrix products (a multiplication and an addition are two), attention over
its whole window included, whatever kernel runs it. For N matmul parameters, L blocks of attention width d, C tokens in
view, a backward that crosses the share f of the depth and learns the share a of N, a token costs by arithmetic

    forward                        2 N + 4 L d C
    backward through activations   f (2 N + 8 L d C)
    backward to weights            2 N a

The elementwise arithmetic of the update is counted apart, one for each element that each operator writes: it costs
memory traffic rather than FLOPs, which is why wall-clock and FLOPs part on small segments.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynlight.choices.context import Cut
from dynlight.choices.update import RMSDynamic
from dynlight.documents.waves import Segment
from dynlight.learning.processes.strategies import board_of
from dynlight.learning.weights import InPlace, Memory, token_nats
from dynlight.recording.loggers import Points
from dynlight.recording.report.ratios import bits_per_byte, nats_per_token, word_perplexity

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation, Score
    from dynlight.recording.resume import Kept


@dataclass(frozen=True)
class Flops:
    """FLOPs of one segment of one document."""

    forward: int = 0
    activation: int = 0  # backward through activations
    weight: int = 0  # backward to weights
    update: int = 0  # elementwise operations of the optimizer, apart
    static: int = 0  # the static reference's forward, apart

    @property
    def total(self) -> int:
        """Forward and backward of the adapted model."""
        return self.forward + self.activation + self.weight

    def times(self, passes: int) -> "Flops":
        """The cost of learning `passes` times from a segment whose first forward also gives the score."""
        return replace(
            self,
            forward=self.forward * max(1, passes),
            activation=self.activation * passes,
            weight=self.weight * passes,
        )


class FlopCounter:
    """Measures each shape once, on a copy of the model without data (torch's `meta` device).

    Memory between none and all of it needs no measurement: its cost lies on a line. The copy runs the same modules in the
    same way, so nothing is assumed about the architecture, and measuring costs neither memory nor arithmetic. Attention
    runs as plain matrix products there, as fused kernels hide theirs.
    """

    def __init__(self, module: "DynamicEvaluation") -> None:
        self._model = _without_data(module.model)
        self._weights = InPlace(self._model, module.context)
        self._updates = module.updates
        self._has_reference = module.has_reference
        self._has_static_expert = module.has_static_expert
        self._measure = cache(self._measure_shape)
        self._update_flops = cache(self._measure_update)
        self._count = cache(self._count_shape)

    def count(self, score: "Score", row: int = 0) -> Flops:
        """The FLOPs of a segment that was scored, for one of its documents; of a mixture, those of all its experts."""
        cut = score.segment.cut
        learners = (0,) if score.experts is None else tuple(np.flatnonzero(score.experts.learners[:, row]).tolist())
        memory = min(self._weights.context.memory or 0, cut.start)
        return self._count(cut.context, cut.stop - cut.start, memory, score.updates_of(row), learners)

    def _count_shape(self, context: int, scored: int, memory: int, updates: int, learners: tuple[int, ...]) -> Flops:
        once = self._at_memory(context, scored, memory, learns=updates > 0)
        each = once.times(updates)
        total = {part: len(learners) * flops for part, flops in asdict(each).items()}
        if updates:
            total["update"] = updates * sum(self._update_flops(learner) for learner in learners)
        total["static"] = once.static
        if self._has_static_expert:
            total["forward"] += once.static
        return Flops(**total)

    def _at_memory(self, context: int, scored: int, memory: int, learns: bool) -> Flops:
        full = self._weights.context.memory
        if not full or memory in (0, full):
            return self._measure(context, scored, memory, learns)
        # Keys and values enter each product as one dimension, so between no memory and a full one the cost is a line.
        none, all_of_it = (self._measure(context, scored, length, learns) for length in (0, full))
        parts = {}
        for part, most in asdict(all_of_it).items():
            least = getattr(none, part)
            assert (most - least) * memory % full == 0, "a line through whole numbers of FLOPs a position"
            parts[part] = least + (most - least) * memory // full
        return Flops(**parts)

    def _measure_shape(self, context: int, scored: int, memory: int, learns: bool) -> Flops:
        segment = _empty_segment(context, scored)
        kept = self._empty_memory(memory)
        holders = [module for module in self._model.modules() if _holds_learned(module)] if learns else []
        outputs: list[Tensor] = []
        hooks = [holder.register_forward_hook(lambda *call: outputs.append(call[-1])) for holder in holders]
        with torch.set_grad_enabled(learns), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits, _ = self._weights.read(segment, kept)
            forward = counter.get_total_flops()
            for hook in hooks:
                hook.remove()
            if learns:
                loss = token_nats(logits, segment.targets).mean()
                # To the outputs of the modules that hold learned weights: through activations and no further.
                torch.autograd.grad(loss, outputs, retain_graph=True)
                activation = counter.get_total_flops() - forward
                torch.autograd.grad(loss, self._weights.learned, allow_unused=True)
                weight = counter.get_total_flops() - forward - 2 * activation
        return Flops(
            forward=forward,
            activation=activation if learns else 0,
            weight=weight if learns else 0,
            static=self._static_flops(segment, kept) if self._has_reference else 0,
        )

    def _static_flops(self, segment: Segment, memory: Memory) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._weights.read_static(segment, memory)
        return counter.get_total_flops()

    def _empty_memory(self, length: int) -> Memory:
        if length == 0:
            return None
        return [(keys.expand(-1, -1, length, -1), values.expand(-1, -1, length, -1)) for keys, values in self._position]

    @cached_property
    def _position(self) -> list[tuple[Tensor, Tensor]]:
        """What one position leaves in memory: the shapes of its keys and values."""
        with torch.no_grad():
            _, memory = self._weights.read(_empty_segment(context=0, scored=1), None)
        assert memory, "only a context with memory carries one"
        return memory

    def _measure_update(self, expert: int) -> int:
        weights = [nn.Parameter(torch.empty_like(weight)) for weight in self._weights.learned]
        optimizer = self._updates[expert](weights)
        if isinstance(optimizer, RMSDynamic):
            optimizer.use_statistics([torch.empty_like(weight) for weight in weights])
        for group in optimizer.param_groups:
            group.update({switch: False for switch in ("fused", "foreach") if switch in group})
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # a first one makes the state; those that follow are what an update costs
        with _ElementCounter() as counter:
            optimizer.step()
        return counter.elements


@dataclass
class _Sums:
    """Nats, static and adapted, and what to divide them by."""

    nats: float = 0.0
    static_nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    def add(self, other: "_Sums", sign: int = 1) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + sign * value)


# Everything that is logged over tokens and over FLOPs. Without a reference those of `static` and `gain` are left out.
SERIES = (
    "bits_per_byte",
    "static_bits_per_byte",
    "gain_bits_per_byte",
    "nats_per_token",
    "static_nats_per_token",
    "word_perplexity",
    "static_word_perplexity",
    "segment_nats_per_token",
    "segment_gain_nats_per_token",
)


class FlopsLogger(Callback):
    """Logs loss beside the tokens read and the FLOPs spent after every segment, to every logger of the Trainer.

    Ratios run over all that was read so far, those of `segment_…` over the segment alone, and word perplexity over the
    documents that were read to their end, as words are counted in whole documents. A document that failed is taken out
    again. On W&B each series is drawn twice without a setting: `by_flops/…` over FLOPs, `by_tokens/…` over tokens. Of a
    mixture the weight of each expert is logged too, `weight/…`.

    Of several processes the first logs: sums are those of all, as they told within the last second and at the end, and
    only those of `segment_…` and `weight/…` are its own.

    Args:
        folder: the run's, which keeps what loggers were told until the run has ended; None: it isn't kept.
        resumes: whether the run goes on where it was cut short.
    """

    is_record = True  # so that one process of those that read the same has it

    def __init__(self, folder: Path | None = None, resumes: bool = False) -> None:
        self._file = None if folder is None else folder / "rows/points.jsonl"
        self._resumes = resumes

    def on_train_start(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        self._axes = {"tokens": 0, "flops": 0}
        self._costs: dict[str, float] = {"update_flops": 0, "static_flops": 0}
        self._costs |= {"scoring_seconds": 0.0, "learning_seconds": 0.0, "static_seconds": 0.0}
        self._read, self._whole = _Sums(), _Sums()
        self._running: dict[int, _Sums] = {}
        self._board = board_of(trainer)
        told = trainer.loggers if self._board.rank == 0 else []
        self._points = Points(told, self._file, self._resumes)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for axis in self._axes:
                    logger.experiment.define_metric(axis, hidden=True)
                    for name in SERIES:
                        once = None if axis == "tokens" else "none"  # in the run's summary
                        logger.experiment.define_metric(f"by_{axis}/{name}", step_metric=axis, summary=once)
                for name in (*(f"cost/{name}" for name in self._costs), "weight/*"):
                    logger.experiment.define_metric(name, step_metric="tokens")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        if not trainer.loggers:
            return
        for failed in pl_module.failed.keys() & self._running.keys():
            self._read.add(self._running.pop(failed), sign=-1)
        if (score := pl_module.score) is None:
            return
        for row in score.rows:
            self._axes["tokens"] += score.segment.tokens[row]
            flops = pl_module.flop_counter.count(score, row)
            self._axes["flops"] += flops.total
            self._costs["update_flops"] += flops.update
            self._costs["static_flops"] += flops.static
        for part, seconds in score.seconds.items():
            self._costs[f"{part}_seconds"] += seconds
        weights = _expert_weights(score, pl_module)
        self._log(trainer, self._add(score), score.static_nats is not None, weights)

    def state_dict(self) -> dict[str, Any]:
        """All sums, and how many points were logged."""
        running = {document: vars(sums).copy() for document, sums in self._running.items()}
        sums = {"read": vars(self._read).copy(), "whole": vars(self._whole).copy(), "running": running}
        return sums | {"axes": self._axes.copy(), "costs": self._costs.copy(), "points": self._points.sync()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._axes, self._costs = state_dict["axes"], state_dict["costs"]
        self._points.go_on(state_dict["points"])
        self._read, self._whole = _Sums(**state_dict["read"]), _Sums(**state_dict["whole"])
        self._running = {document: _Sums(**sums) for document, sums in state_dict["running"].items()}

    def recount(self, kept: Sequence["Kept"]) -> None:
        """Adds up the documents that are kept from before."""
        for document, failure, rows in ((each.document, each.failure, each.rows) for each in kept):
            self._axes["tokens"] += int(rows.tokens.sum())
            self._axes["flops"] += int(rows.flops.sum())
            for name in self._costs:
                self._costs[name] += rows[name].sum().item()
            if failure is None:
                counts = (int(rows.tokens.sum()), int(rows.bytes.sum()), document.words)
                whole = _Sums(math.fsum(rows.nats), math.fsum(rows.static_nats.fillna(0.0)), *counts)
                self._whole.add(whole)
                self._read.add(replace(whole, words=0))
        self._points.go_on(tokens=self._axes["tokens"])

    def on_train_end(self, trainer: Trainer, pl_module: "DynamicEvaluation") -> None:
        if trainer.loggers and self._board.ranks > 1:
            self._totals(at_once=True)
            self._board.wait("last series")
            has_static = pl_module.reference is not None
            self._log(trainer, None, has_static, {}, at_once=True)
        self._points.end()

    def _add(self, score: "Score") -> _Sums:
        """Adds a segment to the sums, and gives its own."""
        static = score.static_sums or [0.0] * len(score.sums)
        segment, finished = _Sums(), score.segment.finished
        for row in score.rows:
            document = score.segment.documents[row]
            part = _Sums(score.sums[row], static[row], score.segment.tokens[row], score.segment.bytes[row])
            segment.add(part)
            self._running.setdefault(document.index, _Sums()).add(part)
            if document in finished:
                self._whole.add(self._running.pop(document.index))
                self._whole.words += document.words
        self._read.add(segment)
        return segment

    def _totals(self, at_once: bool = False) -> tuple[dict[str, float], dict[str, float], _Sums, _Sums]:
        """Axes, costs, and the sums over what was read and over whole documents, of all processes."""
        parts = (self._axes, self._costs, vars(self._read), vars(self._whole))
        numbers = iter(self._board.total("series", [each for part in parts for each in part.values()], at_once))
        axes, costs, read, whole = ({name: next(numbers) for name in part} for part in parts)
        return axes, costs, _Sums(**read), _Sums(**whole)  # type: ignore[arg-type]

    def _log(
        self,
        trainer: Trainer,
        segment: _Sums | None,
        has_static: bool,
        weights: dict[str, float],
        at_once: bool = False,
    ) -> None:
        axes, costs, read, whole = self._totals(at_once)
        series = _series(read, whole, segment, has_static)
        self._points.add({"axes": axes, "series": series, "costs": costs, "weights": weights})


def _series(read: _Sums, whole: _Sums, segment: _Sums | None, has_static: bool) -> dict[str, float]:
    """The ratios of what was read, of whole documents, and of the last segment if there is one."""
    last = segment or _Sums()
    series = {
        "bits_per_byte": bits_per_byte(read.nats, read.bytes),
        "nats_per_token": nats_per_token(read.nats, read.tokens),
        "word_perplexity": word_perplexity(whole.nats, whole.words),
        "segment_nats_per_token": nats_per_token(last.nats, last.tokens),
    }
    if has_static:
        series |= {
            "static_bits_per_byte": bits_per_byte(read.static_nats, read.bytes),
            "gain_bits_per_byte": bits_per_byte(read.static_nats - read.nats, read.bytes),
            "static_nats_per_token": nats_per_token(read.static_nats, read.tokens),
            "static_word_perplexity": word_perplexity(whole.static_nats, whole.words),
            "segment_gain_nats_per_token": nats_per_token(last.static_nats - last.nats, last.tokens),
        }
    return {name: value for name, value in series.items() if value is not None}


def _expert_weights(score: "Score", pl_module: "DynamicEvaluation") -> dict[str, float]:
    """The mean weight of each expert of a mixture over a segment and its documents."""
    if score.experts is None:
        return {}
    shares = score.experts.shares[:, score.rows].mean(axis=1).tolist()
    return {f"weight/{name}": share for name, share in zip(pl_module.expert_names, shares, strict=True)}


def _without_data(model: nn.Module) -> Any:
    """A copy of the model on the meta device; parameters shared by name stay shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta", requires_grad=False)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _empty_segment(context: int, scored: int) -> Segment:
    return Segment(
        documents=(),
        cut=Cut(0, 0, scored, context),
        inputs=torch.empty(1, context + scored, dtype=torch.int64, device="meta"),
        targets=torch.empty(1, scored, dtype=torch.int64, device="meta"),
        scored=(slice(0, scored),),
        bytes=(),
    )


def _holds_learned(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class _ElementCounter(TorchDispatchMode):
    """Counts the elements written by elementwise operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags or "_foreach_" in func.name():
            written = args[0] if output is None else output
            tensors = written if isinstance(written, list | tuple) else [written]
            self.elements += sum(tensor.numel() for tensor in tensors if tensor.device.type == "meta")
        return output
