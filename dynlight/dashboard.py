"""Dashboard: what W&B is told beside the series of FlopsLogger, where the run has a WandbLogger.

wandb itself is imported only where it is used: that takes a second.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from dynlight.report import documents_table


def begin(loggers: Iterable[Logger], settings: dict[str, Any]) -> None:
    """Opens the W&B run of each logger and gives it the run's configuration.

    Where no account is set up, W&B keeps the run on disk and asks for nothing.

    Raises:
        ValueError: if W&B cannot be reached.
    """
    if not (ours := _wandb_loggers(loggers)):
        return
    import wandb

    session = wandb.setup(wandb.Settings(silent=True))
    if session.settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        wandb.setup(wandb.Settings(mode="offline"))
    for logger in ours:
        try:
            run = logger.experiment
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"trainer.logger must be a WandbLogger that reaches W&B, got: {reason}; set WANDB_MODE=offline"
            ) from error
        run.config.update(settings, allow_val_change=True)
        if run.url:
            print(f"W&B     {run.url}")


def finish(loggers: Iterable[Logger], folder: Path, summary: dict[str, Any]) -> None:
    """Sends the end of a run: its totals, the table of documents, and the report with its pictures."""
    for logger in _wandb_loggers(loggers):
        import wandb

        run = logger.experiment
        documents = documents_table(folder).astype(object)
        report = wandb.Html((folder / "report.html").read_text(), inject=False)
        table = wandb.Table(dataframe=documents.where(documents.notna(), None))
        run.log({"results/documents": table, "results/report": report})
        run.summary.update({name: value for name, value in summary.items() if value is not None})
        run.finish()
        if run.offline:
            place = Path(run.dir).parent
            place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
            print(f"W&B     {place}\n        offline: `wandb leet` shows it, `wandb sync` uploads it")


def _wandb_loggers(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]
