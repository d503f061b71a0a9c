"""`data.together: auto`: what is measured, what follows from it, and what a run says of it."""

import json
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_byte_tokenizer
from folders import configuration, save_documents, save_model
from models import tiny
from running import TRAINER, document, random_tokens

from dynlight import DocumentStream, DynamicEvaluation, TransformerXL, fit
from dynlight.running import together
from dynlight.running.run import Run
from dynlight.running.together import Choice, Trial, choose, extrapolate, largest_that_fits

MB = 10**6


@pytest.mark.parametrize(
    ("two", "four", "free", "at_most", "expected"),
    [
        (30 * MB, 50 * MB, 100 * MB, 100, "together 8: each takes 10.0 MB beside 10.0 MB for all, of 100 MB free"),
        (30 * MB, 50 * MB, 30 * MB, 100, "together 1: each takes 10.0 MB beside 10.0 MB for all, of 30.0 MB free"),
        (
            30 * MB,
            50 * MB,
            100 * MB,
            3,
            "together 3: each takes 10.0 MB beside 10.0 MB for all, of 100 MB free, and there are 3 to read",
        ),
        (30 * MB, 50 * MB, 0, 100, "together 1: each takes 10.0 MB beside 10.0 MB for all, of 0 B free"),
    ],
)
def test_the_number_follows_from_two_peaks(two, four, free, at_most, expected):
    assert str(extrapolate(two, four, free, at_most)) == expected


class Room:
    """A trial on a device with room for so many documents."""

    def __init__(self, room):
        self.room = room

    def free(self):
        return 100 * MB

    def __call__(self, count):
        if count > self.room:
            raise torch.OutOfMemoryError
        return count * MB


@pytest.mark.parametrize(("room", "expected"), [(1, 1), (2, 2), (3, 2), (4, 90)])
def test_where_a_trial_does_not_fit_fewer_are_chosen(room, expected):
    assert choose(lambda: Room(room), at_most=1000).together == expected


@pytest.mark.parametrize(("room", "at_most", "expected"), [(0, 8, 0), (1, 8, 1), (7, 100, 4), (100, 9, 8), (9, 0, 0)])
def test_the_largest_that_fits_is_tried(room, at_most, expected):
    assert largest_that_fits(Room(room), at_most) == expected


def test_one_document_needs_no_trial():
    assert choose(lambda: pytest.fail("a trial"), at_most=1) == Choice(1, "there is one document to read at a time")


def test_memory_grows_by_as_much_with_each_document(monkeypatch):
    # In a fresh process, as what other tests have left to this one would be used again; and with blocks that go back to
    # the system, as those of large models do: the allocator keeps small ones as it sees fit.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        two, four, eight, weights = pool.apply(peaks)
    assert (four - two) / 2 > 3 * weights, "weights, and two moments each"
    assert eight == pytest.approx(four + 2 * (four - two), rel=0.25)


def peaks():
    """Peaks of two, four and eight documents, and the weights of one, in bytes."""
    folder = Path(tempfile.mkdtemp())
    save_documents(folder / "documents")
    save_model(folder / "model", make_byte_tokenizer(), rows=20_000)
    run = Run.of([
        *("--model.pretrained", f"{folder}/model", "--data.path=text", "--data.data_files", f"{folder}/documents/*.txt"),
        *("--context=TransformerXL", "--context.segment=64", "--context.memory=64", "--schedule.every=4"),
        *("--reference=null", "--update=AdamW", "--update.lr=1e-3", "--trainer.accelerator=cpu"),
    ])  # fmt: skip
    trial = Trial(run, torch.device("cpu"))
    assert trial.free() > 0
    weights = 4 * sum(weight.numel() for weight in run.choices.model.load().parameters())
    return trial(2), trial(4), trial(8), weights


@pytest.fixture
def run(tmp_path, byte_tokenizer, monkeypatch, capsys):
    save_documents(tmp_path / "documents")
    (tmp_path / "documents/c.txt").write_text("It was another day. " * 9)
    save_model(tmp_path / "model", byte_tokenizer)

    def run(name, count, **changes):
        config = configuration(tmp_path / "model", f"{tmp_path}/documents/*.txt", tmp_path / name) | changes
        config["data"]["together"] = count
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        status = fit.main(["--config", str(tmp_path / "run.yaml")])
        return status, capsys.readouterr()

    return run


def test_auto_is_the_run_with_the_number_that_it_chose(run, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "extrapolate", lambda two, four, free, at_most: Choice(2, f"of {at_most}"))
    lora = {"class_path": "LoRA", "init_args": {"rank": 2}}  # whose first weights are random
    status, output = run("auto", "auto", parameters=lora)
    assert status == 0
    assert output.out.splitlines()[0] == "together 2: of 3"
    run("two", 2, parameters=lora)
    for file in ("segments.parquet", "tokens.parquet", "documents.csv"):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert yaml.safe_load((tmp_path / "auto/config.yaml").read_text())["data"]["together"] == 2
    assert json.loads((tmp_path / "auto/run.json").read_text())["together"] == 2


def test_documents_that_cannot_adapt_together_go_one_at_a_time(run):
    status, output = run("auto", "auto", reset={"every": "never"})
    assert status == 0
    assert output.out.splitlines()[0] == "together 1: there is one document to read at a time"
    documents = [document(random_tokens(9, i), i) for i in range(5)]
    for rule, expected in (("SGD", 3), ("Adafactor", 1)):
        update = partial(getattr(torch.optim, rule), lr=0.01)
        module = DynamicEvaluation(tiny(), None, context=TransformerXL(16, 16), update=update)
        assert together.most_to_read(documents, 2, module) == expected


def test_measured_on_this_machine_it_takes_what_there_is_to_read(run):
    status, output = run("auto", "auto")
    assert status == 0
    assert output.out.splitlines()[0].startswith("together 3: each takes ")
    assert "and there are 3 to read" in output.out.splitlines()[0]


def test_where_memory_runs_out_the_largest_number_that_fitted_is_told(run, monkeypatch):
    whole = DynamicEvaluation.training_step

    def step(self, segment, batch_idx):
        if len(segment.documents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, segment, batch_idx)

    monkeypatch.setattr(DynamicEvaluation, "training_step", step)
    status, output = run("full", 3)
    assert status == 2
    assert output.err.splitlines()[-1] == (
        "error: data.together must be as many documents as fit into memory, got 3; the largest that fitted was 2"
    )


def test_outside_of_fit_it_is_refused():
    from lightning.pytorch import Trainer

    stream = DocumentStream.of([document(random_tokens(5, 0))], together="auto")
    module = DynamicEvaluation(tiny(), None, context=TransformerXL(16, 16))
    with pytest.raises(ValueError, match="data.together must be a number outside of dynlight.fit"):
        Trainer(**TRAINER).fit(module, stream)
