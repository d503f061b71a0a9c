"""Loggers: each gets each point of a run once, however often the run is cut short; and all that is W&B's.

wandb is imported only where it is used: importing it takes a second.
"""

import json
import math
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dynlight.durable import is_out_of_room, sync_to_disk
from dynlight.errors import SettingError, told
from dynlight.recording.names import COST, DOCUMENTS, REPORT, over
from dynlight.recording.report.tables import documents_table

_FAILED: weakref.WeakSet[Logger] = weakref.WeakSet()  # loggers that have raised


def place_loggers(trainer: Namespace, folder: Path, versions: Sequence[Sequence[Any]], resumes: bool) -> None:
    """Sets, in a trainer's settings, where W&B writes, and the version with which each logger goes on.

    Args:
        trainer: the settings; W&B keeps its files in the run's folder unless they say otherwise.
        folder: the run's.
        versions: what `open_loggers` returned when the run began.
        resumes: whether the run goes on.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for number, logger in enumerate(loggers):
        kind = logger.class_path.rpartition(".")[2] if isinstance(logger, Namespace) else None
        earlier = [version for name, version in versions[number : number + 1] if name == kind]
        if kind == WandbLogger.__name__:
            if logger.init_args.save_dir == ".":
                logger.init_args.save_dir = str(folder)
            logger.init_args.id = earlier[0] if earlier else logger.init_args.id
        elif kind in (CSVLogger.__name__, TensorBoardLogger.__name__):
            logger.init_args.version = earlier[0] if earlier else logger.init_args.version
            if resumes and kind == TensorBoardLogger.__name__:
                logger.init_args.purge_step = 0  # TensorBoard gets all points again, and hides the earlier ones


def open_loggers(loggers: Sequence[Logger], settings: dict[str, Any]) -> list[list[Any]]:
    """Opens the run of each logger, and gives it the run's configuration.

    Where no account is set up, W&B keeps the run on disk instead of asking for a login.

    Returns:
        [class's name, version] of each logger, by which it can go on; the version is None if it is no int or str.

    Raises:
        SettingError: if a logger cannot be opened, as W&B where it cannot be reached.
    """
    try:
        return _opened(loggers, settings)
    except SettingError:
        raise
    except Exception as error:
        raise SettingError("trainer.logger", "be what can log here", got=told("one that raises", error)) from error


def _opened(loggers: Sequence[Logger], settings: dict[str, Any]) -> list[list[Any]]:
    with warnings.catch_warnings():
        # A CSVLogger begins its file anew, and is right to: a run that goes on logs all points again.
        warnings.filterwarnings("ignore", ".*exists and is not empty. Previous log files in this directory will be.*")
        for logger in loggers:
            if isinstance(logger, CSVLogger):
                _ = logger.experiment
    _open_wandb(_wandb_loggers(loggers), settings)
    for logger in loggers:
        if not isinstance(logger, WandbLogger):  # which has it, nested as in the YAML
            attempt(logger, logger.log_hyperparams, settings)
    versions = ((type(logger).__name__, logger.version) for logger in loggers)
    return [[name, version if isinstance(version, int | str) else None] for name, version in versions]


def _open_wandb(ours: Sequence[WandbLogger], settings: dict[str, Any]) -> None:
    if not ours:
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
            raise SettingError(
                "trainer.logger",
                "be a WandbLogger that reaches W&B",
                got=f"one that says: {reason}",
                advice="set WANDB_MODE=offline",
            ) from error
        run.config.update(settings, allow_val_change=True)
        if run.url:
            print(f"W&B     {run.url}")


def close_loggers(loggers: Iterable[Logger], folder: Path, summary: dict[str, Any]) -> None:
    """Sends W&B the end of a run: its totals, the table of documents, and the report with its pictures."""
    for logger in _wandb_loggers(loggers):
        attempt(logger, _close_wandb, logger, folder, summary)
        if logger in _FAILED:  # what it got by then stays
            with suppress(Exception):
                logger.experiment.finish()


def _close_wandb(logger: WandbLogger, folder: Path, summary: dict[str, Any]) -> None:
    import wandb

    run = logger.experiment
    documents = documents_table(folder).astype(object)
    results: dict[str, Any] = {DOCUMENTS: wandb.Table(dataframe=documents.where(documents.notna(), None))}
    if (folder / "report.html").exists():
        results[REPORT] = wandb.Html((folder / "report.html").read_text(), inject=False)
    run.log(results)
    run.summary.update({name: value for name, value in summary.items() if value is not None})
    run.finish()
    if run.offline:
        place = Path(run.dir).parent
        place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
        print(f"W&B     {place}\n        offline: `wandb leet` shows it, `wandb sync` uploads it")


def attempt(logger: Logger, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Calls what a logger is told by. A logger that raises costs no result: it is said once, and the logger told no more."""
    if logger in _FAILED:
        return None
    try:
        return call(*arguments, **settings)
    except Exception as error:
        if is_out_of_room(error):
            raise
        _FAILED.add(logger)
        got = told(type(logger).__name__, error)
        print(f"warning: trainer.logger must not raise, got {got}; the run goes on without it", file=sys.stderr)


def watch(loggers: Iterable[Logger]) -> None:
    """Has the Trainer tell loggers by `attempt`, too."""
    for logger in loggers:
        for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
            setattr(logger, name, partial(attempt, logger, getattr(logger, name)))


def define_series(loggers: Iterable[Logger], axes: Iterable[str], series: Iterable[str], costs: Iterable[str]) -> None:
    """Has W&B draw each series over each axis, and costs over the tokens read, without a setting."""
    for logger in _wandb_loggers(loggers):
        attempt(logger, _define_series, logger.experiment, tuple(axes), tuple(series), tuple(costs))


def _define_series(run: Any, axes: Iterable[str], series: Iterable[str], costs: Iterable[str]) -> None:
    for axis in axes:
        run.define_metric(axis, hidden=True)
        for name in series:
            summary = None if axis == "tokens" else "none"  # each series stands once in the run's summary
            run.define_metric(over(axis, name), step_metric=axis, summary=summary)
    for name in costs:
        run.define_metric(name, step_metric="tokens")


class Points:
    """The points of a run's series: each logger gets each of them once, however often the run is cut short.

    Until the run ends, points are lines of a file; each is written there before it is logged. A run that goes on logs

    | logger | which points |
    |---|---|
    | W&B, which never goes back | those that it hasn't got |
    | CSV, TensorBoard, which begin anew | all |
    | any other, of which nothing is known | those after the checkpoint |

    Args:
        loggers: of the run.
        file: of the points; None: there is none, as such a run can't go on.
        resumes: whether the run goes on.
    """

    def __init__(self, loggers: Iterable[Logger], file: Path | None, resumes: bool = False) -> None:
        self.count = 0
        self._lines: IO[bytes] | None = None
        self._file = file
        self._resumes = resumes
        self._loggers = [(logger, attempt(logger, _points_logged, logger) if resumes else 0) for logger in loggers]
        if file is not None and self._loggers:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = file.open("ab" if resumes else "wb", buffering=0)
            weakref.finalize(self, self._lines.close)  # of a run that fails, whose last checkpoint still asks for it

    def add(self, point: dict[str, dict[str, float]]) -> None:
        """Logs the next point: its `axes`, `series`, `costs` and `weights`, each name → value."""
        if self._lines is not None:
            self._lines.write(json.dumps(point).encode() + b"\n")
        for logger, logged in self._loggers:
            if logged is None or self.count >= logged:
                attempt(logger, _log, logger, point, self.count, self._resumes)
        self.count += 1

    def sync(self) -> int:
        """Waits until all points are on disk, and returns how many there are."""
        if self._lines is not None and self._file is not None:
            sync_to_disk(self._file)
        return self.count

    def go_on(self, count: int | None = None, tokens: float = math.inf) -> None:
        """Drops all but the first `count` points, or those of the first `tokens` tokens, and logs those that loggers lack."""
        if self._lines is None or self._file is None:
            self.count = count or 0
            return
        kept = []
        for line in self._file.read_bytes().splitlines(keepends=True)[:count]:
            if not line.endswith(b"\n") or json.loads(line)["axes"]["tokens"] > tokens:
                break
            kept.append(line)
        self._lines.truncate(sum(map(len, kept)))
        for logger, logged in self._loggers:
            for step in range(len(kept) if logged is None else logged, len(kept)):
                attempt(logger, _log, logger, json.loads(kept[step]), step, self._resumes)
        self.count = len(kept)

    def end(self) -> None:
        """Has loggers write their points to disk, as the file of points is removed when the run ends."""
        for logger, _ in self._loggers:
            if isinstance(logger, CSVLogger):
                attempt(logger, logger.save)
            elif isinstance(logger, TensorBoardLogger):
                attempt(logger, logger.experiment.flush)


def _log(logger: Logger, point: dict[str, dict[str, float]], step: int, resumes: bool) -> None:
    """Gives a logger one point; `step` is the point's number."""
    axes, series, costs, weights = (point[group] for group in ("axes", "series", "costs", "weights"))
    if not isinstance(logger, WandbLogger):
        logger.log_metrics(axes | series | costs | weights, step)
        return
    drawn = {over(axis, name): value for axis in axes for name, value in series.items()}
    drawn |= {COST + name: cost for name, cost in costs.items()}
    if resumes:
        logger.experiment.log(axes | drawn | weights, step=step)
    else:  # W&B counts steps by itself, so that a user's callbacks may log beside
        logger.log_metrics(axes | drawn | weights)


def _points_logged(logger: Logger) -> int | None:
    """How many points of an earlier part of the run a logger has; None: unknown, so those up to the checkpoint count."""
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return 0
    if not isinstance(logger, WandbLogger):
        return None
    run = logger.experiment
    if not run.offline:
        return run.step
    # The last points may not have come to disk when the run was killed, so W&B's own files say how many there are.
    folder = Path(run.dir).parent
    steps = [-1]
    for earlier in folder.parent.glob(f"offline-run-*-{run.id}"):
        if earlier != folder:
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(earlier)]
            lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
            steps += [_step(json.loads(line)) for line in lines]
    return max(steps) + 1


def _step(record: dict[str, Any]) -> int:
    """The number of the point that a record of W&B holds; −1: it holds none."""
    item = record.get("history", {}).get("item", {})
    return item["_step"] if "tokens" in item else -1


def _wandb_loggers(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]
