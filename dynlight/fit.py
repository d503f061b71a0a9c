"""`python -m dynlight.fit --config X.yaml`: one YAML is one run."""

import argparse
import errno
import inspect
import logging
import os
import pydoc
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything

from dynlight.choices.context import Context
from dynlight.choices.mixture import Mixture
from dynlight.choices.parameters import Parameters
from dynlight.choices.reset import ResetWeights
from dynlight.choices.schedule import UpdateFrequency
from dynlight.choices.update import Update
from dynlight.documents.document import Document, DocumentStream
from dynlight.durable import draft_of
from dynlight.errors import SettingError
from dynlight.learning.flops import FlopsLogger
from dynlight.learning.module import DynamicEvaluation, check_precision, warn_of_imitated_bf16
from dynlight.learning.processes import strategies
from dynlight.learning.processes.board import ProcessFailedError
from dynlight.recording import loggers as dashboard
from dynlight.recording.checkpoint import Checkpoint, CheckpointPeriod, Interrupted, Signals
from dynlight.recording.progress import DocumentProgress
from dynlight.recording.receipt import Receipt
from dynlight.recording.records import Records
from dynlight.recording.report import files, terminal, text
from dynlight.recording.resume import (
    Origin,
    find_start,
    how_to_resume,
    is_read,
    is_unfinished,
    remove_unfinished,
    settings_of,
)
from dynlight.running import together
from dynlight.running.messages import ConfigFile, one_line, setting_names
from dynlight.running.pretrained import Pretrained

HELP = """usage: python -m dynlight.fit --config X.yaml [--section.key value ...]

Reads documents segment by segment: each is scored, then learned from.

  --config X.yaml   a run; values behind it override it, e.g. --update.lr 1e-3
  --resume runs/X   goes on with a run that was cut short, to the same numbers
  --print_config    prints the whole configuration, every default in it, as YAML
  --help            prints this

the five choices
  context           what is scored next, with what in view: TransformerXL,
                    Overlapping
  parameters        which weights may learn: All, LoRA, Matching
  update            how they change: a class of torch.optim, RMSDynamic; null:
                    nothing is learned (with a mixture: by rules of its own)
  schedule          when: every, passes
  reset             when it is forgotten: every (document or never)

around them
  model             what is evaluated: pretrained (Hub, folder, tiny-books),
                    tokenizer, revision, dtype, attention, compile
  data              what is read: path, data_files, split, text_column,
                    documents, max_tokens, together, streaming
  reference         static: the unlearned model scores the same windows; null:
                    it does not, which saves its cost
  clip              the largest gradient norm of a document; null: no bound
  rates             learning rates that each learn from every document
  mixture           how they predict together: switching; {}: no rate is needed
  trainer           Lightning's Trainer: accelerator, devices, precision,
                    strategy (several: document_parallel; a model larger than
                    one: model_parallel), num_nodes, logger, callbacks
  on_failure        of a document whose numbers go wrong: stop; static: the
                    unlearned weights read it to its end
  checkpoint        minutes between two checkpoints; null: none
  seed              of everything random
  out, overwrite    the run's folder (default: runs/<name of the file>), and
                    whether to replace it
"""

# What DynamicEvaluation takes of a configuration.
CHOICES = tuple("context parameters update schedule reset reference clip rates mixture on_failure".split())
# What a user may set of Lightning's Trainer; the rest follows from reading each document once.
_TRAINER_SETTINGS = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "deterministic",
    "benchmark", "profiler", "plugins",
}  # fmt: skip
# What has its default where a YAML gives nothing; the parser lets null pass for any type.
_NOT_NULL = ("model.dtype", "schedule", "schedule.passes", "reset", "trainer", "seed")
# What the machine may run out of.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
}


def parser() -> ArgumentParser:
    """The settings of a run: each section's keys are the arguments of the class that it makes."""
    set_parsing_settings(import_path_denylist=[])  # refuse what jsonargparse would warn of: a YAML that names os.system
    settings = ArgumentParser(prog="python -m dynlight.fit", exit_on_error=False, allow_abbrev=False)
    settings.add_argument("--config", action=ConfigFile)
    settings.add_class_arguments(Pretrained, "model")
    settings.add_class_arguments(DocumentStream, "data")
    settings.add_subclass_arguments(Context, "context", required=True)
    settings.add_subclass_arguments(Parameters, "parameters", default={"class_path": "dynlight.All"})
    settings.add_argument("--update", type=Update | list[Update] | None, default=None)
    settings.add_class_arguments(UpdateFrequency, "schedule")
    settings.add_class_arguments(ResetWeights, "reset")
    settings.add_argument("--reference", type=Literal["static"] | None, default="static")
    settings.add_argument("--clip", type=float | None, default=None)
    settings.add_argument("--rates", type=list[float] | None, default=None)
    settings.add_argument("--mixture", type=Mixture | None, default=None)
    theirs = set(inspect.signature(Trainer).parameters) - _TRAINER_SETTINGS
    settings.add_class_arguments(Trainer, "trainer", skip=theirs, instantiate=False)
    settings.set_defaults({"trainer.logger": False, "trainer.devices": 1})
    settings.add_argument("--on_failure", type=Literal["stop", "static"], default="stop")
    settings.add_argument("--checkpoint", type=CheckpointPeriod | None, default={"minutes": 5.0})
    settings.add_argument("--seed", type=int, default=0)
    settings.add_argument("--out", type=str | None, default=None)
    settings.add_argument("--overwrite", type=bool, default=False)
    return settings


def parse(arguments: Sequence[str]) -> Namespace:
    """The configuration that the arguments describe.

    Raises:
        SettingError: in one line, if they describe none.
    """
    settings = parser()
    try:
        config = settings.parse_args(list(arguments))
    except ArgumentError as error:
        raise SettingError.worded(one_line(str(error), setting_names(settings))) from error
    defaults = settings.get_defaults(skip_validation=True)
    for name in _NOT_NULL:
        if config.get(name, ...) is None:
            config[name] = defaults[name]
    return config


def fit(config: Namespace, resumes: bool = False, signals: Signals | None = None) -> dict[str, Any]:
    """Reads the documents that a configuration describes and returns the summary of what was found.

    Whatever can be known to be wrong is found before weights are loaded, and before anything is written.

    Args:
        config: the configuration.
        resumes: whether the run in its folder goes on, where it was cut short.
        signals: what tells it to stop.

    Raises:
        SettingError: if the configuration cannot be run.
        Interrupted: if a signal said so.
    """
    folder = folder_of(config)
    _check_rates(config)
    origin = Origin.read(folder) if resumes else Origin()
    origin.check_settings(folder, settings_of(config.as_dict()))
    if not 0 <= config.seed < 2**32:
        raise SettingError("seed", f"be from 0 to {2**32 - 1}", got=config.seed)
    check_precision(config.trainer.precision)  # on a CPU, Lightning takes bf16 for fp16
    choices = parser().instantiate(_logging_into(folder, config, origin, resumes))
    command = f"python -m dynlight.fit --config {folder / 'config.yaml'}"
    records = Records(folder, {"name": folder.name, "command": command}, resumes)
    receipt = Receipt(folder, resumes)
    checkpoint = Checkpoint(folder, origin, receipt, choices.checkpoint, signals or Signals())
    meters = [FlopsLogger(folder, resumes), records, receipt, DocumentProgress(), checkpoint]
    trainer = make_trainer(choices.trainer, meters, folder)
    if trainer.is_global_zero and not resumes:  # the others come when it is there
        _check_folder(folder, config.overwrite)
    if resumes and is_read(folder):
        return _finish(trainer, folder)
    choices.context.check(choices.model.config())
    tokenizer = choices.model.load_tokenizer()
    chosen = {name: choices[name] for name in CHOICES}
    outline = DynamicEvaluation(choices.model.outline(), tokenizer, **chosen)
    outline.check(trainer, choices.data)
    choices.data.loaded = choices.data.load(tokenizer)
    _check_tokens(choices.data.loaded, outline)
    make_trial = partial(_trial, choices, chosen, trainer, folder)
    if choices.data.together == "auto" and trainer.is_global_zero:  # the others take the number from it
        choice = together.choose(make_trial, together.most_to_read(choices.data.loaded, trainer.world_size, outline))
        choices.data.together = config.data.together = choice.together
        print(choice)
    if resumes:
        origin.check_documents(folder, choices.data.loaded)
        checkpoint.start = find_start(folder, origin, choices.data, choices.context, choices.reset.every, trainer)
    else:
        origin.begin(choices.data, strategies.share_of(trainer)[1])
    warn_of_imitated_bf16(trainer)
    seed_everything(config.seed, verbose=False)
    module = DynamicEvaluation(choices.model.load(), tokenizer, **chosen)
    try:
        if trainer.is_global_zero:
            _begin(folder, config, resumes)
            origin.loggers = dashboard.begin(trainer.loggers, _told(config))
        trainer.fit(module, choices.data)
    except torch.OutOfMemoryError as error:
        if isinstance(trainer.strategy, strategies.DocumentParallel) and not trainer.is_global_zero:
            sys.exit(2)  # process 0 says why
        _release(error, module, trainer)
        if strategies.is_sharded(trainer):
            raise SettingError(
                "trainer.devices",
                "be as many as the parts of the model, its gradients and the optimizer's state fit on",
                got=f"{trainer.world_size}, where memory ran out",
                advice="choose more, LoRA, or a shorter context.segment",
            ) from error
        raise together.does_not_fit(choices.data.together, make_trial) from error
    except BaseException as error:
        if isinstance(trainer.strategy, strategies.DocumentParallel) and not trainer.is_global_zero:
            _leave_to_first(error)
        if trainer.is_global_zero and not (resumes or records.has_begun) and folder.exists():
            shutil.rmtree(folder)
        raise
    if not trainer.is_global_zero:
        return {"failed": [], "finished_static": []}  # process 0 says which
    return _finish(trainer, folder)


def folder_of(config: Namespace) -> Path:
    """The run's folder."""
    return Path(config.out or Path("runs") / _config_name(config))


def _begin(folder: Path, config: Namespace, resumes: bool) -> None:
    """Makes the run's folder, with the configuration in it."""
    if folder.exists() and not resumes:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with draft_of(folder / "config.yaml") as draft:
        parser().save(config, draft, skip_unset=False, overwrite=True)  # a killed run leaves drafts


def _finish(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """What is made of a run's rows."""
    summary = files.write(folder)
    print(terminal.printed_table(folder))
    print(f"\nreport  {folder / 'report.html'}")
    dashboard.finish(trainer.loggers, folder, summary)
    remove_unfinished(folder)
    return summary


def on_one_device(settings: Namespace) -> Namespace:
    """The trainer's settings for reading the same in this process alone; scores don't depend on it.

    Raises:
        SettingError: if they do, as all processes learn one set of weights.
    """
    if settings.strategy not in ("auto", "document_parallel", "model_parallel"):
        raise SettingError(
            "trainer.strategy", "be auto, document_parallel or model_parallel to be read again", got=settings.strategy
        )
    return Namespace(**(settings.as_dict() | {"strategy": "auto", "devices": 1, "num_nodes": 1}))


def _trial(choices: Namespace, chosen: dict[str, Any], trainer: Trainer, folder: Path) -> together.Trial:
    """What the run does, in small, on the same device, where nothing is shown or logged."""
    device = trainer.strategy.root_device
    settings = on_one_device(choices.trainer)
    settings.logger, settings.callbacks = False, None
    settings.devices = [device.index] if device.type == "cuda" else 1

    make = partial(silent_trainer, settings, [], folder)
    processes = getattr(trainer.strategy, "num_processes", 1)
    return together.Trial(choices.model.load, chosen, choices.data.loaded, make, device, processes)


def _leave_to_first(error: BaseException) -> None:
    """Ends this process without a word where the first one says why."""
    if isinstance(error, ProcessFailedError | Interrupted | SettingError):
        sys.exit(2)


def _release(error: Exception, module: DynamicEvaluation, trainer: Trainer) -> None:
    """Lets go of all that fills the device's memory after a run has failed there."""
    traceback.clear_frames(error.__traceback__)
    trainer.strategy.optimizers = []
    module.score = None
    for held in ("weights", "optimizer_of_each_expert"):
        vars(module).pop(held, None)


def _told(config: Namespace) -> dict[str, Any]:
    """The settings that W&B is told."""
    settings = config.as_dict()
    return {name: settings[name] for name in ("model", "data", "seed", *CHOICES)}


def make_trainer(settings: Namespace, meters: list[Callback], folder: Path) -> Trainer:
    """Lightning's Trainer for reading each document once, in order."""
    strategies.register()
    chosen = settings.as_dict()
    callbacks = [*meters, *(chosen.pop("callbacks") or [])]
    try:
        return Trainer(**chosen, **TRAINER, callbacks=callbacks, default_root_dir=folder)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        reason = shorten(" ".join(str(error).split()), 200, placeholder=" …")
        named = re.search(r"`(accelerator|devices|strategy|precision|num_nodes)\b", reason)
        setting = f"trainer.{named[1]}" if named else "trainer"
        raise SettingError(setting, "be what Lightning can run here", got=f"something else: {reason}") from error


def silent_trainer(settings: Namespace, meters: list[Callback], folder: Path | None = None) -> Trainer:
    """The same, without a progress bar."""
    silent = DocumentProgress()
    silent.disable()
    return make_trainer(settings, [*meters, silent], folder or Path.cwd())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says.

    Returns the exit status: 0; 1 if the run was cut short by the machine, as by a full disk; 2 if the configuration
    cannot be run (one line on stderr says why); 3 if a document failed on the way; 128 + n if signal n stopped it. Of several
    processes the first alone prints.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, end="")
        return 0
    quiet()
    config = None
    try:
        with Signals() as signals:
            arguments, resumes = _resumed(arguments)
            config = parse(arguments)
            summary = fit(config, resumes, signals)
    except SettingError as error:
        print(f"error: {text.one_line(str(error))}", file=sys.stderr)
        return 2
    except ProcessFailedError as failure:
        _say_how_to_resume(config)
        print(f"error: {failure}", file=sys.stderr)
        return failure.status
    except Interrupted as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        _say_how_to_resume(config)
        return 128 + stop.signum
    except OSError as error:
        _say_how_to_resume(config)
        if error.errno not in _FULL:
            raise
        print(
            f"error: out must be where there is room, got {config and folder_of(config)}: {error.strerror}",
            file=sys.stderr,
        )
        return 1
    except BaseException:
        _say_how_to_resume(config)
        raise
    for document in summary["failed"]:
        where = "" if document["segment"] is None else f" in segment {document['segment']}"
        print(
            f"error: document {text.one_line(document['name'])} must be read to its end, got stopped{where} as "
            f"{document['reason']}; lower update.lr or set clip (its sums are kept out of the totals)",
            file=sys.stderr,
        )
    for document in summary["finished_static"]:
        print(
            f"warning: document {text.one_line(document['name'])} was read by the unlearned weights from segment "
            f"{document['segment']} on, as {document['reason']}; lower update.lr or set clip",
            file=sys.stderr,
        )
    return 3 if summary["failed"] else 0


def _resumed(arguments: list[str]) -> tuple[list[str], bool]:
    """`--resume runs/x` as the configuration that this run left, and whether it was given."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--resume", type=Path)
    try:
        found, others = flag.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise SettingError("resume", "be given a value", got="nothing") from error
    if found.resume is None:
        return arguments, False
    if any(argument.partition("=")[0] in ("--config", "--out") for argument in others):
        raise SettingError(
            "resume", "stand without config and out, as a run has its own", got="both", advice="leave one out"
        )
    if not (found.resume / "config.yaml").is_file():
        raise SettingError(
            "resume", "be the folder of an unfinished run", got=found.resume, advice="it has no config.yaml"
        )
    return ["--config", str(found.resume / "config.yaml"), *others, "--out", str(found.resume)], True


def _say_how_to_resume(config: Namespace | None) -> None:
    if config is not None and is_unfinished(folder_of(config)):
        print(f"go on with: {how_to_resume(folder_of(config))}", file=sys.stderr)


def _config_name(config: Namespace) -> str:
    return Path(str(config.config[0])).stem if config.config else "run"


def _check_rates(config: Namespace) -> None:
    """Raises SettingError where a rule is given a rate of its own that nothing would use."""
    if config.rates is None and config.mixture is None:
        return
    chosen = config["update"]  # `config.update` is the namespace's own method
    for rule in chosen if isinstance(chosen, list) else [chosen] if chosen else []:
        usual = inspect.signature(pydoc.locate(rule.class_path)).parameters.get("lr")  # type: ignore[arg-type]
        if usual is not None and (given := rule.init_args.lr) != usual.default:
            raise SettingError(
                "update.lr", "be left out where there are rates or a mixture", got=given, advice=f"set rates: [{given}]"
            )


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite and is_unfinished(folder):
        raise SettingError(
            "out",
            "be a new folder",
            got=f"{folder}, a run that was cut short",
            advice=f"go on with {how_to_resume(folder)}, or set overwrite: true",
        )
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise SettingError("out", "be a new folder", got=folder, advice="choose another or set overwrite: true")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise SettingError("out", "be a folder that can be made", got=folder, advice=f"{above} cannot be written to")


def _check_tokens(documents: Sequence[Document], outline: DynamicEvaluation) -> None:
    """Raises SettingError where a document has a token that the model has no embedding for."""
    rows = outline.model.get_input_embeddings().num_embeddings
    for document in documents:
        if (highest := max(document.prefix, int(document.tokens.max()) if len(document) else 0)) >= rows:
            raise SettingError(
                "model.tokenizer",
                f"give ids below {rows}, the rows of the model's embedding",
                got=f"{highest} in {document.name}",
                advice="choose the tokenizer that the model was trained with",
            )


def _logging_into(folder: Path, config: Namespace, origin: Origin, resumes: bool) -> Namespace:
    """The same configuration, with the settings of loggers that follow from the run; what it leaves has the user's."""
    config = config.clone()
    dashboard.place(config.trainer, folder, origin.loggers, resumes)
    return config


def quiet() -> None:
    """Leaves out what libraries say of matters that are settled here."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each time it tries in vain
    for message in (
        ".*will run with no optimizer.*",  # static evaluation
        ".*in eval mode at the start of training.*",  # dropout would make scores random
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
