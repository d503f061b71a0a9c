"""`ddp`: all processes learn one set of weights in step, from whole gradients and from compressed ones."""

import json
from itertools import zip_longest

import pandas as pd
import pytest
import torch
from folders import configuration, save_model, save_sentences
from processes import run_all

from dynlight import DocumentStream, Pretrained, TransformerXL
from dynlight.choices.schedule import due
from dynlight.documents.waves import deal, segments
from dynlight.learning.forward import read, token_nats
from dynlight.learning.weights import InPlace
from dynlight.recording.ledger import faults_of

TEXTS = {"a": 22, "b": 5, "c": 13, "d": 0, "e": 1}  # sentences in each file: one process has more to read by far
EVERY = {0: 1, 3: 2}
HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    root = tmp_path_factory.mktemp("library")
    save_model(root / "model", byte_tokenizer)
    save_sentences(root / "documents", TEXTS)
    return root


def hook(path, state=None):
    settings = {"bucket_cap_mb": 1000, "ddp_comm_hook": path} | ({"ddp_comm_state": state} if state else {})
    return {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": settings}


POWER = {"class_path": "dynlight.PowerSGD", "init_args": {"rank": 4}}
FEW = {"class_path": "dynlight.CompressedGradients", "init_args": {"share": 0.05}}
TWO_BITS = {"class_path": "dynlight.CompressedGradients", "init_args": {"bits": 2}}
STRATEGIES = {
    "ddp": "ddp",
    "whole": hook(f"{HOOKS}.default_hooks.allreduce_hook"),
    "bf16": hook("meddling.bf16_hook"),
    "power_sgd": hook(f"{HOOKS}.powerSGD_hook.powerSGD_hook", POWER),
    "few": hook("dynlight.compressed_hook", FEW),
    "two_bits": hook("dynlight.compressed_hook", TWO_BITS),
    "failing": "ddp",
}


@pytest.fixture(scope="module")
def runs(library, tmp_path_factory):
    """The folder of a run in two processes with each strategy, and exit statuses by process."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {}
    for name, strategy in STRATEGIES.items():
        config = configuration(library / "model", f"{library}/documents/*.txt", folder / name)
        count = {"class_path": "meddling.CountBytes", "init_args": {"file": str(folder / f"{name}.bytes")}}
        trainer = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "callbacks": [count]}
        configs[name] = config | {"trainer": trainer, "schedule": {"every": EVERY}, "reset": {"every": "never"}}
        configs[name]["clip"] = 0.5
    configs["failing"]["update"]["init_args"]["lr"] = 1e6
    configs["failing"]["clip"] = None
    return folder, run_all(folder, 2, configs)


def in_lockstep(library):
    """Nats of each document and segment, by a plain loop over both processes' segments with one set of weights."""
    pretrained = Pretrained(str(library / "model"))
    model, context = pretrained.load(), TransformerXL(segment=16, memory=32)
    weights = InPlace(model, context)
    optimizer = torch.optim.SGD(weights.learned, lr=0.05)
    documents = DocumentStream("text", data_files=f"{library}/documents/*.txt").load(pretrained.load_tokenizer())
    shares = deal(documents, 2)
    streams = [[each for document in share for each in segments((document,), context)] for share in shares if share]
    found, memories = {}, [None, None]
    for together in zip_longest(*streams):
        gradients = []
        for rank, segment in enumerate(together):
            if segment is None:
                continue
            memory = None if segment.is_first else memories[rank]
            logits, memories[rank] = read(model, segment, memory, context)
            nats = token_nats(logits, segment.targets)
            found[segment.documents[0].index, segment.cut.index] = float(nats.detach().double().sum())
            if due(segment.cut.index, EVERY):
                gradients.append(torch.autograd.grad(nats.mean(), weights.learned))
        if gradients:
            for weight, *each in zip(weights.learned, *gradients, strict=True):
                weight.grad = sum(each) / len(gradients)
            torch.nn.utils.clip_grad_norm_(weights.learned, 0.5)
            optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "whole"])
def test_processes_learn_one_set_of_weights_in_step(library, runs, name):
    folder, statuses = runs
    assert [each[name] for each in statuses] == [0, 0]
    table = pd.read_parquet(folder / name / "segments.parquet").set_index(["document", "segment"])
    expected = pd.Series(in_lockstep(library))
    assert list(table.index) == sorted(expected.index)
    assert table.nats.tolist() == pytest.approx(expected.sort_index().tolist(), rel=1e-5)
    assert table.nats.sum() < 0.99 * table.static_nats.sum(), "what is learned must matter"


@pytest.mark.slow
def test_the_receipt_follows_what_another_process_learned(runs):
    folder, _ = runs
    receipt = json.loads((folder / "ddp/receipt.json").read_text())
    assert faults_of(receipt) == []
    assert len(receipt["ledger"]) == len(pd.read_parquet(folder / "ddp/segments.parquet"))


@pytest.mark.slow
def test_compressed_gradients_send_less_and_learn_nearly_as_much(runs, record_property):
    folder, statuses = runs
    sent, nats = {}, {}
    for name in ("whole", "bf16", "power_sgd", "few", "two_bits"):
        assert [each[name] for each in statuses] == [0, 0]
        sent[name] = int((folder / f"{name}.bytes").read_text())
        summary = json.loads((folder / name / "summary.json").read_text())
        nats[name], static = summary["nats_per_token"], summary["static"]["nats_per_token"]
        record_property(name, f"{sent[name]:,} bytes, {nats[name]:.4f} nats per token (static {static:.4f})")
        print(name, f"{sent[name]:,} bytes, {nats[name]:.4f} nats per token (static {static:.4f})")
    assert sent["bf16"] * 2 == sent["whole"] > 1_000_000
    assert sent["power_sgd"] < 0.5 * sent["whole"]
    for name, share in (("few", 0.1), ("two_bits", 1 / 16)):
        counted = json.loads((folder / name / "run.json").read_text())["gradient_bytes"]
        assert counted["whole"] == sent["whole"]
        assert counted["sent"] == pytest.approx(share * counted["whole"], rel=0.01)
    for name, kept in (("bf16", 0.8), ("power_sgd", 0.8), ("few", 0.9), ("two_bits", 0.4)):
        assert nats[name] != nats["whole"]
        assert static - nats[name] > kept * (static - nats["whole"])


@pytest.mark.slow
def test_documents_that_fail_stop_nobody(runs):
    folder, statuses = runs
    assert [each["failing"] for each in statuses] == [3, 0]
    summary = json.loads((folder / "failing/summary.json").read_text())
    assert len(summary["failed"]) >= 2
