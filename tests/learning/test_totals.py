"""The running sums of a process: what stays of a document that failed, and of one that was read before."""

import copy
from functools import partial

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from models import tiny
from running import document, random_tokens, run

from dynlight import Records, TransformerXL
from dynlight.learning.finished import Failure, Finished
from dynlight.learning.totals import Sums, Totals

LENGTHS = (64, 70, 0, 15, 64)
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
SGD = partial(torch.optim.SGD, lr=0.05)


class Poison(Callback):
    """Makes a weight of the first document of a wave NaN after a segment."""

    def __init__(self, document, segment):
        self.place = (document, segment)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch.documents[0].index, batch.cut.index) == self.place:
            weight = pl_module.weights.learned[-1].data
            weight.view(-1)[0] = float("nan")


class Keep(Callback):
    """Keeps the totals as they were after each segment."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(copy.deepcopy(pl_module.totals.progress_state()))


def read(together=1, callbacks=(), **choices):
    records, keep = Records(), Keep()
    choices = {"update": SGD, "reference": "static"} | choices
    done = run(tiny(), DOCUMENTS, TransformerXL(16, 24), [*callbacks, records, keep], together, **choices)
    return done.module, records, keep


def sums_of(segments, indices, words=True):
    rows = segments[segments.document.isin(indices)]
    tokens, counts = int(rows.tokens.sum()), len([index for index in indices if LENGTHS[index]])  # one word each
    sums = Sums(rows.nats.sum(), rows.static_nats.sum(), tokens, int(rows.bytes.sum()), counts if words else 0)
    return pytest.approx(vars(sums))


@pytest.mark.parametrize("together", [1, 3])
def test_a_document_that_stops_is_in_no_sum(together):
    whole, records, _ = read(together)
    everyone = range(len(LENGTHS))
    assert vars(whole.totals.read) == sums_of(records.segments, everyone, words=False)
    assert vars(whole.totals.whole) == sums_of(records.segments, everyone)
    # Of several together document 1, the longest, is the first of its wave.
    failing, records, _ = read(together, [Poison(1, 1)])
    assert list(failing.failures.of_documents) == [1]
    assert len(records.segments.query("document == 1")) == 2, "it was read for a while"
    others = [index for index in everyone if index != 1]
    assert vars(failing.totals.read) == sums_of(records.segments, others, words=False)
    assert vars(failing.totals.whole) == sums_of(records.segments, others)


def test_a_document_that_the_initial_weights_finish_is_in_every_sum():
    module, records, _ = read(callbacks=[Poison(1, 1)], on_failure="static")
    assert not module.failures.of_documents[1].stopped
    assert vars(module.totals.read) == sums_of(records.segments, range(len(LENGTHS)), words=False)
    assert vars(module.totals.whole) == sums_of(records.segments, range(len(LENGTHS)))


@pytest.mark.parametrize("together", [1, 3])
def test_what_was_put_back_goes_on_as_it_would_have(together):
    module, _, keep = read(together, [Poison(1, 2)])
    for state in keep.states:
        totals = Totals()
        totals.load_progress_state(copy.deepcopy(state))
        assert totals.progress_state() == state
    assert keep.states[-1] == module.totals.progress_state()
    assert keep.states[-1]["running"] == {}, "none is being read"
    assert max(len(state["running"]) for state in keep.states) == together


def test_documents_that_were_read_before_count_as_in_one_go():
    module, records, _ = read(callbacks=[Poison(1, 1)])
    segments, failures = records.segments, module.failures.of_documents
    finished = [
        Finished(document(tokens, index), failures.get(index), segments[segments.document == index])
        for index, tokens in enumerate(DOCUMENTS)
    ]
    totals = Totals()
    totals.recount(finished)
    for mine, expected in ((totals.read, module.totals.read), (totals.whole, module.totals.whole)):
        assert vars(mine) | {"words": 0} == pytest.approx(vars(expected) | {"words": 0})
    assert totals.whole.words == module.totals.whole.words


def test_without_a_reference_there_are_no_static_nats():
    module, records, _ = read(reference=None)
    assert module.totals.read.static_nats == 0.0
    rows = records.segments
    totals = Totals()
    failure = Failure(1, "nats were not finite", stopped=True)
    totals.recount([Finished(document(DOCUMENTS[0]), None, rows.query("document == 0"))])
    totals.recount([Finished(document(DOCUMENTS[1], 1), failure, rows.query("document == 1"))])
    assert isinstance(rows, pd.DataFrame)
    assert (totals.read.static_nats, totals.read.tokens) == (0.0, LENGTHS[0])
