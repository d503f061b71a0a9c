"""`python -m dynlight.audit --config X.yaml`: whether the scores of a run are honest."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from dynlight.arguments import asks_for_help, own_options, refused
from dynlight.errors import SettingError

HELP = """usage: python -m dynlight.audit --config X.yaml [--section.key value ...]
       python -m dynlight.audit --decode --config X.yaml [--documents 0,2] [--tokens 512]
       python -m dynlight.audit --receipt runs/x [--documents 0,2] [--segments 0-7]

Audits the run that X.yaml describes, as a black box, on small pieces of its documents.

  --config X.yaml     a run, and overrides, as for dynlight.fit; audit.json goes to a folder beside the run's: <out>-audit
  --policy            document (default), or stream where reset.every is never: what a document's nats may depend on
  --decode            codes documents by the run's predictions, and decodes them by a model that is loaded anew; --tokens:
                      of each, from the first (default: 512)
  --receipt folder    plays segments of a finished run again and compares them with its receipt.json
  --documents         numbers of the documents to play again, or to decode: 0,2 or 0-3 (default: all; the first three)
  --segments          segments of them to compare (default: all)
  --help              prints this

exit status: 0 honest, 1 not, 2 couldn't be run
"""


def __getattr__(name: str) -> Any:
    # For users who audit a scorer of their own; imported when asked for, as the command's help needn't wait for it.
    if name in ("audit", "Audit", "FreshProcess"):
        from dynlight.auditing import audit

        return getattr(audit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says; returns the exit status: 0 honest, 1 not, 2 couldn't be run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if asks_for_help(arguments):
        print(HELP, end="")
        return 0
    # Imported here, as they take seconds, which the help needn't wait for.
    from dynlight.auditing.audit import audit
    from dynlight.auditing.decoding import decode_again
    from dynlight.auditing.replay import replay
    from dynlight.auditing.run_scorer import AuditedRun
    from dynlight.running.trainer import quiet

    quiet()
    try:
        options, rest = _own_options(arguments)
        if "receipt" in options:
            if rest:
                raise SettingError(rest[0].lstrip("-"), "be left out with receipt", got=" ".join(rest))
            played = replay(options["receipt"], options.get("documents"), options.get("segments"))
            print(played.table())
            return 0 if played.agrees else 1
        if "decode" in options:
            decoded = decode_again(rest, options.get("documents"), options.get("tokens"))
            print(decoded.table())
            return 0 if decoded.honest else 1
        for name, of in (("documents", "receipt or decode"), ("segments", "receipt"), ("tokens", "decode")):
            if name in options:
                raise SettingError(of, f"be given with {name}", got="nothing")
        run = AuditedRun(rest)
        result = audit(run.scorer, policy=options.get("policy", run.policy), **run.knowledge())  # type: ignore[arg-type]
    except SettingError as error:
        return refused(error)
    print(result.table())
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "audit.json"
    path.write_text(json.dumps(run.description() | result.as_dictionary(), indent=1) + "\n")
    print(f"audit   {path}")
    return 0 if result.honest else 1


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The audit's own options, by name, and the arguments that are left, which describe a run."""
    options, rest = own_options(arguments, ("receipt", "documents", "segments", "policy", "tokens"), ("decode",))
    for flag, others in (("decode", ("receipt", "segments", "policy")), ("receipt", ("tokens",))):
        if flag in options and (misplaced := [name for name in others if name in options]):
            raise SettingError(misplaced[0], f"be left out with {flag}", got=options[misplaced[0]])
    if options.get("policy", "document") not in ("document", "stream"):
        raise SettingError("policy", "be document or stream", got=options["policy"])
    return options, rest


if __name__ == "__main__":
    sys.exit(main())
