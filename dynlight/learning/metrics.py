"""Metrics: prequential sums, and the ratios made of them, each in one place.

Sums are kept raw (nats in float64, counts in int64) and divided once, at the end: a mean of ratios would weigh a short
segment like a long one.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PrequentialSum(Metric):
    """Nats of tokens each scored before it was learned, with the counts to divide them by.

    Formula: `compute()` = Σ nats / Σ tokens, in nats per token; NaN before the first token.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: float, tokens: int, bytes: int) -> None:
        """Adds the nats of some tokens, and the bytes that they stand for."""
        self.nats += nats
        self.tokens += tokens
        self.bytes += bytes

    def sums(self) -> dict[str, Any]:
        """What `add` takes."""
        return {"nats": self.nats.item(), "tokens": int(self.tokens), "bytes": int(self.bytes)}

    def compute(self) -> Tensor:
        return self.nats / self.tokens
