"""Dashboard: what W&B is told, where the run has a WandbLogger.

wandb itself is imported only where it is used: that takes a second.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers import Logger, WandbLogger

from dynlight.durable import sync_to_disk
from dynlight.report import documents_table


def begin(loggers: Iterable[Logger], settings: dict[str, Any]) -> str | None:
    """Opens the W&B run of each logger and gives it the run's configuration; returns the id by which it can go on.

    Where no account is set up, W&B keeps the run on disk and asks for nothing.

    Raises:
        ValueError: if W&B cannot be reached.
    """
    if not (ours := _wandb_loggers(loggers)):
        return None
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
    return str(ours[0].version)


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


class Points:
    """The points of a run's series, which W&B is told once each, however often the run is cut short.

    W&B never goes back, and loses the last points of a killed process. So they are kept as lines of a file until the run
    ends, and a run that goes on tells W&B those that it hasn't got, and none that it has.

    Args:
        loggers: of the run; only those of W&B are told.
        file: where they are kept; None: nowhere, as such a run can't go on.
        resumes: whether the run goes on.
    """

    def __init__(self, loggers: Iterable[Logger], file: Path | None, resumes: bool = False) -> None:
        self.count = 0
        self._loggers = [(logger, _points_held(logger) if resumes else None) for logger in _wandb_loggers(loggers)]
        self._lines: IO[bytes] | None = None
        self._file = file
        if file is not None and self._loggers:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = file.open("ab" if resumes else "wb", buffering=0)

    def add(self, point: dict[str, float]) -> None:
        """Tells W&B the next point."""
        if self._lines is not None:
            self._lines.write(json.dumps(point).encode() + b"\n")
        for logger, held in self._loggers:
            if held is None:
                logger.log_metrics(point)
            elif self.count >= held:
                logger.experiment.log(point, step=self.count)
        self.count += 1

    def sync(self) -> int:
        """Waits until all points are on disk, and returns how many there are."""
        if self._lines is not None and self._file is not None:
            sync_to_disk(self._file)
        return self.count

    def go_on(self, count: int | None = None, tokens: float = math.inf) -> None:
        """Goes on after so many points, or the last of so many tokens, and tells W&B what it hasn't got up to there."""
        if self._lines is None or self._file is None:
            self.count = count or 0
            return
        kept = []
        for line in self._file.read_bytes().splitlines(keepends=True)[:count]:
            if not line.endswith(b"\n") or json.loads(line)["tokens"] > tokens:
                break
            kept.append(line)
        self._lines.truncate(sum(map(len, kept)))
        for logger, held in self._loggers:
            for step in range(held or 0, len(kept)):
                logger.experiment.log(json.loads(kept[step]), step=step)
        self.count = len(kept)


def _points_held(logger: WandbLogger) -> int:
    """How many points W&B has of the run that it goes on with."""
    run = logger.experiment
    if not run.offline:
        return run.step
    folder = Path(run.dir).parent
    steps = [-1]
    for earlier in folder.parent.glob(f"offline-run-*-{run.id}"):
        if earlier != folder:
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(earlier)]
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            steps += [_step(json.loads(line)) for line in found.splitlines()]
    return max(steps) + 1


def _step(record: dict[str, Any]) -> int:
    item = record.get("history", {}).get("item", {})
    return item["_step"] if "tokens" in item else -1


def _wandb_loggers(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]
