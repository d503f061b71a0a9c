"""`python -m dynlight.fit --config X.yaml`: one YAML is one run."""

import inspect
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
import wandb
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger

from dynlight import report
from dynlight.context import Context
from dynlight.documents import DocumentStream
from dynlight.errors import one_line
from dynlight.flops import FlopsLogger
from dynlight.module import DynamicEvaluation
from dynlight.parameters import Parameters
from dynlight.pretrained import Pretrained
from dynlight.progress import DocumentProgress
from dynlight.records import Records
from dynlight.reset import ResetWeights
from dynlight.schedule import UpdateFrequency
from dynlight.updates import Update

HELP = """usage: python -m dynlight.fit --config X.yaml [--section.key value ...]

Reads documents segment by segment: each is scored, then learned from.

  --config X.yaml     a run; any value can be overridden behind it, e.g. --update.lr 1e-3
  --print_config      prints the whole configuration, with every default, as YAML
  --help              prints this

the five choices
  context             what is scored next, with what in view: TransformerXL, Overlapping
  parameters          which weights may learn: All, LoRA, Matching
  update              how they change: any of torch.optim, RMSDynamic; null: static evaluation
  schedule            when: every, passes
  reset               when it is forgotten: every (document, never)

around them
  model               what is evaluated: pretrained (Hub name, folder, tiny-books), dtype, attention, compile
  data                what is read: path, data_files, split, text_column, documents, max_tokens
  reference           static: the unlearned model over the same windows stands beside; null: not
  clip                largest gradient norm of a document; null: no bound
  trainer             Lightning's Trainer: accelerator, devices, precision, strategy, logger, callbacks
  seed                of everything random
  out, overwrite      the run's folder (default runs/<name of the config>), and whether to replace it
"""

# What a user may set of Lightning's Trainer; the rest follows from reading each document once.
_TRAINER_SETTINGS = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "deterministic",
    "benchmark", "profiler", "plugins", "limit_train_batches",
}  # fmt: skip
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
    settings = ArgumentParser(prog="python -m dynlight.fit", exit_on_error=False, allow_abbrev=False)
    settings.add_argument("--config", action=ActionConfigFile)
    settings.add_class_arguments(Pretrained, "model")
    settings.add_class_arguments(DocumentStream, "data")
    settings.add_subclass_arguments(Context, "context", required=True)
    settings.add_subclass_arguments(Parameters, "parameters", default={"class_path": "dynlight.parameters.All"})
    settings.add_argument("--update", type=Update | None, default=None)
    settings.add_class_arguments(UpdateFrequency, "schedule")
    settings.add_class_arguments(ResetWeights, "reset")
    settings.add_argument("--reference", type=Literal["static"] | None, default="static")
    settings.add_argument("--clip", type=float | None, default=None)
    theirs = set(inspect.signature(Trainer).parameters) - _TRAINER_SETTINGS
    settings.add_class_arguments(Trainer, "trainer", skip=theirs, instantiate=False)
    settings.set_defaults({"trainer.logger": False})
    settings.add_argument("--seed", type=int, default=0)
    settings.add_argument("--out", type=str | None, default=None)
    settings.add_argument("--overwrite", type=bool, default=False)
    return settings


def parse(arguments: Sequence[str]) -> Namespace:
    """The configuration that the arguments describe.

    Raises:
        ValueError: in one line, if they describe none.
    """
    settings = parser()
    try:
        return settings.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(one_line(str(error), _names(settings))) from error


def fit(config: Namespace) -> dict[str, Any]:
    """Reads the documents that a configuration describes and returns the summary of what was found.

    Raises:
        ValueError: if the configuration cannot be run.
    """
    folder = Path(config.out or Path("runs") / _config_name(config))
    if folder.exists() and not config.overwrite:
        raise ValueError(f"out must be a new folder, got {folder}; choose another or set overwrite: true")
    seed_everything(config.seed, verbose=False)
    _prefer_offline()
    _log_into(config.trainer.logger, folder)
    choices = parser().instantiate(config)
    # Whatever can be known to be wrong is found before weights are loaded and anything is written.
    choices.context.check(choices.model.config())
    tokenizer = choices.model.load_tokenizer()
    choices.data.loaded = choices.data.load(tokenizer)
    module = DynamicEvaluation(
        choices.model.load(),
        tokenizer,
        context=choices.context,
        parameters=choices.parameters,
        update=choices["update"],
        schedule=choices.schedule,
        reset=choices.reset,
        reference=choices.reference,
        clip=choices.clip,
    )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    parser().save(config, folder / "config.yaml", skip_unset=False)
    command = f"python -m dynlight.fit --config {folder / 'config.yaml'}"
    records = Records(folder, {"name": folder.name, "command": command})
    trainer = make_trainer(choices.trainer, [FlopsLogger(), records, DocumentProgress()])
    trainer.fit(module, choices.data)
    summary = report.write(folder)
    log_report(trainer, folder, summary)
    print(report.printed_table(folder))
    print(f"\nreport  {folder / 'report.html'}")
    return summary


def make_trainer(settings: Namespace, meters: list[Callback]) -> Trainer:
    """Lightning's Trainer for reading each document once, in order."""
    chosen = settings.as_dict()
    callbacks = [*meters, *(chosen.pop("callbacks") or [])]
    return Trainer(**chosen, **TRAINER, callbacks=callbacks)


def log_report(trainer: Trainer, folder: Path, summary: dict[str, Any]) -> None:
    """Sends the end of the run to W&B: totals, the table of documents, and the report with its pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            documents = report.documents_table(folder).astype(object)
            logger.log_table("documents", dataframe=documents.where(documents.notna(), None))
            logger.experiment.log({"report": wandb.Html((folder / "report.html").read_text(), inject=False)})
            logger.experiment.summary.update({key: value for key, value in summary.items() if value is not None})
            logger.experiment.finish()
            if logger.experiment.offline:
                print(f"W&B     {Path(logger.experiment.dir).parent} (offline: wandb leet shows it, wandb sync uploads it)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says.

    Returns the exit status: 0; 2 if the configuration cannot be run (one line on stderr says why); 3 if a document
    failed on the way.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, end="")
        return 0
    _quiet()
    try:
        summary = fit(parse(arguments))
    except ValueError as error:
        if not _is_for_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    for document in summary["failed"]:
        print(
            f"error: document {document['name']} must have finite nats, got others at segment {document['segment']}; "
            "lower update.lr or set clip (its sums are kept out of the totals)",
            file=sys.stderr,
        )
    return 3 if summary["failed"] else 0


def _config_name(config: Namespace) -> str:
    return Path(str(config.config[0])).stem if config.config else "run"


def _names(settings: ArgumentParser) -> list[str]:
    return [key for key in settings.get_defaults(skip_validation=True).keys() if key != "config"]


def _is_for_users(error: ValueError) -> bool:
    """Whether dynlight itself raised it: a library's ValueError is a bug of ours and keeps its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).parent == Path(__file__).parent


def _prefer_offline() -> None:
    """Keeps W&B from asking for an account where there is none."""
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _netrc()
    if "WANDB_MODE" not in os.environ and not has_key:
        os.environ["WANDB_MODE"] = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")


def _netrc() -> str:
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return file.read_text() if file.exists() else ""


def _log_into(loggers: Any, folder: Path) -> None:
    """Has W&B keep its files in the run's folder unless told otherwise."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger") and logger.init_args.save_dir == ".":
            logger.init_args.save_dir = str(folder)


def _quiet() -> None:
    """Leaves out what Lightning says of matters that are settled here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # segments come one after another
        ".*will run with no optimizer.*",  # static evaluation
        ".*in eval mode at the start of training.*",  # dropout would make scores random
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
