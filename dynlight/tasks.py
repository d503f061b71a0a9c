"""`python -m dynlight.tasks --tasks X --model_args …`: tasks of lm-evaluation-harness, with a model that learns as it reads."""

import sys
from collections.abc import Sequence

from dynlight.arguments import asks_for_help, refused
from dynlight.errors import SettingError

HELP = """usage: python -m dynlight.tasks --tasks name,name --model_args key=value,key=value

Runs tasks of lm-evaluation-harness with a model that learns as it reads, as
`lm_eval --model dynlight` does where lm-eval finds models of other packages.

  --model_args    settings of dynlight.fit: pretrained=tiny-books,segment=64,memory=256,
                  update=SGD,lr=0.02; or config=X.yaml, and others over it. Of its data
                  together counts alone, its out and loggers don't. With learn=context the context of each request
                  is learned from, too, not only the texts of rolling tasks
  others          of lm-eval: `lm_eval run --help`

exit status: 0; 2 if the settings couldn't be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says; returns the exit status: 0, or 2 if the settings couldn't be run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    try:
        try:
            # Imported here, as it takes seconds and is in an extra; the first of them makes the model known.
            from lm_eval.__main__ import cli_evaluate

            import dynlight.using.harness  # noqa: F401
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "lm_eval":
                raise
            advice = "pip install 'dynlight[lm-eval]'"
            raise SettingError("tasks", "be run by the package lm-eval", got="none", advice=advice) from error
        before, sys.argv = sys.argv, ["lm_eval", "run", "--model", "dynlight", *arguments]
        try:
            cli_evaluate()
        finally:
            sys.argv = before
    except SettingError as error:
        return refused(error)
    except ValueError as error:
        if "asks not found" not in str(error):  # what lm-eval says of a wrong name
            raise
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
