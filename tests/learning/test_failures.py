"""Numbers that go wrong: noticed before they reach a sum, and what becomes of the document."""

import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from folders import configuration, save_documents, save_model
from lightning.pytorch import Callback
from models import tiny
from running import finished_static, random_tokens, run, stopped

from dynlight import Overlapping, Records, ResetWeights, TransformerXL, fit
from dynlight.learning.totals import Sums
from dynlight.recording.report.tables import Rows

SGD = partial(torch.optim.SGD, lr=0.05)
DOCUMENTS = [random_tokens(64, seed) for seed in range(3)]


class Poison(Callback):
    """Makes a weight, or the gradients, of one row not finite after a segment of the first document."""

    def __init__(self, what, row=0, segment=1, value=float("nan")):
        self.what, self.row, self.segment, self.value = what, row, segment, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.what == "weights" and self.here(batch):
            self.poison(pl_module.weights.learned[-1].data)

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradients" and self.here(self.batch):
            self.poison(pl_module.weights.learned[-1].grad)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch

    def here(self, batch):
        return batch.cut.index == self.segment and batch.documents[0].index == 0

    def poison(self, tensor):
        place = tensor[self.row] if tensor.ndim > self.ndim else tensor
        place.view(-1)[0] = self.value

    ndim = 1  # of the last weight, a norm


def scored(poison, together=1, documents=DOCUMENTS, **choices):
    records = Records()
    choices = {"update": SGD, "reference": "static"} | choices
    found = run(tiny(), documents, TransformerXL(16, 24), together=together, callbacks=[poison, records], **choices)
    return found, records


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("what", "segment", "rows"), [("weights", 2, 2), ("gradients", 1, 2)])
def test_what_is_not_finite_stops_that_document_before_it_reaches_a_sum(together, value, what, segment, rows):
    whole = run(tiny(), DOCUMENTS, TransformerXL(16, 24), together=together, update=SGD)
    found, records = scored(Poison(what, value=value), together)
    assert stopped(found.module) == {0: segment}
    assert {0: found.module.failures.of_documents[0].reason} == {
        0: f"{'nats' if what == 'weights' else 'gradients'} were not finite"
    }
    assert [len(nats) for nats in found.nats] == [rows, 4, 4]
    for one, other in zip(found.nats[1:], whole.nats[1:], strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))
    assert math.isfinite(found.module.totals.read.nats)
    table = records.documents
    assert table.failed.tolist() == [found.module.failures.of_documents[0].reason, "", ""]
    assert table.failed_segment.tolist()[0] == segment


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("what", ["weights", "gradients"])
def test_the_unlearned_weights_finish_a_document_when_asked(together, what):
    whole = run(tiny(), DOCUMENTS, TransformerXL(16, 24), together=together, update=SGD, reference="static")
    found, records = scored(Poison(what), together, on_failure="static")
    assert stopped(found.module) == {}
    assert finished_static(found.module) == {0: 2}
    for index in range(3):
        learned = 2 if index == 0 else 4  # segments
        assert torch.equal(torch.cat(found.nats[index][:learned]), torch.cat(whole.nats[index][:learned]))
        assert torch.equal(torch.cat(found.static[index]), torch.cat(whole.static[index]))
    assert torch.equal(torch.cat(found.nats[0][2:]), torch.cat(whole.static[0][2:]))
    rows = records.segments.query("document == 0")
    assert rows.learned.tolist() == [True, True, False, False]
    assert rows.updates.tolist() == [1, 1, 0, 0]
    assert rows.flops.tolist()[3] == rows.static_flops.tolist()[3]
    table = records.documents
    assert table.failed.tolist() == ["", "", ""]
    assert table.static_from.tolist()[0] == 2
    assert table.static_from.isna().tolist() == [False, True, True]


def test_nats_that_are_missing_within_a_segment_are_taken_from_the_unlearned_weights_one_by_one():
    # A token whose embedding is not finite spoils what follows it, and nothing before.
    documents = [[5] * 20 + [60] + [7] * 27]

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.model.get_input_embeddings().weight.data[60] = float("nan")

    whole = run(tiny("gpt_neox"), documents, Overlapping(16, 16), update=SGD, reference="static")
    found = run(
        tiny("gpt_neox"), documents, Overlapping(16, 16), [Spoil()], update=SGD, reference="static", on_failure="static"
    )
    assert finished_static(found.module) == {0: 1}
    # Segment 1 scores tokens 16 to 31; token 20 is the last that is read without it.
    torch.testing.assert_close(found.nats[0][1][:5], whole.nats[0][1][:5])
    assert torch.equal(found.nats[0][1][5:], whole.static[0][1][5:])


def test_a_chance_of_nothing_is_no_failure_that_could_be_mended():
    # Nats are infinite, not missing: to take others instead would be to look at the token.

    model = tiny("gpt_neox")
    model.set_output_embeddings(torch.nn.Linear(32, 61))

    class Impossible(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.cut.index == 1:
                pl_module.model.get_output_embeddings().bias.data[batch.targets[0, 3]] = -float("inf")

    found = run(
        model, DOCUMENTS[:1], TransformerXL(16, 24), [Impossible()], update=SGD, reference="static", on_failure="static"
    )
    assert stopped(found.module) == {0: 1}
    assert finished_static(found.module) == {}


@pytest.mark.parametrize("context", [TransformerXL(16, 24), Overlapping(16, 32)], ids=str)
@pytest.mark.parametrize("together", [1, 2, 3])
def test_a_document_that_the_initial_weights_cannot_read_either_has_stopped_for_good(together, context):
    model = tiny("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    unreadable = [*DOCUMENTS[0][:3], 60, *DOCUMENTS[0][4:]]
    documents = [unreadable, *([token % 60 for token in tokens] for tokens in DOCUMENTS[1:])]
    choices = {"together": together, "update": SGD, "reference": "static", "on_failure": "static"}
    result = run(model, documents, context, **choices)
    assert stopped(result.module) == {0: 0}
    assert finished_static(result.module) == {}
    assert [len(nats) for nats in result.nats] == [0, 4, 4]
    assert result.module.totals.read.tokens == 2 * 64


def test_a_gradient_that_is_not_finite_leaves_the_documents_after_it_alone():
    found, _ = scored(Poison("gradients"), reset=ResetWeights("never"))
    assert stopped(found.module) == {0: 1}
    assert [len(nats) for nats in found.nats] == [2, 4, 4]


def test_what_is_learned_last_from_a_document_matters_to_no_sum():
    found, records = scored(Poison("gradients", segment=3))
    assert stopped(found.module) == {}
    assert records.documents.failed.tolist() == ["", "", ""]


def test_without_a_reference_there_is_nothing_to_finish_with():
    with pytest.raises(ValueError, match="on_failure must be stop without a reference, got static; set reference"):
        run(tiny(), DOCUMENTS, TransformerXL(16, 24), update=SGD, on_failure="static")


@pytest.mark.parametrize(("on_failure", "status"), [("stop", 3), ("static", 0)])
def test_the_command_line_says_what_went_wrong(byte_tokenizer, tmp_path, capsys, on_failure, status):
    pattern = save_documents(tmp_path / "documents")
    config = configuration(save_model(tmp_path / "model", byte_tokenizer), pattern, tmp_path / "out")
    config["update"]["init_args"]["lr"] = 1e6
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"on_failure": on_failure}))
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == status
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    failures = summary["failed" if status else "finished_static"]
    assert len(failures) == 2
    assert (summary["documents"], len(summary["failed"])) == ((0, 2) if status else (2, 0))
    lines = [line for line in capsys.readouterr().err.splitlines() if "document " in line]
    for line, failure in zip(lines, failures, strict=True):
        where = f"stopped in segment {failure['segment']}" if status else f"from segment {failure['segment']} on"
        assert line.startswith("error: " if status else "warning: ")
        assert where in line
        assert failure["reason"] in line
    documents = pd.read_csv(tmp_path / "out/documents.csv")
    assert documents.static_from.notna().all() == (status == 0)


# Sums


@pytest.mark.parametrize("size", [pytest.param(7, marks=pytest.mark.slow), 512, 4096, 1_000_000, 10_000_000])
def test_nats_add_up_to_the_same_however_ten_million_tokens_are_cut(tmp_path, size):
    tokens = 10_000_000
    nats = torch.from_numpy(np.random.default_rng(0).exponential(3.0, tokens).astype(np.float32))
    exact = math.fsum(nats.tolist())
    sums = [float(part.sum(dtype=torch.float64)) for part in nats.split(size)]
    total = Sums()
    for part in nats.split(size):
        total.add(Sums(float(part.sum(dtype=torch.float64)), tokens=len(part), bytes=4 * len(part)))
    assert total.nats == pytest.approx(exact, rel=1e-11)
    assert (total.tokens, total.bytes) == (tokens, 4 * tokens)
    segments = pd.DataFrame({"document": 0, "segment": range(len(sums)), "nats": sums})
    segments.to_parquet(tmp_path / "segments.parquet")
    assert Rows(tmp_path / "segments.parquet").sums("nats")[0] == pytest.approx(exact, rel=1e-15)
