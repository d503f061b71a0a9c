"""Help: what `python -m dynlight.fit --help` prints.

Importing the choices would take seconds, so the names of their classes are read from their files; classes that a user's
code has defined by then are listed too.
"""

import ast
import sys
import textwrap
from pathlib import Path

from dynlight.choices.known import known_subclasses

_CHOICES = Path(__file__).parents[1] / "choices"
_HELP = """usage: python -m dynlight.fit --config X.yaml [--section.key value ...]

Reads documents segment by segment: each is scored, then learned from.

  --config X.yaml   a run; values behind it override it, e.g. --update.lr 1e-3
  --resume runs/X   goes on with a run that was cut short, to the same numbers
  --print_config    prints the whole configuration, every default in it, as YAML
  --help            prints this

the choices
{choices}

around them
  model             what is evaluated: pretrained (Hub, folder, tiny-books),
                    gguf_file, tokenizer, revision, dtype, attention, compile
  data              what is read: path, data_files, split, text_column,
                    documents, max_tokens, together, streaming
  reference         static: the initial weights score the same windows; null:
                    they do not
  teacher           a model that reads beside, and may be learned from
  clip              the largest gradient norm of a document; null: no bound
  rates             learning rates that each learn from every document
  rate_factors      of the learning rate, by a regular expression in names
  trainer           Lightning's Trainer: accelerator, devices, precision,
                    strategy (document_parallel, model_parallel), num_nodes,
                    logger, callbacks
  on_failure        of a document whose numbers go wrong: stop, or static
  checkpoint, keep  minutes between two checkpoints; adapters or weights
  seed              of everything random
  out, overwrite    the run's folder (default: runs/<name of the file>), and
                    whether to replace it
"""


def help_text() -> str:
    """The whole help, for a terminal of 80 columns."""
    rules = ", ".join(["torch.optim's", *subclasses("update", "Optimizer")])
    choices = {
        "context": f"what is scored, behind what: {', '.join(subclasses('context', 'Context'))}",
        "parameters": f"which weights may learn: {', '.join(subclasses('parameters', 'Parameters'))}",
        "objective": f"what is learned: {', '.join(subclasses('objective', 'Objective'))}",
        "update": f"how weights change: {rules}; null: static",
        "gradient": f"changes of the gradient: {', '.join(subclasses('gradient', 'Gradient'))}",
        "schedule": "when: every, passes, above, above_mean",
        "reset": "when it is forgotten: every (document or never), keep",
        "mixture": "how rates predict together: {}: none need be chosen",
        "memories": f"experts that remember: {', '.join(subclasses('memories', 'DocumentMemory'))}",
    }
    lines = [
        textwrap.fill(text, 79, initial_indent=f"  {name:18}", subsequent_indent=" " * 20)
        for name, text in choices.items()
    ]
    return _HELP.format(choices="\n".join(lines))


def subclasses(section: str, base: str) -> list[str]:
    """The names of the classes of a section: those in its file, and those that are defined elsewhere by now."""
    tree = ast.parse((_CHOICES / f"{section}.py").read_text("utf-8"))
    own = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and base in map(ast.unparse, node.bases)]
    parent = getattr(sys.modules.get(f"dynlight.choices.{section}"), base, None)
    defined = [each.__name__ for each in known_subclasses(parent)] if parent is not None else []
    return list(dict.fromkeys([*own, *defined]))
