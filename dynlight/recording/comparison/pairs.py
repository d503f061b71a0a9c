"""A run beside the baseline: which documents both have read, by how much it is better, and what can't be compared."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dynlight.recording.comparison.runs import Run, Scores, scores_of
from dynlight.recording.comparison.settings import differing
from dynlight.recording.report.rates import paired_margin
from dynlight.recording.report.ratios import ratio
from dynlight.recording.report.text import number

SAME_STATIC = 1e-4  # relative: to which a model's static scores agree, however its documents were read together


@dataclass
class Pair:
    """A run beside the baseline.

    `margin`, `low` and `high` are the baseline's bits per byte − the run's over `documents`, and the ends of its 95%
    interval (`rates.paired_margin`): positive where the run is better; None where there is nothing to compare, the ends
    with a single document, too.
    """

    run: Run
    baseline: Run
    documents: list[str] = field(
        default_factory=list
    )  # read whole by both, with the same bytes, in the baseline's order
    margin: float | None = None
    low: float | None = None
    high: float | None = None
    has_same_tokens: bool = True  # so that positions in tokens mean the same
    notes: list[str] = field(default_factory=list)  # what can't be compared, in words

    @property
    def is_drawn(self) -> bool:
        """Whether its sums may stand beside the baseline's: over all documents that the baseline read."""
        return len(self.documents) == len(self.baseline.documents) > 0

    def scores(self, run: Run) -> Scores:
        """What the documents that are compared come to, in the run or in the baseline."""
        return run.scores if len(self.documents) == len(run.documents) else scores_of(self.table(run))

    def table(self, run: Run) -> pd.DataFrame:
        """The documents that are compared, of the run or of the baseline, in the baseline's order."""
        is_as_it_is = run.documents.index.tolist() == self.documents  # to choose from it would take longer
        return run.documents if is_as_it_is else run.documents.loc[self.documents]

    @property
    def has_same_clock(self) -> bool:
        """Whether seconds mean the same: on the same kind of device, and as many."""
        clocks = [(each.settings.get("device"), each.settings.get("processes")) for each in (self.run, self.baseline)]
        return not any(None not in both and both[0] != both[1] for both in zip(*clocks, strict=True))


def pair(run: Run, baseline: Run) -> Pair:
    """Compare a run with the baseline, document by document."""
    made = Pair(run, baseline)
    made.notes += _notes_of_one(run)
    if run is baseline:
        made.documents = baseline.documents.index.tolist()
        return made
    made.documents = _common(run, baseline, made.notes)
    own, theirs = made.table(run), made.table(baseline)
    size = own.bytes.to_numpy()
    bits = ((theirs.nats - own.nats) / math.log(2)).to_numpy()[size > 0]  # an empty document says nothing
    if len(bits):
        made.margin, made.low, made.high = paired_margin(bits, size[size > 0])
    if len(bits) == 1:
        made.notes.append("one document can be compared: its margin has no interval")
    made.has_same_tokens = np.array_equal(own.tokens, theirs.tokens) and not _differ(run, baseline, "tokenizer")
    made.notes += _notes_of_two(made)
    return made


def _common(run: Run, baseline: Run, notes: list[str]) -> list[str]:
    """The names of the documents that can be compared; what is said of others goes to the notes."""
    own, theirs = run.documents, baseline.documents
    both = [name for name in theirs.index if name in own.index]
    size = dict(zip(own.index, own.bytes, strict=True)), dict(zip(theirs.index, theirs.bytes, strict=True))
    cut = [name for name in both if size[0][name] != size[1][name]]
    if cut:
        whose = (
            "as data.max_tokens differs"
            if "data.max_tokens" in _between(run, baseline)
            else "their bytes are not the same"
        )
        notes.append(f"{_documents(len(cut))} cut differently, {whose}: not compared")
    files = run.receipt["files"], baseline.receipt["files"]
    changed = [name for name in both if name in files[0] and name in files[1] and files[0][name] != files[1][name]]
    if changed:
        notes.append(f"{_documents(len(changed))} other text under the same name: not compared")
    # Of texts that are no files a receipt has one hash over all of them, their tokens included.
    hashed = all(name in files[0] and name in files[1] for name in both)
    listed = [[(entry["name"], entry["bytes"]) for entry in each.described["documents"]] for each in (run, baseline)]
    if (
        not hashed
        and listed[0] == listed[1]
        and not _differ(run, baseline, "tokenizer")
        and _differ(run, baseline, "data")
    ):
        notes.append("the texts are not the baseline's, though names and bytes are (receipt.json): not compared")
        return []
    left = {*cut, *changed}
    return [name for name in both if name not in left]


def _notes_of_one(run: Run) -> Iterator[str]:
    if run.failed:
        yield f"{run.failed:,} of {run.failed + len(run.documents):,} documents failed and {_are(run.failed)} in no sum"
    if len(run.documents) and not run.has_static:
        yield "no static reference: it has no gain, and no static point"
    if len(run.documents) and run.documents.flops.isna().any():
        yield "FLOPs could not be counted: not drawn against them"
    if finished := sum(bool(entry.get("finished_static")) for entry in run.described["documents"]):
        yield f"{_documents(finished)} read to the end by the initial weights, as the learned ones had failed"
    if "teacher_flops" in run.documents:
        yield "FLOPs and seconds are with those of the teacher"


def _notes_of_two(made: Pair) -> Iterator[str]:
    run, baseline, count = made.run, made.baseline, len(made.documents)
    if not count:
        yield "no document can be compared: there is no margin, and no picture shows the run"
    elif not made.is_drawn:
        yield (
            f"{count:,} of the baseline's {len(baseline.documents):,} documents can be compared: the margin is over "
            "these alone, and no picture shows the run"
        )
    if count and (more := len(run.documents) - count):
        yield f"{_documents(more)} in its sums of the table, but neither in the margin nor in a picture"
    if _differ_in_weights(run, baseline) and not any(name.startswith("model.") for name in _between(run, baseline)):
        yield "other weights of the model, though its settings are the same (receipt.json)"
    if made.documents and not made.has_same_tokens:
        yield "another tokenizer: compared in bits per byte alone, and not drawn by tokens"
    order = [name for name in run.documents.index if name in set(made.documents)]
    if order != made.documents and "never" in (run.settings.get("reset.every"), baseline.settings.get("reset.every")):
        yield "the documents were read in another order, which matters as reset.every is never"
    if not made.has_same_clock:
        yield "seconds are of another device, or of more processes: not drawn against them"
    if (other := _other_static(made)) is not None:
        yield other


def _other_static(made: Pair) -> str | None:
    """Says that a model's static score is not the baseline's over the same documents, though the model is."""
    run, baseline = made.run, made.baseline
    if not made.documents or not run.has_static or not baseline.has_static or run.hash("model") is None:
        return None
    own, theirs = (made.scores(each).static for each in (run, baseline))
    if _differ_in_weights(run, baseline) or baseline.hash("model") is None or own is None or theirs is None:
        return None
    if abs(ratio(own - theirs, theirs) or 0.0) <= SAME_STATIC:
        return None
    causes = [name for name in _between(run, baseline) if name.startswith(("context", "model."))]
    because = f", as {', '.join(causes)} differ{'s' if len(causes) == 1 else ''}" if causes else ""
    return (
        f"another static score of the same model, {number(own)} where the baseline has {number(theirs)}{because}: "
        "gains are over different references"
    )


def _differ(run: Run, baseline: Run, what: str) -> bool:
    """Whether receipts of both tell a hash, and not the same one."""
    own, theirs = run.hash(what), baseline.hash(what)
    return None not in (own, theirs) and own != theirs


def _differ_in_weights(run: Run, baseline: Run) -> bool:
    """Whether receipts tell other weights of the model; where other parameters learn they may, as adapters are among them."""
    return _differ(run, baseline, "model") and not any(
        name.startswith("parameters") for name in _between(run, baseline)
    )


def _between(run: Run, baseline: Run) -> list[str]:
    return differing([run.settings, baseline.settings])


def _documents(count: int) -> str:
    return "1 document is" if count == 1 else f"{count:,} documents are"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
