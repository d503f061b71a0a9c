"""`python -m dynlight.dashboard --project X`: a workspace on W&B that draws what the runs of a project log."""

import sys
from collections.abc import Sequence

from dynlight.arguments import asks_for_help, own_options, refuse_others, refused
from dynlight.errors import SettingError, require

HELP = """usage: python -m dynlight.dashboard --project X [--entity E] [--group key]

Makes the workspace `dynlight` of a project on W&B, or renews it: scores over FLOPs and
over tokens, gain, experts, documents, costs, and runs beside each other. Sections and
settings that you added to it stay.

  --project X    the project on W&B, as in trainer.logger.init_args.project
  --entity E     the user or team that owns it (default: the account's own)
  --group key    a setting of the YAML by which runs of a sweep are grouped (default:
                 update.init_args.lr)
  --help         prints this

It needs the package wandb-workspaces (pip install 'dynlight[wandb]') and an account (`wandb login`).
exit status: 0 saved, 2 couldn't be
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Saves the workspace that the command line names; returns the exit status: 0 saved, 2 couldn't be."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    names = ("project", "entity", "group")
    try:
        options, rest = own_options(arguments, names)
        refuse_others(rest, names)
        require(
            not rest and "project" in options, "project", "be given as --project X", got=" ".join(rest) or "nothing"
        )
        group = options.get("group", "update.init_args.lr")
        address, is_renewed = _save(options["project"], options.get("entity"), group)
    except SettingError as error:
        return refused(error)
    print(f"{'renewed' if is_renewed else 'made':8}{address}")
    return 0


def _save(project: str, entity: str | None, group: str) -> tuple[str, bool]:
    # Imported here, as the help needn't wait for it, and as the package may not be there.
    try:
        from dynlight.recording.dashboard import save
    except ModuleNotFoundError as error:
        advice = "pip install 'dynlight[wandb]'"
        raise SettingError("wandb-workspaces", "be installed", got=str(error), advice=advice) from error
    return save(project, entity, group)


if __name__ == "__main__":
    sys.exit(main())
