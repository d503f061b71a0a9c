"""Series: what loggers draw of a run, scores over tokens and over FLOPs, with a point after every segment."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from dynlight.documents.segments import Segment
from dynlight.learning.finished import Finished
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.score import Score
from dynlight.learning.totals import Sums, sums_of
from dynlight.recording.loggers import Points, define_series
from dynlight.recording.meter import Meter
from dynlight.recording.names import AXES, COST, COSTS, COSTS_OF_TEACHER, OF_TEACHER, SERIES, WEIGHT
from dynlight.recording.report.ratios import bits_per_byte, nats_per_token, word_perplexity


class FlopsLogger(Meter):
    """Logs scores beside the tokens read and the FLOPs spent, after every segment, to every logger of the Trainer.

    Ratios run over all that was read so far, those of `segment_…` over the segment alone, and word perplexity over the
    documents that were read to their end, as words are counted in whole documents. The nats of a document that failed are
    taken out again; its FLOPs and seconds stay. On W&B each series is drawn twice without a setting: `by_flops/…` over FLOPs,
    `by_tokens/…` over tokens. Of a mixture the weight of each expert is logged too, `weight/…`.

    Of several processes the first logs. Sums are those of all processes, at most a second old, and exact at the end;
    `segment_…` and `weight/…` are those of the first alone.

    Args:
        folder: the run's, in which points are kept until the run has ended; None: they aren't kept.
        resumes: whether the run goes on where it was cut short.
    """

    def __init__(self, folder: Path | None = None, resumes: bool = False) -> None:
        self._file = None if folder is None else folder / "rows/points.jsonl"
        self._resumes = resumes

    def begin(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        self._axes: dict[str, float] = dict.fromkeys(AXES, 0)
        self._costs: dict[str, float] = {**COSTS}
        if module.teacher_model is not None:
            self._costs |= COSTS_OF_TEACHER
        self._board = module.processes.board
        self._has_loggers = bool(trainer.loggers)
        self._points = Points(trainer.loggers if module.processes.is_first else [], self._file, self._resumes)
        series = SERIES if module.teacher_model is None else SERIES + OF_TEACHER
        define_series(trainer.loggers, self._axes, series, [*(COST + name for name in self._costs), f"{WEIGHT}*"])

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        score = module.score
        if not self._has_loggers or score is None:
            return
        for row in score.rows:
            flops = module.flop_counter.count(score, row)
            self._axes["tokens"] += segment.tokens[row]
            self._axes["flops"] += flops.total
            self._costs["update_flops"] += flops.update
            self._costs["static_flops"] += flops.static
            if module.teacher_model is not None:
                self._costs["teacher_flops"] += module.teacher_flop_counter.forward(segment.cut)
        for kind, seconds in score.seconds.items():
            self._costs[f"{kind}_seconds"] += seconds
        last = Sums()
        for sums in sums_of(score):
            last.add(sums)
        self._log(module, last, _expert_weights(score, module))

    def end(self, trainer: Trainer, module: DynamicEvaluation) -> None:
        if self._has_loggers and self._board.ranks > 1:
            self._of_all(module, at_once=True)
            self._board.wait("last series")
            self._log(module, Sums(), {}, at_once=True)
        self._points.end()

    def state_dict(self) -> dict[str, Any]:
        """Axes and costs so far, and how many points were logged."""
        return {"axes": self._axes.copy(), "costs": self._costs.copy(), "points": self._points.sync()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._axes, self._costs = state_dict["axes"], state_dict["costs"]
        self._points.go_on(state_dict["points"])

    def recount(self, finished: Sequence[Finished]) -> None:
        for rows in (earlier.rows for earlier in finished):
            self._axes["tokens"] += int(rows.tokens.sum())
            self._axes["flops"] += rows.flops.sum(skipna=False).item()
            for name in self._costs:
                self._costs[name] += rows[name].sum(skipna=False).item()
        self._points.go_on(tokens=self._axes["tokens"])

    def _of_all(
        self, module: DynamicEvaluation, at_once: bool = False
    ) -> tuple[dict[str, float], dict[str, float], Sums, Sums]:
        """Of all processes together: axes, costs, the sums over what was read, and those over whole documents."""
        groups = (self._axes, self._costs, vars(module.totals.read), vars(module.totals.whole))
        numbers = iter(self._board.total("series", [value for group in groups for value in group.values()], at_once))
        axes, costs, read, whole = ({name: next(numbers) for name in group} for group in groups)
        return axes, costs, Sums(**read), Sums(**whole)  # type: ignore[arg-type]

    def _log(self, module: DynamicEvaluation, last: Sums, weights: dict[str, float], at_once: bool = False) -> None:
        axes, costs, read, whole = self._of_all(module, at_once)
        series = _series(read, whole, last, module.reference is not None, module.teacher_model is not None)
        axes, costs = _known(axes), _known(costs)
        self._points.add({"axes": axes, "series": series, "costs": costs, "weights": weights})


def _series(read: Sums, whole: Sums, last: Sums, has_static: bool, has_teacher: bool) -> dict[str, float]:
    """The ratios of what was read, of whole documents, and of the last segment if there is one."""
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
    if has_teacher:
        ratios = bits_per_byte(read.teacher_nats, read.bytes), nats_per_token(read.teacher_nats, read.tokens)
        series |= dict(zip(OF_TEACHER, ratios, strict=True))
    return {name: value for name, value in series.items() if value is not None}


def _known(numbers: dict[str, float]) -> dict[str, float]:
    """Those that are numbers: FLOPs are NaN where they could not be counted."""
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def _expert_weights(score: Score, module: DynamicEvaluation) -> dict[str, float]:
    """The mean weight of each expert of a mixture over a segment and its documents."""
    if score.experts is None:
        return {}
    weights = score.experts.weights[:, score.rows].mean(axis=1).tolist()
    return {WEIGHT + expert.name: weight for expert, weight in zip(module.experts, weights, strict=True)}
