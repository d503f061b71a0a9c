"""The model card: the README.md of a pretrained model, from the template `card.md.jinja`."""

import math
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dynlight.pretraining.learning import Pretraining
from dynlight.pretraining.windows import TextWindows

# What a card shows of an architecture, where the model's config has it.
SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)
CARD_ROWS = 13


def model_card(
    name: str, texts: list[str], data: TextWindows, module: Pretraining, settings: dict[str, Any], about: str
) -> str:
    """Return the card of a model, in Markdown: what is known of a run when it ends.

    Args:
        name: of the model.
        texts: the documents.
        data: the windows that were read of them.
        module: that learned, with its curve.
        settings: the run's configuration, without paths.
        about: a paragraph about where the data come from.
    """
    model, config = module.model, module.model.config
    bytes_in_all, tokens = sum(len(text.encode()) for text in texts), len(data.stream)
    bytes_per_token = bytes_in_all / max(1, tokens - len(texts))  # a document's BOS stands for none of its bytes
    tokens_read = module.curve[-1][0] if module.curve else 0
    # Markdown is no HTML: nothing is escaped.
    environment = jinja2.Environment(
        autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8")).render(
        name=name,
        architecture=type(model).__name__,
        weights=model.num_parameters(),
        about=about,
        documents=len(texts),
        bytes=bytes_in_all,
        tokens=tokens,
        bytes_per_token=bytes_per_token,
        shape=[f"{key} {getattr(config, key)}" for key in SHAPE if hasattr(config, key)],
        has_tied_embeddings=config.tie_word_embeddings,
        is_fine_tuned="pretrained" in settings["model"],
        tokens_read=tokens_read,
        passes=tokens_read / tokens,
        hours=module.seconds / 3600,
        updates=module.updates,
        settings=yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110).strip(),
        curve=[
            (tokens_so_far, seconds / 3600, nats, nats / bytes_per_token / math.log(2))
            for tokens_so_far, seconds, nats in evenly_spaced(module.curve)
        ],
    )


def evenly_spaced(curve: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Return at most CARD_ROWS rows of a curve, its first and its last among them."""
    last = len(curve) - 1
    rows = [curve[round(i * last / (CARD_ROWS - 1))] for i in range(CARD_ROWS)] if curve else []
    return list(dict.fromkeys(rows))
