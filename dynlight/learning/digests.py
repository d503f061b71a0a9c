"""Digests: short names of learned weights, by which a receipt shows that nothing changed between two commits."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynlight.learning.fetch import Later


class WeightDigests:
    """The digests of some documents' learned weights; see `digest_of`.

    Args:
        sums: of the bits of each row's weights, int64 [R, weights].
        rows_of: of each document, its rows.
    """

    def __init__(self, sums: Later, rows_of: Sequence[Sequence[int]]) -> None:
        self._sums = sums
        self._rows_of = rows_of

    def names(self) -> list[str]:
        """The digest of each document."""
        sums = self._sums().numpy()
        return [digest_of(b"".join(sums[row].tobytes() for row in rows)) for rows in self._rows_of]


def hash_of(data: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(sums: bytes) -> str:
    """The digest of weights with these sums of bits.

    Formula: the first 16 digits of SHA-256 over Σ_j b_j mod 2⁶⁴ of each weight, b its bits as 64-bit integers. A hash of
    all bytes would take as long as half the learning; this takes as long as reading them once. The sum
    changes with any single weight, and with several unless their changes cancel to the last bit.
    """
    return hash_of(sums)[:16]


def sums_of_bits(weight: Tensor, start: int = 0) -> Tensor:
    """Σ of each row's bits as 64-bit integers, int64 [rows]; learned weights are fp32, two to an integer.

    Of a shard, which begins at number `start` of a weight, it is the shard's summand in the sum over the whole weight.
    """
    if start % 2 or weight.shape[1] % 2:
        weight = torch.nn.functional.pad(weight, (start % 2, (start + weight.shape[1]) % 2))
    integers = weight.contiguous().view(torch.int64)
    if integers.device.type == "cpu":
        # numpy adds in one thread: torch's many wait for each other longer than they add, where cores are shared.
        return torch.from_numpy(np.add.reduce(integers.numpy(), axis=1))
    return integers.sum(1)
