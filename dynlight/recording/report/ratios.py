"""Ratios of a run's sums: the one place where a sum is divided by a count."""

import math
from typing import Any

import numpy as np


def ratio(above: Any, below: Any) -> Any:
    """Return `above / below`; with nothing to divide by (or a sum that is not finite) None, in arrays NaN."""
    if np.ndim(below):
        return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)
    return float(above) / float(below) if below and above is not None and math.isfinite(above) else None


def nats_per_token(nats: Any, tokens: Any) -> Any:
    """Return `nats / tokens`, or None without tokens; of arrays elementwise, with NaN for None."""
    return ratio(nats, tokens)


def bits_per_byte(nats: Any, bytes: Any) -> Any:
    """Return `nats / (ln 2 · bytes)`, or None without bytes; of arrays elementwise, with NaN for None."""
    return ratio(nats, math.log(2) * bytes)


def word_perplexity(nats: float, words: int) -> float | None:
    """Return `exp(nats / words)`, or None without words and where a float cannot hold it (above e⁷⁰⁹)."""
    nats_per_word = ratio(nats, words)
    return None if nats_per_word is None or nats_per_word > 709 else math.exp(nats_per_word)
