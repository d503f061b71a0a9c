"""Fetch: how the host gets numbers from the device, all in one wait.

A host that asks for a number waits until the device has done all its work, and the device then idles until it is given
more. So what a segment's score needs (nats, whether gradients are finite, digests) is asked for while work is queued, and
comes over together when the first of it is used.
"""

import torch
from torch import Tensor


class Fetch:
    """What the host has asked for and the device has not sent yet."""

    def __init__(self) -> None:
        self._asked: list[Later] = []

    def later(self, value: Tensor) -> "Later":
        """Asks for a value, which comes with all others once one of them is used."""
        self._asked.append(Later(self, value.detach()))  # a value with its graph would hold all activations
        return self._asked[-1]

    def bring(self) -> None:
        """Waits for the device, once, and brings all that was asked for; `Later` calls it."""
        # As bytes of one tensor, those of wide types first, so that each begins at a multiple of its width.
        asked, self._asked = sorted(self._asked, key=lambda later: -later.value.itemsize), []
        values = [later.value.contiguous() for later in asked]
        sent = torch.cat([value.flatten().view(torch.uint8) for value in values]).cpu()
        parts = sent.split([value.nbytes for value in values])
        for later, value, part in zip(asked, values, parts, strict=True):
            later.value, later.has_arrived = part.view(value.dtype).view(value.shape), True


class Later:
    """A value that the host has asked for; called, it is there.

    Args:
        fetch: what brings it.
        value: on the device, until it has arrived on the host.
    """

    def __init__(self, fetch: Fetch, value: Tensor) -> None:
        self._fetch = fetch
        self.value = value
        self.has_arrived = False

    def __call__(self) -> Tensor:
        """The value on the host; the first of those that are on their way waits for all."""
        if not self.has_arrived:
            self._fetch.bring()
        return self.value
