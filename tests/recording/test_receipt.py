"""The receipt of a run: its ledger, what a fault in it looks like, and playing it again."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from models import tiny
from running import random_tokens, run

from dynlight import All, LoRA, Overlapping, ResetWeights, TransformerXL
from dynlight.learning.digests import sums_of_bits
from dynlight.recording.hashes import hash_of_weights
from dynlight.recording.ledger import faults_of, first_link, link
from dynlight.recording.receipt import Receipt

LEARN = {"update": partial(torch.optim.SGD, lr=0.05)}
DOCUMENTS = [random_tokens(length, length) for length in (40, 17, 33)]


def ledger_of(together=1, callbacks=(), context=None, folder=None, **choices):
    receipt = Receipt(folder)
    found = run(
        tiny(),
        DOCUMENTS,
        context or TransformerXL(16, 24),
        [receipt, *callbacks],
        together,
        digests=True,
        **(LEARN | choices),
    )
    return receipt, found


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("parameters", [All(), LoRA(rank=2)], ids=str)
def test_the_ledger_has_a_row_for_each_commit(together, parameters):
    receipt, found = ledger_of(together, parameters=parameters)
    rows = {(row[0], row[1]): row for row in receipt.contents["ledger"]}
    assert len(rows) == 3 + 2 + 3 == len(receipt.contents["ledger"])
    for document, segments in enumerate(found.nats):
        for segment, nats in enumerate(segments):
            row = rows[document, segment]
            assert row[2:4] == [len(nats), pytest.approx(float(nats.double().sum()), rel=1e-12)]
            assert row[4] != row[5]  # it was learned from
            if segment:
                assert row[4] == rows[document, segment - 1][5]
            else:
                assert row[4] == rows[0, 0][4]
    assert faults_of(receipt.contents) == []


def test_nothing_learned_leaves_the_digest():
    receipt, _ = ledger_of(update=None)
    assert all(row[4] == row[5] for row in receipt.contents["ledger"])


@pytest.mark.parametrize("column", range(7))
def test_a_changed_row_breaks_the_chain(column):
    receipt, _ = ledger_of()
    row = receipt.contents["ledger"][4]
    row[column] = row[column] + (1 if column < 4 else "0")
    assert "row 4 of the ledger was changed" in faults_of(receipt.contents)


@pytest.mark.parametrize("key", ["tokens", "hashes"])
def test_what_the_run_was_made_of_is_in_the_chain(key):
    receipt, _ = ledger_of()
    receipt.contents[key] = 91 if key == "tokens" else receipt.contents[key] | {"model": "other"}
    assert "row 0 of the ledger was changed" in faults_of(receipt.contents)


class Meddle(Callback):
    """Changes one weight by the least there is, between two segments."""

    def __init__(self, place):
        self.place = place

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (batch.documents[0].index, batch.cut.index) == self.place:
            weight = pl_module.weights.learned[3]
            with torch.no_grad():
                weight.view(-1)[5:6].copy_(torch.nextafter(weight.view(-1)[5:6], torch.tensor(9.0)))


def test_learning_between_two_commits_shows():
    receipt, _ = ledger_of(callbacks=[Meddle((2, 1))])
    assert faults_of(receipt.contents) == ["weights of document 2 changed before segment 1 was scored"]


def test_a_missing_reset_shows():
    receipt, _ = ledger_of(reset=ResetWeights("never"))
    assert faults_of(receipt.contents) == []
    rows = [row[:6] for row in receipt.contents["ledger"]]
    claimed = receipt.contents | {"reset": "document", "ledger": []}
    before = first_link(claimed)
    for row in rows:
        before = link(before, row)
        claimed["ledger"].append([*row, before])
    assert faults_of(claimed) == [
        "document 1 began with weights that had learned",
        "document 2 began with weights that had learned",
    ]


@pytest.mark.parametrize("shape", [(1, 7), (3, 8), (4, 5), (2, 1)])
def test_the_digest_sees_every_bit(shape):
    weight = torch.randn(shape)
    before = sums_of_bits(weight)
    for row in range(shape[0]):
        for column in range(shape[1]):
            changed = weight.clone()
            changed[row, column] = torch.nextafter(changed[row, column], torch.tensor(torch.inf))
            differs = sums_of_bits(changed) != before
            assert differs.tolist() == [other == row for other in range(shape[0])]


def test_the_hash_of_weights_sees_names_types_and_values():
    weights = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [{"a": torch.zeros(4), "c": torch.ones(2)}, {"a": torch.zeros(4), "b": torch.ones(2).half()},
              {"a": torch.zeros(2, 2), "b": torch.ones(2)}, {"a": torch.zeros(4), "b": torch.tensor([1, 1 + 1e-7])}]  # fmt: skip
    assert len({hash_of_weights(each) for each in [weights, *others]}) == 5
    assert hash_of_weights(weights) == hash_of_weights(dict(reversed(weights.items())))


def test_the_receipt_on_disk_is_the_one_in_memory(tmp_path):
    receipt, _ = ledger_of(folder=tmp_path, context=Overlapping(16, 40))
    read = json.loads((tmp_path / "receipt.json").read_text())
    assert read == json.loads(json.dumps(receipt.contents))
    assert faults_of(read) == []
