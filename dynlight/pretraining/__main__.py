"""The base model: pretrain a small causal language model on text files, or fine-tune one that exists.

    python -m dynlight.pretraining --config configs/pretrain_tiny.yaml

    files → texts → tokenizer (trained here, or the model's own) → one stream of tokens, a BOS before each document
          → windows in a seeded shuffled order → mean nats → Muon and AdamW → a Hugging Face folder with its card

The folder is an ordinary one: `AutoModelForCausalLM.from_pretrained(folder)` needs nothing of dynlight.
"""

import csv
import inspect
import logging
import shutil
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.pytorch import Trainer, seed_everything
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dynlight.errors import SettingError, require
from dynlight.learning.advice import warn_of_imitated_bf16
from dynlight.pretraining.card import model_card
from dynlight.pretraining.learning import Pretraining, TimedCheckpoint
from dynlight.pretraining.windows import TextWindows, read_texts, train_tokenizer
from dynlight.running.messages import one_line
from dynlight.running.pretrained import Pretrained

# The Trainer's arguments that a user may set, and those that keep a run quiet.
TRAINER_SETTINGS = {"accelerator", "precision", "logger", "deterministic", "profiler"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


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
        learning: the arguments of Pretraining, except `updates` and `model`.
        model: `{model_type: llama, hidden_size: …}`, values of a config, or `{pretrained: folder}` to fine-tune.
        out: the folder that is made; it holds `checkpoints/` until the run ends.
        vocabulary: tokens of the tokenizer that is trained, at least 257; a pretrained model keeps its own.
        seed: of the initial weights and the order of windows.
        about: a paragraph for the card about where the data come from.
        checkpoint_minutes: time between checkpoints.
        resume: the file of a checkpoint to go on from; the other settings must be those that it was made with.
        overwrite: whether `out` may exist.
        trainer: accelerator, precision, logger … of Lightning's Trainer.

    Raises:
        SettingError: if the settings can't be run, in one line.
    """
    check(out, vocabulary, seed, checkpoint_minutes, resume, overwrite)
    folder, module = Path(out), Pretraining(data.updates, **learning)
    texts = read_texts(data.files)
    seed_everything(seed, verbose=False)
    module.model, tokenizer = initial_model(model, texts, vocabulary)
    data.prepare(texts, tokenizer, seed)
    print(f"{module.model.num_parameters():,} weights, {data.updates:,} updates, {len(data.stream):,} tokens of data")
    if data.updates:
        learn(module, data, TimedCheckpoint(folder / "checkpoints", checkpoint_minutes), resume, trainer or {})
    write_model(folder, module, tokenizer)
    amounts = {"tokens": data.updates * data.windows * data.window, "window": data.window, "windows": data.windows}
    settings = {"data": amounts, "learning": learning, "model": model, "vocabulary": len(tokenizer), "seed": seed}
    (folder / "README.md").write_text(model_card(folder.name, texts, data, module, settings, about), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def check(out: str, vocabulary: int, seed: int, checkpoint_minutes: float, resume: str | None, overwrite: bool) -> None:
    """Raise SettingError where a setting of `pretrain` is wrong by itself, before anything is read."""
    is_free = overwrite or bool(resume) or not Path(out).exists()
    require(is_free, "out", "be a new folder (or set overwrite: true)", got=out)
    require(vocabulary >= 257, "vocabulary", "be at least 257 (256 bytes and one special token)", got=vocabulary)
    require(seed >= 0, "seed", "be at least 0", got=seed)
    require(checkpoint_minutes >= 0, "checkpoint_minutes", "be at least 0", got=checkpoint_minutes)
    require(resume is None or Path(resume).is_file(), "resume", "be a checkpoint's file", got=resume)


def initial_model(model: dict[str, Any], texts: list[str], vocabulary: int) -> tuple[PreTrainedModel, Any]:
    """Return a model with its initial weights, and its tokenizer: both pretrained, or both made here."""
    if "pretrained" in model:
        source = Pretrained(**model)
        return source.load().train(), source.load_tokenizer()
    tokenizer = train_tokenizer(texts, vocabulary)
    return build_model(model, tokenizer), tokenizer


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


def learn(
    module: Pretraining, data: TextWindows, checkpoint: TimedCheckpoint, resume: str | None, settings: dict[str, Any]
) -> None:
    """Make all updates of a run, or those that a checkpoint's file leaves, on one device.

    Args:
        module: what learns.
        data: the windows, prepared.
        checkpoint: the callback that saves the run now and then.
        resume: the checkpoint's file to go on from.
        settings: of the Trainer.
    """
    trainer = Trainer(**{**QUIET, **settings}, devices=1, max_epochs=1, callbacks=[checkpoint])
    if trainer.strategy.root_device.type == "cpu" and "bf16" in str(trainer.precision):
        warn_of_imitated_bf16(f"trainer.precision: {trainer.precision}")
    trainer.fit(module, data, ckpt_path=resume)


def write_model(folder: Path, module: Pretraining, tokenizer: Any) -> None:
    """Write weights in bf16, tokenizer and loss.csv into a folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    module.model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "loss.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["tokens", "seconds", "loss"])
        rows.writerows((tokens, f"{seconds:.1f}", f"{nats:.6f}") for tokens, seconds, nats in module.curve)


def parser() -> ArgumentParser:
    """Return the parser of a run's settings: the keys of each section are the arguments of what the section makes."""
    settings = ArgumentParser("python -m dynlight.pretraining", exit_on_error=False, allow_abbrev=False)
    settings.add_argument("--config", action=ActionConfigFile)
    settings.add_class_arguments(TextWindows, "data")
    settings.add_class_arguments(Pretraining, "learning", skip={"model", "updates"}, instantiate=False)
    settings.add_function_arguments(pretrain, skip={"data", "learning", "trainer"})
    not_settable = set(inspect.signature(Trainer).parameters) - TRAINER_SETTINGS
    settings.add_class_arguments(Trainer, "trainer", skip=not_settable, instantiate=False)
    settings.set_defaults({"trainer.logger": False})
    return settings


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the configuration that the arguments describe, or raise `SettingError` in one line."""
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
