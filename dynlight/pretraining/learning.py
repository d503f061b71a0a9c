"""The base model: pretrain a small causal language model on text files, or fine-tune one that exists.

    python -m dynlight.pretraining --config configs/pretrain_tiny.yaml

    files → texts → tokenizer (trained here, or the model's own) → one stream of tokens, a BOS before each document
          → windows in a seeded shuffled order → mean nats → Muon and AdamW → a Hugging Face folder with its card

The folder is an ordinary one: `AutoModelForCausalLM.from_pretrained(folder)` needs nothing of dynlight.
"""

import csv
import glob
import inspect
import logging
import math
import shutil
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dynlight.errors import SettingError, require
from dynlight.learning.module import warn_of_imitated_bf16
from dynlight.running.messages import one_line
from dynlight.running.pretrained import Pretrained

BOS = "<s>"
TRAINER_SETTINGS = {"accelerator", "precision", "logger", "deterministic", "profiler"}
CURVE_ROWS = 200


def read_texts(files: str | list[str]) -> list[str]:
    """Return the text of each file that a glob pattern matches, in the order of the names; a file is one document.

    Of several patterns each must match a file; a file that two of them match is read once.
    """
    found: set[str] = set()
    for pattern in [files] if isinstance(files, str) else files:
        matched = {path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
        require(bool(matched), "data.files", "be a pattern that matches a file", got=repr(pattern))
        found |= matched
    paths = sorted(found)
    require(bool(paths), "data.files", "be a pattern, or several", got=repr(files))
    texts = [Path(path).read_bytes().decode("utf-8", "replace") for path in paths]
    require(any(texts), "data.files", "be files with text in them", got=f"{len(paths)} empty files")
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: any text comes back unchanged, and the one special token, `<s>`, is BOS and EOS.

    Args:
        texts: documents to learn the merges from.
        vocabulary: tokens in all, the 256 bytes and `<s>` included; fewer where the texts hold no more pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def token_stream(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """Join documents into one stream of token ids [tokens], a BOS (else EOS) before each."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(bos is not None, "model.pretrained", "be a model whose tokenizer has a BOS or an EOS token", got="neither")
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([bos, *document]) for document in documents])


class WindowStream(IterableDataset):
    """The windows of each update, [windows, W + 1], in a seeded shuffled order, pass after pass, from any update on.

    Window i of a pass holds the stream's tokens o + i·W … o + (i + 1)·W, its last one only as a target. The order of a
    pass and its offset o ≤ W follow from the seed and the pass alone, so a resumed run sees what an unbroken one sees.
    """

    def __init__(self, stream: torch.Tensor, window: int, windows: int, updates: int, seed: int, start: int = 0):
        self.stream, self.window, self.windows = stream, window, windows
        self.updates, self.seed, self.start = updates, seed, start

    def __iter__(self) -> Iterator[torch.Tensor]:
        in_pass = max(1, len(self.stream) // self.window - 1)
        room = min(self.window, len(self.stream) - 1 - in_pass * self.window)
        starts: list[int] = []
        taken: list[torch.Tensor] = []
        pass_drawn = -1
        for i in range(self.start * self.windows, self.updates * self.windows):
            if i // in_pass != pass_drawn:
                pass_drawn = i // in_pass
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + pass_drawn)
                offset = int(torch.randint(room + 1, (1,), generator=draw))
                starts = (torch.randperm(in_pass, generator=draw) * self.window + offset).tolist()
            start = starts[i % in_pass]
            taken.append(self.stream[start : start + self.window + 1])
            if len(taken) == self.windows:
                yield torch.stack(taken)
                taken = []


class TextWindows(LightningDataModule):
    """Text files as shuffled windows of tokens.

    Args:
        files: glob pattern, or a list of them; each file is one document.
        tokens: tokens to learn from in all, repetition counted, rounded up to whole updates; 0 learns nothing.
        window: tokens read together.
        windows: windows in one update.
    """

    def __init__(self, files: str | list[str], tokens: int, window: int = 512, windows: int = 8) -> None:
        super().__init__()
        require(tokens >= 0, "data.tokens", "be at least 0", got=tokens)
        require(window >= 1, "data.window", "be at least 1", got=window)
        require(windows >= 1, "data.windows", "be at least 1", got=windows)
        self.files, self.window, self.windows = files, window, windows
        self.updates = math.ceil(tokens / (window * windows))
        self.seed, self.stream = 0, torch.empty(0, dtype=torch.long)

    def prepare(self, texts: list[str], tokenizer: Any, seed: int) -> None:
        """Turn the texts into the stream that windows are cut from."""
        self.seed, self.stream = seed, token_stream(texts, tokenizer)
        tokens = len(self.stream)
        require(self.window < tokens, "data.window", f"be shorter than the data ({tokens} tokens)", got=self.window)

    def train_dataloader(self) -> DataLoader:
        """Begin at the update that the module has reached."""
        trainer: Any = self.trainer
        start = trainer.lightning_module.updates
        stream = WindowStream(self.stream, self.window, self.windows, self.updates, self.seed, start)
        return DataLoader(stream, batch_size=None)


def mean_nats(model: PreTrainedModel, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of −ln p(token | those before it) over windows [windows, W + 1], from an fp32 softmax."""
    logits = model(input_ids=windows[:, :-1], attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class PreciseMuon(torch.optim.Optimizer):
    """Muon: momentum 0.95 (Nesterov), whose update each matrix takes made nearly orthogonal.

        m ← 0.95 m + 0.05 g,   u = NewtonSchulz(0.95 m + 0.05 g),   θ ← (1 − ε w) θ − ε sqrt(max(1, rows / columns)) u

    What `torch.optim.Muon` does, but for the precision of the five Newton-Schulz steps, which there is bfloat16: a CPU
    without bfloat16 instructions imitates them, and they take longer than forward and backward.

    Args:
        matrices: weights [rows, columns].
        lr: ε.
        weight_decay: w.
        dtype: of the Newton-Schulz steps.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    STEPS = 5

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change each matrix by its gradient."""
        for group in self.param_groups:
            for matrix in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with its singular values moved near 1, in five steps X ← aX + (b XXᵀ + c (XXᵀ)²) X."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        wide = matrix.to(self.dtype).T if tall else matrix.to(self.dtype)
        wide = wide / wide.norm().clamp(min=1e-7)
        for _ in range(self.STEPS):
            gram = wide @ wide.T
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        return wide.T if tall else wide


class Pretraining(LightningModule):
    """Learn a causal language model: Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases.

    Both rates follow one trapezoid over the share t of updates done: min(1, t / warmup, (1 − t) / decay).

    Args:
        updates: updates in the whole run.
        matrix_lr: Muon's rate, times sqrt(max(1, rows / columns)) for each matrix.
        lr: AdamW's rate, betas 0.9 and 0.95.
        weight_decay: decoupled decay of Muon's matrices, as a multiple of their rate.
        warmup: share of the updates over which the rates rise.
        decay: share of the updates over which they fall to zero.
        clip: largest norm of the gradient.
        reach: how many tokens back attention may look, itself included, in turn by update; null is the whole window.
            Where it is shorter than the window, a model learns to do without a window's first tokens, as it must when
            it reads on and on with a memory (the "attention sink" of Xiao et al. 2023, arXiv 2309.17453).
        compile: whether the forward runs through `torch.compile`.
        model: any causal model of transformers, its weights in fp32; `self.model` may be set later, before training.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        updates: int,
        matrix_lr: float = 0.02,
        lr: float = 0.003,
        weight_decay: float = 0.01,
        warmup: float = 0.02,
        decay: float = 0.7,
        clip: float = 1.0,
        reach: list[int] | None = None,
        compile: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"matrix_lr": matrix_lr, "lr": lr, "weight_decay": weight_decay}.items():
            require(math.isfinite(value) and value >= 0, f"learning.{name}", "be finite and at least 0", got=value)
        for name, share in {"warmup": warmup, "decay": decay}.items():
            require(0 < share <= 1, f"learning.{name}", "be above 0 and at most 1", got=share)
        require(clip > 0, "learning.clip", "be above 0", got=clip)
        require(all(tokens >= 1 for tokens in reach or []), "learning.reach", "be lengths of at least 1", got=reach)
        self.automatic_optimization = False
        self.model: Any = model
        self.updates_in_all = updates
        self.matrix_lr, self.lr, self.weight_decay = matrix_lr, lr, weight_decay
        self.warmup, self.decay, self.clip, self.reach = warmup, decay, clip, reach or []
        self.mean_nats = torch.compile(mean_nats, dynamic=False) if compile else mean_nats
        self.updates, self.seconds, self.began = 0, 0.0, 0.0
        self.curve: list[tuple[int, float, float]] = []
        self.recent: list[torch.Tensor] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Give Muon the matrices inside the blocks and AdamW all the rest."""
        outside = [module for module in self.modules() if isinstance(module, torch.nn.Embedding)]
        outside += [head] if (head := self.model.get_output_embeddings()) is not None else []
        embeddings = {weight for module in outside for weight in module.parameters()}
        matrices = [weight for weight in self.parameters() if weight.ndim == 2 and weight not in embeddings]
        others = [weight for weight in self.parameters() if weight.ndim != 2 or weight in embeddings]
        low = "bf16" in str(self.trainer.precision)
        muon = PreciseMuon(matrices, self.matrix_lr, self.weight_decay, dtype=torch.bfloat16 if low else torch.float32)
        optimizers = [muon, torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        return optimizers

    def rate_factor(self) -> float:
        """Return the factor on both rates for the update that comes."""
        done = (self.updates + 0.5) / self.updates_in_all
        return min(1.0, done / self.warmup, (1 - done) / self.decay)

    def attention_mask(self, window: int) -> torch.Tensor | None:
        """Return this update's additive mask [1, 1, W, W], or None where each token may look at all before it."""
        if not self.reach:
            return None
        reach = self.reach[self.updates % len(self.reach)]
        seen = torch.ones(window, window, dtype=torch.bool, device=self.device).tril().triu(1 - reach)
        return torch.zeros(1, 1, window, window, device=self.device).masked_fill(~seen, -math.inf)

    def on_train_start(self) -> None:
        """Start the clock, or let it go on."""
        self.began = time.perf_counter() - self.seconds

    def training_step(self, windows: torch.Tensor) -> None:
        """Learn from the windows [windows, W + 1] of one update."""
        nats = self.mean_nats(self.model, windows, self.attention_mask(windows.shape[1] - 1))
        self.manual_backward(nats)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        factor = self.rate_factor()
        for optimizer in self.optimizers():  # type: ignore[union-attr] # Muon and AdamW, a list
            for group in optimizer.param_groups:
                group["lr"] = factor * group["full_lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        self.recent.append(nats.detach())
        if self.updates % max(1, self.updates_in_all // CURVE_ROWS) == 0 or self.updates == self.updates_in_all:
            self.add_to_curve(self.updates * windows[:, 1:].numel())

    def add_to_curve(self, tokens: int) -> None:
        """Add the row tokens read, seconds, mean nats per token since the row before."""
        self.seconds = time.perf_counter() - self.began
        loss = torch.stack(self.recent).double().mean().item()
        if not math.isfinite(loss):
            got = f"{loss} after {self.updates} updates; lower learning.lr and learning.matrix_lr"
            raise SettingError("the loss", "be finite", got=got)
        self.curve.append((tokens, self.seconds, loss))
        self.recent = []
        self.log_dict({"tokens": float(tokens), "nats_per_token": loss})
        print(f"{tokens:>13,} tokens {self.seconds:>8,.0f} s {loss:8.4f} nats per token", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the place in the stream and the curve beside weights and optimizers."""
        seconds = time.perf_counter() - self.began
        place = {"updates": self.updates, "seconds": seconds, "curve": self.curve, "recent": self.recent}
        checkpoint["pretraining"] = place

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        place = checkpoint["pretraining"]
        self.updates, self.seconds = place["updates"], place["seconds"]
        self.curve, self.recent = [tuple(row) for row in place["curve"]], list(place["recent"])


class TimedCheckpoint(Callback):
    """Save a checkpoint, `last.ckpt`, every few minutes (Lightning's own is not timed under manual optimization)."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.path, self.seconds, self.saved = folder / "last.ckpt", minutes * 60, 0.0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin to count the time."""
        self.saved = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save when it is time."""
        if time.perf_counter() - self.saved >= self.seconds:
            trainer.save_checkpoint(self.path)
            self.saved = time.perf_counter()


def build_model(settings: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """Make a causal language model from the values of its config, in fp32, for the tokenizer's vocabulary."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(**{**settings, **special, "vocab_size": len(tokenizer)})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # a config class may refuse in any way it likes; all of it is the user's to mend
        reason = " ".join(str(error).split())[:160]
        expected = "{pretrained: …}, or the values of a causal model's config with its model_type"
        raise SettingError("model", f"be {expected}", got=f"{settings} ({reason})") from error


def pretrain(
    data: TextWindows,
    learning: dict[str, Any],
    model: dict[str, Any],
    out: str,
    vocabulary: int = 4096,
    seed: int = 0,
    about: str = "",
    checkpoint_minutes: float = 5.0,
    resume: str | None = None,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """Train a model and write its folder: weights in bf16, tokenizer, loss.csv, README.md (the model card).

    The same seed gives the same model on the same machine.

    Args:
        data: what is read.
        learning: the arguments of Pretraining but `updates` and `model`.
        model: `{model_type: llama, hidden_size: …}`, values of a config, or `{pretrained: folder}` to fine-tune.
        out: the folder that is made; its `checkpoints/` is there until the run ends.
        vocabulary: tokens of the tokenizer that is trained, at least 257; a pretrained model keeps its own.
        seed: of weights and order.
        about: a paragraph for the card about where the data come from.
        checkpoint_minutes: time between checkpoints.
        resume: a checkpoint to go on from, with the other settings as they were.
        overwrite: whether `out` may exist.
        trainer: accelerator, precision, logger … of Lightning's Trainer.

    Raises:
        SettingError: if the settings can't be run, in one line.
    """
    folder = Path(out)
    require(
        overwrite or bool(resume) or not folder.exists(), "out", "be a new folder (or set overwrite: true)", got=out
    )
    require(vocabulary >= 257, "vocabulary", "be at least 257 (256 bytes and one special token)", got=vocabulary)
    require(seed >= 0, "seed", "be at least 0", got=seed)
    require(checkpoint_minutes >= 0, "checkpoint_minutes", "be at least 0", got=checkpoint_minutes)
    require(resume is None or Path(resume).is_file(), "resume", "be a checkpoint's file", got=resume)
    module = Pretraining(data.updates, **learning)
    texts = read_texts(data.files)
    seed_everything(seed, verbose=False)
    if "pretrained" in model:
        source = Pretrained(**model)
        network = source.load().train()
        tokenizer = source.load_tokenizer()
    else:
        tokenizer = train_tokenizer(texts, vocabulary)
        network = build_model(model, tokenizer)
    data.prepare(texts, tokenizer, seed)
    module.model = network
    print(f"{network.num_parameters():,} weights, {data.updates:,} updates, {len(data.stream):,} tokens of data")
    if data.updates:
        keeper = TimedCheckpoint(folder / "checkpoints", checkpoint_minutes)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        lightning = Trainer(**{**quiet, **(trainer or {})}, devices=1, max_epochs=1, callbacks=[keeper])
        warn_of_imitated_bf16(lightning)
        lightning.fit(module, data, ckpt_path=resume)
    folder.mkdir(parents=True, exist_ok=True)
    network.to(device="cpu", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "loss.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["tokens", "seconds", "loss"])
        rows.writerows((tokens, f"{seconds:.1f}", f"{loss:.6f}") for tokens, seconds, loss in module.curve)
    read = {"tokens": data.updates * data.windows * data.window, "window": data.window, "windows": data.windows}
    settings = {"data": read, "learning": learning, "model": model, "vocabulary": len(tokenizer), "seed": seed}
    (folder / "README.md").write_text(model_card(folder.name, texts, data, module, settings, about), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def model_card(
    name: str, texts: list[str], data: TextWindows, module: Pretraining, settings: dict[str, Any], about: str
) -> str:
    """Return the card of a model, in Markdown: what is known of a run when it ends.

    Args:
        name: of the model.
        texts: the documents.
        data: what was read of them.
        module: what learned, with its curve.
        settings: the run's configuration, without paths.
        about: a paragraph about where the data come from.
    """
    config, curve = module.model.config, module.curve
    size = sum(len(text.encode()) for text in texts)
    bytes_per_token = size / max(1, len(data.stream) - len(texts))
    read = curve[-1][0] if curve else 0
    rows = [curve[round(i * (len(curve) - 1) / 12)] for i in range(13)] if curve else []
    losses = "\n".join(
        f"| {tokens:,} | {seconds / 3600:.2f} | {loss:.3f} | {loss / bytes_per_token / math.log(2):.3f} |"
        for tokens, seconds, loss in dict.fromkeys(rows)
    )
    keys = "hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings vocab_size"
    shape = ", ".join(f"{key} {getattr(config, key)}" for key in keys.split() if hasattr(config, key))
    weights, hours = module.model.num_parameters(), module.seconds / 3600
    own = "pretrained" not in settings["model"]
    tokens_are = (
        "The tokenizer is byte-level BPE: any text comes back unchanged." if own else "The tokenizer is the base's."
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A `{type(module.model).__name__}` of {weights:,} weights, made by `python -m dynlight.pretraining`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

## Data

{about or "Not described."}

Documents: {len(texts)}, bytes: {size:,}, tokens: {len(data.stream):,} ({bytes_per_token:.2f} bytes per token).

## Architecture and tokenizer

{shape}; input and output embeddings {"tied" if config.tie_word_embeddings else "apart"}; weights stored in bf16.
{tokens_are} A BOS token begins each document in training.

## Recipe

{read:,} tokens read ({read / len(data.stream):.2f} passes) in {hours:.2f} hours and {module.updates:,} updates.
Muon for the matrices inside the blocks, AdamW for the rest. The settings:

```yaml
{yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110).strip()}
```

## Loss curve

Nats per token on the windows about to be learned from; all of it is in `loss.csv`.

| tokens | hours | nats per token | bits per byte |
|---:|---:|---:|---:|
{losses}
"""


def parser() -> ArgumentParser:
    """The settings of a run: each section's keys are the arguments of what it makes."""
    settings = ArgumentParser("python -m dynlight.pretraining", exit_on_error=False, allow_abbrev=False)
    settings.add_argument("--config", action=ActionConfigFile)
    settings.add_class_arguments(TextWindows, "data")
    settings.add_class_arguments(Pretraining, "learning", skip={"model", "updates"}, instantiate=False)
    settings.add_function_arguments(pretrain, skip={"data", "learning", "trainer"})
    theirs = set(inspect.signature(Trainer).parameters) - TRAINER_SETTINGS
    settings.add_class_arguments(Trainer, "trainer", skip=theirs, instantiate=False)
    settings.set_defaults({"trainer.logger": False})
    return settings


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the configuration that the arguments describe, or raise `ValueError` in one line."""
    settings = parser()
    try:
        return settings.parse_args(list(arguments))
    except ArgumentError as error:
        raise SettingError.worded(one_line(str(error), settings.get_defaults().keys())) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; return 0, or 2 with one line on stderr where it can't be run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # cutting windows takes no time
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")  # Lightning's own use of torch
    try:
        settings = parser().instantiate(parse(sys.argv[1:] if arguments is None else arguments)).as_dict()
        settings.pop("config")
        print(pretrain(**settings))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
