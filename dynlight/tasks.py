"""`python -m dynlight.tasks --tasks X --model_args …`: tasks of lm-evaluation-harness, with a model that learns as it reads."""

import sys
from collections.abc import Sequence

from dynlight.errors import SettingError

HELP = """usage: python -m dynlight.tasks --tasks name,name --model_args pretrained=X,segment=64,memory=256,update=SGD,lr=0.02

Runs tasks of lm-evaluation-harness, as `lm_eval --model dynlight` does where lm-eval finds models of other packages.

  --model_args    config=X.yaml, and settings over it, as for dynlight.fit: update=AdamW,lr=1e-3,parameters=LoRA,rank=8
                  learn=context: learns from the context of each request, too, not only from texts of rolling tasks
  others          of lm-eval: `lm_eval run --help`

exit status: 0; 2 if the settings couldn't be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says; returns the exit status: 0, or 2 if the settings couldn't be run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
