"""`python -m dynlight.fit --config X.yaml`: one YAML is one run."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlight.arguments import asks_for_help
from dynlight.errors import CallbackFailedError, SettingError
from dynlight.running.help import help_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says.

    Returns the exit status: 0; 1 if the run was cut short by the machine, as by a full disk, or by a callback; 2 if the
    configuration cannot be run (one line on stderr says why); 3 if a document failed on the way; 128 + n if signal n stopped
    it. Of several processes the first alone prints.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(help_text(), end="")
        return 0
    # Imported where they are needed, as they take seconds: the help waits for nothing, a wrong setting for the parser alone.
    from dynlight.recording.signals import Interrupted, Signals
    from dynlight.running.configuration import parse

    config = None
    try:
        with Signals() as signals:
            arguments, resumes = _resumed(arguments)
            config = parse(arguments)
            return _fit(config, resumes, signals)
    except SettingError as error:
        _say(f"error: {error}")
        return 2
    except Interrupted as stop:
        _say(f"stopped by {stop}")
        _say_how_to_resume(config)
        return 128 + stop.signum


def _fit(config: Any, resumes: bool, signals: Any) -> int:
    """Runs a configuration, and returns the exit status."""
    from dynlight.durable import is_out_of_room
    from dynlight.learning.processes.board import ProcessFailedError
    from dynlight.recording.signals import Interrupted
    from dynlight.running.fitting import fit
    from dynlight.running.trainer import quiet

    quiet()
    try:
        summary = fit(config, resumes, signals)
    except (SettingError, Interrupted, SystemExit):  # a process exits that leaves it to the first to say why
        raise
    except (CallbackFailedError, ProcessFailedError) as failure:
        _say_how_to_resume(config)
        _say(f"error: {failure}")
        return failure.status
    except BaseException as error:
        _say_how_to_resume(config)
        if not is_out_of_room(error):
            raise
        reason = os.strerror(error.errno)  # type: ignore[arg-type] # it has one
        _say(f"error: out must be where there is room, got {_folder(config)}: {reason}")
        return 1
    return _say_what_failed(summary)


def _say_what_failed(summary: dict[str, Any]) -> int:
    """One line for each document and callback that failed; returns the exit status."""
    for document in summary["failed"]:
        where = "" if document["segment"] is None else f" in segment {document['segment']}"
        _say(
            f"error: document {document['name']} must be read to its end, got stopped{where} as {document['reason']}; "
            "lower update.lr or set clip (its sums are kept out of the totals)"
        )
    for document in summary["finished_static"]:
        _say(
            f"warning: document {document['name']} was read by the initial weights from segment {document['segment']} on, "
            f"as {document['reason']}; lower update.lr or set clip"
        )
    for failure in summary["callbacks"]:
        _say(f"error: {failure}")
    return 3 if summary["failed"] else 1 if summary["callbacks"] else 0


def _resumed(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments with `--resume runs/x` replaced by the configuration that this run left, and whether it was given."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--resume", type=Path)
    try:
        known, others = flag.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise SettingError("resume", "be given a value", got="nothing") from error
    if known.resume is None:
        return arguments, False
    if any(argument.partition("=")[0] in ("--config", "--out") for argument in others):
        raise SettingError(
            "resume", "stand without config and out, as a run has its own", got="both", advice="leave one out"
        )
    if not (known.resume / "config.yaml").is_file():
        raise SettingError(
            "resume", "be the folder of an unfinished run", got=known.resume, advice="it has no config.yaml"
        )
    return ["--config", str(known.resume / "config.yaml"), *others, "--out", str(known.resume)], True


def _say_how_to_resume(config: Any) -> None:
    from dynlight.recording.resume import how_to_resume, is_unfinished

    if config is not None and is_unfinished(_folder(config)):
        _say(f"go on with: {how_to_resume(_folder(config))}")


def _folder(config: Any) -> Path:
    from dynlight.running.configuration import folder_of

    return folder_of(config)


def _say(line: str) -> None:
    from dynlight.recording.report.text import one_line

    print(one_line(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
