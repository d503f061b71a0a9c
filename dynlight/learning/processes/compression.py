"""Compression: gradients that processes send each other in fewer bytes, as a hook of `ddp`."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from dynlight.errors import require

_BITS = (1, 2, 4, 8)


class CompressedGradients:
    """What `compressed_hook` sends of a gradient: its greatest numbers, or all of them in few bits; the rest with the next one.

    Formula: u = e + g; each process sends C(u), of which all take the mean; e ← u − C(u). Of the n numbers that are sent together
    (all, with `bucket_cap_mb: 1000`) C keeps the round(share · n) that are greatest by size, as numbers and places, 8 bytes each;
    or rounds to `bits`: of 1 to sign(u) · mean|u|, of more to 2^bits − 1 even levels from −max|u| to max|u|. `Compressed` does the
    same in one process, weight by weight, to show what it costs in loss. Source: Stich et al. 2018 (arXiv 1809.07599).

    Args:
        share: of the numbers that are sent, above 0 and at most 1; null where `bits` is given.
        bits: of each number, 1, 2, 4 or 8; null where `share` is given.

    Raises:
        SettingError: unless one of the two is given, and in range.
    """

    def __init__(self, share: float | None = None, bits: int | None = None) -> None:
        setting = "trainer.strategy.ddp_comm_state"
        both = f"share {share} and bits {bits}"
        require((share is None) != (bits is None), f"{setting}.share", "be given, or bits, but not both", got=both)
        require(share is None or 0 < share <= 1, f"{setting}.share", "be above 0 and at most 1", got=share)
        require(bits is None or bits in _BITS, f"{setting}.bits", "be 1, 2, 4 or 8", got=bits)
        self.share = share
        self.bits = bits
        self.bytes_sent = 0  # by this process
        self.bytes_whole = 0  # that whole gradients would have been
        self._errors: dict[int, Tensor] = {}  # of each bucket

    def exchanged(self, gradient: Tensor, bucket: int = 0) -> Tensor:
        """The mean of what all processes send of their gradients, [n]."""
        wanted = gradient + self._errors[bucket] if bucket in self._errors else gradient
        parts = self.packed(wanted)
        left = wanted - self.unpacked(parts, gradient)
        self._errors[bucket] = left.nan_to_num(
            nan=0.0, posinf=0.0, neginf=0.0
        )  # of a document that failed nothing is left
        self.bytes_sent += sum(part.nbytes for part in parts)
        self.bytes_whole += gradient.nbytes
        count = dist.get_world_size()
        gathered = [[torch.empty_like(part) for _ in range(count)] for part in parts]
        for all_of, part in zip(gathered, parts, strict=True):
            dist.all_gather(all_of, part)
        total = torch.zeros_like(gradient)
        for rank in range(count):  # in the same order everywhere, so that the weights stay the same to the last bit
            total += self.unpacked([all_of[rank] for all_of in gathered], gradient)
        return total / count

    def packed(self, values: Tensor) -> list[Tensor]:
        """What is sent of a gradient, [n]: numbers and their places, or a size and levels of so many bits in bytes."""
        if self.share is not None:
            places = values.abs().topk(max(1, round(self.share * len(values)))).indices
            return [values[places], places.to(torch.int32)]
        assert self.bits is not None, "one of the two is given"
        if self.bits == 1:
            size, levels = values.abs().mean(), (values >= 0).to(torch.uint8)
        else:
            steps = 2 ** (self.bits - 1) - 1
            size = values.abs().amax()
            levels = ((values / size.clamp(min=torch.finfo(values.dtype).tiny)).nan_to_num() * steps).round() + steps
        per_byte = 8 // self.bits
        filled = torch.nn.functional.pad(levels.to(torch.uint8), (0, -len(values) % per_byte)).view(-1, per_byte)
        shifts = self.bits * torch.arange(per_byte, device=values.device, dtype=torch.uint8)
        return [size[None], (filled << shifts).sum(dim=1, dtype=torch.uint8)]

    def unpacked(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The gradient, [n], of what was sent."""
        if self.share is not None:
            numbers, places = parts
            return torch.zeros_like(like).index_put((places.long(),), numbers)
        assert self.bits is not None, "one of the two is given"
        size, packed = parts
        per_byte = 8 // self.bits
        shifts = self.bits * torch.arange(per_byte, device=like.device, dtype=torch.uint8)
        levels = ((packed[:, None] >> shifts) & (2**self.bits - 1)).flatten()[: len(like)].to(like.dtype)
        if self.bits == 1:
            return (2 * levels - 1) * size
        steps = 2 ** (self.bits - 1) - 1
        return (levels - steps) / steps * size


# DDP asks for this annotation, which torch exports without a type.
def compressed_hook(state: CompressedGradients, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """The hook of `ddp` that sends gradients as `CompressedGradients` says."""
    done: Future[Tensor] = Future()
    done.set_result(state.exchanged(bucket.buffer(), bucket.index()))
    return done
