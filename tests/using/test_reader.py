"""A text that goes on is read as dynlight.fit would read the whole of it."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from models import tiny
from running import random_tokens, run

from dynlight import (
    All,
    Clip,
    Compressed,
    LoRA,
    Matching,
    Mixture,
    NGrams,
    Overlapping,
    Pruned,
    Reader,
    Replayed,
    ResetWeights,
    SettingError,
    TransformerXL,
    UpdateFrequency,
)

TOKENS = random_tokens(75, 3)
CUTS = [(0, 16), (16, 48), (48, 64), (64, 75)]  # of segments of 16
SGD, ADAM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.01)
CHOICES = {
    "all weights": {"context": TransformerXL(16, 24), "parameters": All(), "update": SGD},
    "adapters, in windows": {"context": Overlapping(16, 40), "parameters": LoRA(rank=2), "update": ADAM},
    "static": {"context": TransformerXL(16, 24), "update": None},
    "sinks, refresh": {
        "context": TransformerXL(16, 32, sinks=2, refresh=2),
        "parameters": LoRA(rank=2),
        "update": ADAM,
    },
    "rates": {
        "context": TransformerXL(16, 24),
        "parameters": LoRA(rank=2),
        "update": torch.optim.AdamW,
        "rates": [0.01, 0.1],
    },
    "mixture of its own": {
        "context": TransformerXL(16, 24),
        "mixture": Mixture(),
        "memories": [NGrams(4, 3.0)],
        "update": SGD,
    },
    "schedule, errors": {
        "context": TransformerXL(16, 24),
        "update": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "schedule": UpdateFrequency({0: 1, 2: 2}, passes=2),
        "gradient": [Clip(1.0), Compressed(share=0.2)],
        "reset": ResetWeights("never"),
    },
    "above the mean": {"context": TransformerXL(16, 24), "update": ADAM, "schedule": UpdateFrequency(above_mean=0.99)},
    "replayed": {"context": TransformerXL(16, 24), "update": SGD, "objective": Replayed(2)},
    "pruned": {"context": TransformerXL(16, 24), "update": ADAM, "parameters": Pruned(LoRA(rank=4), 0.3, 2)},
}


class Letters:
    """A tokenizer of single characters: chr(32 + i) is token i."""

    bos_token_id, eos_token_id, is_fast = 0, 0, False

    def __call__(self, text, **settings):
        return {"input_ids": [ord(letter) - 32 for letter in text]}

    def get_vocab(self):
        return {chr(32 + token): token for token in range(61)}

    def decode(self, tokens, **settings):
        return "".join(chr(32 + int(token)) for token in tokens)


def text_of(tokens):
    return Letters().decode(tokens)


def reader_of(choices, model=None):
    return Reader(model or tiny(), Letters(), trainer={"accelerator": "cpu"}, **choices)


def nats_of_fit(choices):
    """Nats and static nats of each token, as a Trainer over the whole document gives them."""
    done = run(tiny(), [TOKENS], **({"reference": "static"} | choices))
    nats, static = torch.cat(done.nats[0]), done.static[0]
    return nats, None if static[0] is None else torch.cat(static)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_cut_at_segments_nats_are_those_of_the_whole_to_the_last_bit(choices):
    expected, static = nats_of_fit(choices)
    reader = reader_of(choices)
    tables = [reader.read(text_of(TOKENS[start:stop])) for start, stop in CUTS]
    columns = {
        name: np.concatenate([table[name] for table in tables]) for name in ("token", "segment", "nats", "static_nats")
    }
    assert columns["token"].tolist() == list(range(len(TOKENS)))
    assert columns["segment"].tolist() == [token // 16 for token in range(len(TOKENS))]
    assert columns["nats"].tolist() == expected.float().tolist()
    if static is not None:
        assert columns["static_nats"].tolist() == static.tolist()
    assert "".join(piece for table in tables for piece in table["text"]) == text_of(TOKENS)
    assert len(reader) == len(TOKENS)
    assert reader.so_far.nats == pytest.approx(expected.double().sum().item())
    assert reader.so_far.bytes == len(TOKENS)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_another_reader_goes_on_from_what_was_saved(tmp_path, choices):
    model = tiny()
    one = reader_of(choices, model)
    one.read(text_of(TOKENS[:48]))
    one.save(tmp_path)
    expected = one.read(text_of(TOKENS[48:]))
    two = reader_of(choices)
    two.load(tmp_path)
    assert two.read(text_of(TOKENS[48:])).equals(expected)
    assert two.so_far == one.so_far


def test_a_shorter_segment_ends_each_call_and_is_learned_from():
    choices = CHOICES["all weights"] | {"reference": None}
    reader = reader_of(choices)
    table = [reader.read(text_of(TOKENS[start:stop])) for start, stop in ((0, 5), (5, 25), (25, 26))]
    assert [each["segment"].unique().tolist() for each in table] == [[0], [1, 2], [3]]

    class Cut(TransformerXL):
        def cuts(self, tokens):
            for index, (start, stop) in enumerate([(0, 5), (5, 21), (21, 25), (25, 26)]):
                yield type(next(super().cuts(1)))(index, start, stop, 0)

    expected = run(tiny(), [TOKENS[:26]], **(choices | {"context": Cut(16, 24)})).nats[0]
    assert np.concatenate([each["nats"] for each in table]).tolist() == torch.cat(expected).tolist()


def test_a_state_is_a_snapshot():
    reader = reader_of(CHOICES["rates"])
    reader.read(text_of(TOKENS[:32]))
    state = reader.progress_state()
    expected = reader.read(text_of(TOKENS[32:]))
    reader.load_progress_state(state)
    assert reader.so_far.tokens == len(reader) == 32
    assert reader.read(text_of(TOKENS[32:])).equals(expected)


def test_what_is_recalled_after_a_failure_generates():
    reader = reader_of({"context": TransformerXL(16, 24), "update": partial(torch.optim.SGD, lr=1e12)})
    with pytest.raises(SettingError):
        reader.read(text_of(TOKENS))
    weights = {name: torch.zeros_like(weight) for name, weight in reader.module.weights.learned_by((0, 0)).items()}
    reader.recall(torch.tensor(TOKENS), weights)
    with reader.weights() as model:
        assert not any(parameter.any() for parameter in model.parameters())
    with pytest.raises(SettingError, match="what was cut short, or recalled"):
        reader.read(text_of(TOKENS))


def test_forgetting_begins_anew():
    reader = reader_of(CHOICES["schedule, errors"])
    first = reader.read(text_of(TOKENS[:40]))
    assert reader.read(text_of(TOKENS[:40]))["nats"].sum() < first["nats"].sum()
    reader.forget()
    assert len(reader) == 0
    assert reader.read(text_of(TOKENS[:40])).equals(first)


def test_nothing_is_an_empty_table():
    table = reader_of(CHOICES["static"]).read("")
    assert table.empty
    assert list(table.columns) == ["token", "segment", "text", "nats", "static_nats"]


@pytest.mark.parametrize("name", ["all weights", "adapters, in windows", "rates"])
def test_what_is_generated_comes_of_what_was_learned(name):
    model, pattern = tiny(), [7, 9, 13, 21] * 40
    choices = CHOICES[name] | ({"rates": [0.02, 1e-6]} if name == "rates" else {})
    reader = reader_of(choices, model)
    settings = {"max_new_tokens": 12, "do_sample": False}
    before = reader.generate(text_of([7, 9]), **settings)
    reader.read(text_of(pattern))
    assert reader.generate(text_of([7, 9]), **settings) != before
    assert reader.generate(text_of([7, 9]), static=True, **settings) == before
    # Generating changes nothing: neither what was learned nor what is read next.
    other = reader_of(choices)
    other.read(text_of(pattern))
    assert reader.read(text_of(TOKENS)).equals(other.read(text_of(TOKENS)))


def test_of_several_rates_the_best_generates():
    reader = reader_of(CHOICES["rates"] | {"rates": [1e-6, 0.02]})
    reader.read(text_of([7, 9, 13, 21] * 40))
    assert reader.so_far.of_rules[1] < reader.so_far.of_rules[0]
    with reader.weights() as model:
        now = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in reader.module.weights.learned_by((1, 0)).items():
        assert torch.equal(now[name], weight), name


def test_what_stands_behind_is_what_was_read_last():
    model = tiny()
    reader = reader_of(CHOICES["static"], model)
    reader.read(text_of(TOKENS))
    inputs = torch.tensor([[0, *TOKENS[-9:], 5]])
    expected = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert reader.generate(text_of([5]), behind=9, max_new_tokens=6, do_sample=False) == text_of(expected[0, 11:])


@pytest.mark.parametrize(
    ("choices", "text", "message"),
    [
        (
            "sinks, refresh",
            TOKENS[:5],
            "text must follow whole segments of 16 tokens with context.refresh, got 5 tokens",
        ),
        ("replayed", TOKENS[:5], "text must follow whole segments of 16 tokens with objective Replayed, got 5 tokens"),
    ],
)
def test_what_looks_back_by_segments_is_refused_behind_a_shorter_one(choices, text, message):
    reader = reader_of(CHOICES[choices])
    reader.read(text_of(text))
    with pytest.raises(SettingError, match=message):
        reader.read(text_of(TOKENS))


def test_numbers_that_go_wrong_are_said_and_can_be_forgotten():
    reader = reader_of({"context": TransformerXL(16, 24), "update": partial(torch.optim.SGD, lr=1e12)})
    with pytest.raises(SettingError, match="text must be read to its end, got stopped in segment"):
        reader.read(text_of(TOKENS))
    reader.forget()
    assert np.isfinite(reader.read(text_of(TOKENS[:16]))["nats"]).all()


def test_what_another_reader_has_saved_is_refused(tmp_path):
    reader = reader_of(CHOICES["all weights"])
    reader.read(text_of(TOKENS))
    reader.save(tmp_path)
    with pytest.raises(SettingError, match="folder must be saved by a reader with protocol context"):
        reader_of(CHOICES["static"]).load(tmp_path)
    with pytest.raises(SettingError, match="folder must be saved by a reader with weights "):
        reader_of(CHOICES["all weights"], tiny(seed=1)).load(tmp_path)
    others = {
        "reference": {"reference": None},
        "rule 0": {"update": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        "on_failure": {"on_failure": "static"},
        "teacher": {"teacher": tiny(seed=2)},
    }
    for name, choice in others.items():
        with pytest.raises(SettingError, match=f"folder must be saved by a reader with {name} "):
            reader_of(CHOICES["all weights"] | choice).load(tmp_path)
    with pytest.raises(SettingError, match=r"folder must hold the reader.sealed that Reader.save leaves"):
        reader.load(tmp_path / "nothing")


def test_behind_a_text_that_was_cut_short_nothing_can_follow(monkeypatch):
    reader = reader_of(CHOICES["all weights"])
    first = reader.read(text_of(TOKENS[:16]))
    step, count = type(reader.module).training_step, [0]

    def stops(self, *arguments):
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("a plug was pulled")
        return step(self, *arguments)

    monkeypatch.setattr(type(reader.module), "training_step", stops)
    with pytest.raises(RuntimeError, match="a plug was pulled"):
        reader.read(text_of(TOKENS[16:64]))
    monkeypatch.undo()
    with pytest.raises(SettingError, match="text must follow what was read whole, got what was cut short"):
        reader.read(text_of(TOKENS[16:64]))
    reader.forget()
    assert reader.read(text_of(TOKENS[:16])).equals(first)


def test_a_first_read_that_was_cut_short_is_forgotten_too(monkeypatch):
    reader = reader_of(CHOICES["all weights"])
    step = type(reader.module).training_step

    def stops(self, segment, batch_idx):
        if segment.cut.index == 2:
            raise KeyboardInterrupt
        return step(self, segment, batch_idx)

    monkeypatch.setattr(type(reader.module), "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        reader.read(text_of(TOKENS))
    monkeypatch.undo()
    reader.forget()
    assert reader.read(text_of(TOKENS)).equals(reader_of(CHOICES["all weights"]).read(text_of(TOKENS)))


def test_before_anything_is_read_and_after_it_was_forgotten(tmp_path):
    reader, settings = reader_of(CHOICES["all weights"]), {"max_new_tokens": 5, "do_sample": False}
    reader.save(tmp_path / "new")
    before = reader.generate(text_of([7]), **settings)
    reader.read(text_of(TOKENS))
    reader.save(tmp_path / "read")
    assert (tmp_path / "read/weights.safetensors").exists()
    reader.forget()
    assert reader.generate(text_of([7]), **settings) == before
    reader.save(tmp_path / "read")
    assert [path.name for path in (tmp_path / "read").iterdir()] == ["reader.sealed"]
    other = reader_of(CHOICES["all weights"])
    other.load(tmp_path / "new")
    assert other.read(text_of(TOKENS)).equals(reader.read(text_of(TOKENS)))


def test_where_numbers_went_wrong_the_initial_weights_generate(tmp_path):
    settings = {"max_new_tokens": 5, "do_sample": False}
    for on_failure in ("stop", "static"):
        wild = {"context": TransformerXL(16, 24), "update": partial(torch.optim.SGD, lr=1e12), "on_failure": on_failure}
        reader = reader_of(wild)
        before = reader.generate(text_of([7]), **settings)
        with pytest.raises(SettingError) if on_failure == "stop" else nullcontext():
            reader.read(text_of(TOKENS))
        assert reader.generate(text_of([7]), **settings) == before
        reader.save(tmp_path / on_failure)
        assert [path.name for path in (tmp_path / on_failure).iterdir()] == ["reader.sealed"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reader(tiny(), Letters(), context=TransformerXL(8, 8), trainer={"devices": 2}),
            "trainer.devices must be 1",
        ),
        (
            lambda: Reader(tiny(), Letters(), context=TransformerXL(8, 8), trainer={"max_time": 1}),
            "trainer.max_time must be left out",
        ),
        (lambda: Reader(tiny(), context=TransformerXL(8, 8)), "tokenizer must be given with a model of transformers"),
        (lambda: reader_of(CHOICES["static"]).read(chr(32 + 61)), "model.tokenizer must give ids below 61"),
        (lambda: reader_of(CHOICES["static"]).generate(behind=-1), "behind must be at least 0, got -1"),
        (
            lambda: reader_of(CHOICES["static"]).generate(num_return_sequences=2),
            "num_return_sequences must be left out",
        ),
        (lambda: reader_of(CHOICES["static"]).generate(max_length=9), "max_length must be left out"),
        (lambda: reader_of(CHOICES["static"]).generate(max_new_tokens=None), "max_new_tokens must be a number"),
        (lambda: reader_of(CHOICES["static"]).generate("a" * 300), "prompt must leave room within 256 positions"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_in_half_precision_it_generates_as_it_reads():
    model = tiny().bfloat16()
    reader = Reader(model, Letters(), context=TransformerXL(16, 24), parameters=Matching("mlp"), update=ADAM,
                    trainer={"accelerator": "cpu", "precision": "bf16-mixed"})  # fmt: skip
    reader.read(text_of(TOKENS))
    assert len(reader.generate(text_of([7]), max_new_tokens=5, do_sample=False)) == 5
