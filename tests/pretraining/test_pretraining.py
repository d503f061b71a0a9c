"""Pretraining and fine-tuning: the folder that comes out, and that the seed alone decides what is in it."""

import csv
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlight.pretraining import learning
from dynlight.pretraining.__main__ import main, parse, pretrain
from dynlight.pretraining.learning import Pretraining
from dynlight.pretraining.muon import PreciseMuon
from dynlight.pretraining.windows import TextWindows, WindowStream, read_texts, train_tokenizer

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "dynlight" / "assets" / "tiny-books"
CONFIG = str(ROOT / "configs" / "pretrain_tiny.yaml")
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LEARNING = {"matrix_lr": 0.02, "lr": 0.01, "reach": [16, 8]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """The pattern of three files of generated sentences, a few KB."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    subjects, verbs, things = ["The cat", "A fox", "My aunt"], ["saw", "ate", "sold"], ["a pear", "the sea", "old maps"]
    for name in "abc":
        lines = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(things)}." for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def run(texts: str, out: Path, updates: int = 24, model: dict | None = None, **settings) -> Path:
    """A run of some updates of 64 tokens."""
    data = TextWindows(texts, tokens=updates * 64, window=16, windows=4)
    trainer = {"accelerator": "cpu", "logger": False}
    rates = settings.pop("learning", LEARNING)
    return pretrain(data, rates, model or MODEL, str(out), vocabulary=280, trainer=trainer, **settings)


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory) -> Path:
    """What the plain run leaves."""
    return run(texts, tmp_path_factory.mktemp("runs") / "plain", about="Sentences made at random.")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def curve(folder: Path) -> list[tuple[str, str]]:
    with (folder / "loss.csv").open() as file:
        return [(row["tokens"], row["loss"]) for row in csv.DictReader(file)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_folder_is_an_ordinary_one(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.vocab_size == len(tokenizer) == 280
    assert model.config.bos_token_id == model.config.eos_token_id == tokenizer.bos_token_id == tokenizer.eos_token_id
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "loss.csv",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_loss_goes_down(folder):
    losses = [float(loss) for _, loss in curve(folder)]
    assert losses[0] == pytest.approx(math.log(280), abs=0.3)
    assert losses[-1] < losses[0] - 1.5


def test_the_card_tells_what_was_done(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in [
        "# plain",
        "LlamaForCausalLM",
        "Sentences made at random.",
        "matrix_lr: 0.02",
        "| 1,536 |",
        "Documents: 3",
    ]:
        assert part in card
    assert str(folder.parent) not in card
    _, curve_of_card = card.split("|---:|---:|---:|---:|\n")
    assert curve_of_card.count("\n") == 13 and curve_of_card.endswith(" |\n")
    assert not {"{{", "{%"} & set(card.split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " \n\n\t x\r\n",
        "naïve — “ж” 漢字 🦊👩‍👩‍👧 \u200b\x00\x7f",
        "".join(map(chr, range(1, 2000))),
        "<s> a </s>",
    ],
)
def test_any_text_comes_back(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_has_one_special_token():
    tokenizer = train_tokenizer(["aaaa bbbb"], 400)
    assert tokenizer.all_special_tokens == ["<s>"]
    assert len(tokenizer) >= 257


def test_the_same_seed_gives_the_same_model(texts, folder, tmp_path):
    again = run(texts, tmp_path / "again")
    assert same(weights(folder), weights(again))
    assert curve(folder) == curve(again)
    other = run(texts, tmp_path / "other", seed=1)
    assert not same(weights(folder), weights(other))


def test_a_resumed_run_equals_an_unbroken_one(texts, folder, tmp_path, monkeypatch):
    add_to_curve = Pretraining.add_to_curve

    def break_off(self, tokens):
        if self.updates == 11:
            raise RuntimeError("power cut")
        add_to_curve(self, tokens)

    monkeypatch.setattr(Pretraining, "add_to_curve", break_off)
    with pytest.raises(RuntimeError, match="power cut"):
        run(texts, tmp_path / "broken", checkpoint_minutes=0)
    monkeypatch.undo()
    checkpoint = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["pretraining"]["updates"] == 10
    resumed = run(texts, tmp_path / "broken", resume=str(checkpoint))
    assert same(weights(folder), weights(resumed))
    assert curve(folder) == curve(resumed)
    assert not checkpoint.exists()


def test_fine_tuning_starts_from_the_weights_and_keeps_the_tokenizer(texts, folder, tmp_path):
    source = {"pretrained": str(folder)}
    untouched = run(texts, tmp_path / "untouched", updates=0, model=source)
    assert same(weights(folder), weights(untouched))
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (folder, untouched)]
    assert tokenizers[0] == tokenizers[1]
    tuned = run(texts, tmp_path / "tuned", updates=6, model=source)
    assert float(curve(tuned)[0][1]) < float(curve(folder)[0][1]) - 1
    assert not same(weights(folder), weights(tuned))


def test_gpt2_learns_too(texts, tmp_path):
    model = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    losses = [float(loss) for _, loss in curve(run(texts, tmp_path / "gpt2", model=model, learning={"lr": 0.01}))]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("length", [17, 18, 32, 33, 49, 1000])
def test_each_pass_reads_each_window_once(length):
    in_pass = max(1, length // 16 - 1)
    windows = torch.cat(list(WindowStream(torch.arange(length), 16, 1, 2 * in_pass, seed=3)))
    assert windows.shape == (2 * in_pass, 17)
    assert torch.equal(windows, windows[:, :1] + torch.arange(17))
    for each in windows.split(in_pass):
        starts = sorted(each[:, 0].tolist())
        assert starts == list(range(starts[0], starts[0] + 16 * in_pass, 16))


def test_the_command_line_overrides_any_value(texts, tmp_path, capsys):
    small = ["--model.hidden_size", "32", "--model.intermediate_size", "48", "--model.num_hidden_layers", "1"]
    rates = ["--learning.compile", "false", "--learning.reach", "[8]", "--trainer.precision", "32-true"]
    data = ["--data.files", texts, "--data.tokens", "64", "--data.window", "16", "--data.windows", "2"]
    out = ["--out", str(tmp_path / "new"), "--vocabulary", "270"]
    assert main(["--config", CONFIG, *small, *rates, *data, *out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "new").config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 1, 270)
    assert curve(tmp_path / "new")[-1][0] == "64"


def test_the_stream_goes_on_from_any_update():
    whole = list(WindowStream(torch.arange(500), 16, 4, 20, seed=0))
    rest = list(WindowStream(torch.arange(500), 16, 4, 20, seed=0, start=13))
    assert torch.equal(torch.stack(whole[13:]), torch.stack(rest))


def test_reach_bounds_attention_in_turn():
    module = Pretraining(10, reach=[4, 2])
    for updates, seen in [(0, 4), (1, 2), (2, 4)]:
        module.updates = updates
        mask = module.attention_mask(6)[0, 0]
        assert (mask == 0).sum(dim=1).tolist() == [min(i + 1, seen) for i in range(6)]
        assert (mask[-1, -seen:] == 0).all()
    assert Pretraining(10).attention_mask(6) is None


def test_rates_rise_then_fall_to_zero():
    module = Pretraining(100, warmup=0.1, decay=0.5)
    factors = []
    for module.updates in range(100):
        factors.append(module.rate_factor())
    assert factors[0] == pytest.approx(0.05) and factors[-1] == pytest.approx(0.01)
    assert factors[10:50] == [1.0] * 40


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_muon_is_that_of_torch_in_bf16_and_close_to_it_in_fp32(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs, ours, exact = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.01),
        PreciseMuon([ours], 0.02, 0.01, torch.bfloat16),
        PreciseMuon([exact], 0.02, 0.01, torch.float32),
    ]
    for step in range(4):
        for matrix, optimizer in zip((theirs, ours, exact), optimizers, strict=True):
            matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
    assert torch.equal(theirs, ours)
    assert 0 < (theirs - exact).abs().max() < 0.02 * (theirs - start).abs().max()


def test_a_cpu_that_imitates_bf16_is_told(texts, tmp_path, capsys):
    run(texts, tmp_path / "whole", updates=1)
    assert "trainer.precision" not in capsys.readouterr().err
    data = ["--data.files", texts, "--data.tokens", "32", "--data.window", "16", "--data.windows", "2"]
    out = ["--out", str(tmp_path / "half"), "--vocabulary", "270", "--learning.compile", "false"]
    small = ["--model.hidden_size", "32", "--model.intermediate_size", "48", "--trainer.precision", "bf16-mixed"]
    assert main(["--config", CONFIG, *small, *data, *out]) == 0
    is_warned = "trainer.precision should be 32-true here, got bf16-mixed" in capsys.readouterr().err
    assert is_warned != torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_file_that_two_patterns_match_is_read_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_texts([f"{tmp_path}/*.txt", f"{tmp_path}/a.*", f"{tmp_path}/*.md"]) == ["a.txt", "b.txt", "c.md"]


def test_the_shipped_yaml_parses():
    settings = parse(["--config", CONFIG, "--data.tokens", "0"])
    assert settings.data.tokens == 0
    assert settings.model["hidden_size"] == 224
    assert settings.data.files == "../shared/data/books/train/*.txt"


ERRORS = [
    (["--data.window", "0"], "data.window must be at least 1, got 0"),
    (["--data.windows", "-1"], "data.windows must be at least 1, got -1"),
    (["--data.tokens", "-5"], "data.tokens must be at least 0, got -5"),
    (["--data.window", "many"], "data.window must be a whole number, got many"),
    (["--data.windw", "3"], "data.windw is not a setting"),
    (["--data.files", "none/*.txt"], "data.files must be a pattern that matches a file, got 'none/*.txt'"),
    (["--data.files", "[README.md, none/*.txt]"], "data.files must be a pattern that matches a file, got 'none/*.txt'"),
    (["--data.files", "[]"], "data.files must be a pattern, or several, got []"),
    (["--learning.lr", "-1"], "learning.lr must be finite and at least 0, got -1.0"),
    (["--learning.matrix_lr", ".inf"], "learning.matrix_lr must be finite and at least 0, got inf"),
    (["--learning.warmup", "0"], "learning.warmup must be above 0 and at most 1, got 0.0"),
    (["--learning.clip", "0"], "learning.clip must be above 0, got 0.0"),
    (["--learning.reach", "[0]"], "learning.reach must be lengths of at least 1, got [0]"),
    (["--vocabulary", "256"], "vocabulary must be at least 257 (256 bytes and one special token), got 256"),
    (["--seed", "-1"], "seed must be at least 0, got -1"),
    (["--resume", "none.ckpt"], "resume must be a checkpoint's file, got none.ckpt"),
    (["--model", "{model_type: nonsense}"], "model must be {pretrained: …}, or the values of a causal model's config"),
    (["--model", "{pretrained: ./nowhere}"], "model.pretrained must be "),
    (["--data.window", "100000"], "data.window must be shorter than the data ("),
    (["--vocab", "300"], "vocab is not a setting"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_what_cannot_be_run_is_one_line(arguments, message, texts, tmp_path, capsys):
    plain = ["--config", CONFIG, "--data.files", texts, "--out", str(tmp_path / "new"), "--vocabulary", "300"]
    assert main([*plain, *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_refused(texts, folder, tmp_path, capsys):
    assert main(["--config", CONFIG, "--data.files", texts, "--out", str(folder)]) == 2
    assert "out must be a new folder (or set overwrite: true), got" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "mean_nats", lambda model, *_: model.lm_head.weight.sum() * math.nan)
    with pytest.raises(ValueError, match="the loss must be finite, got nan after 1 updates"):
        run(texts, tmp_path / "diverged")


def test_the_model_in_the_package_is_small_and_has_its_card():
    if not ASSET.is_dir():
        pytest.skip("tiny-books is not trained yet")
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 8_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ASSET), AutoTokenizer.from_pretrained(ASSET)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert len(tokenizer) == model.config.vocab_size == 4096
    card = (ASSET / "README.md").read_text()
    for part in ["license: apache-2.0", "public domain", "bits per byte", "## Limits"]:
        assert part in card
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. ж🦊"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
