"""Two published methods as slow, obvious loops: torch and a model of transformers, nothing of dynlight.

They score as dynlight does, each token once, the first one (from a prefix) and a document's tail included. Where that is
not what the published script does, its notes say so.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Tokens = Sequence[int]


def windows(tokens: Tokens, prefix: int, segment: int, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [1, at most `window`] and the targets [at most `segment`] that the last of them predict."""
    sequence = torch.tensor([prefix, *tokens])
    for start in range(0, len(tokens), segment):
        stop = min(start + segment, len(tokens))
        yield sequence[None, max(0, stop - window) : stop], sequence[start + 1 : stop + 1]


def nats_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target."""
    logits = model(input_ids=inputs, use_cache=False).logits[0, -len(targets) :]
    return cross_entropy(logits, targets, reduction="none")


def gradient_squares(
    model: nn.Module, weights: Sequence[Tensor], corpus: Sequence[Tokens], prefix: int, block: int, blocks: int
) -> tuple[list[Tensor], int]:
    """The sum over blocks of the squared gradient of a block's mean nats, and how many blocks there were."""
    squares, count = [torch.zeros_like(weight) for weight in weights], 0
    for tokens in corpus:
        for inputs, targets in windows(tokens, prefix, block, block):
            gradients = torch.autograd.grad(nats_of(model, inputs, targets).mean(), weights)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient**2
            count += 1
            if count == blocks:
                return squares, count
    return squares, count


def scaled_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    sizes: Sequence[Tensor],
    documents: Sequence[Tokens],
    prefix: int,
    *,
    block: int,
    lr: float,
    epsilon: float,
) -> list[float]:
    """Nats of each document as the GPT-2 script learns: what is learned of one is carried on to the next.

    Formula: θ ← θ − lr · g / (size + epsilon), with g the gradient of a block's mean nats.
    """
    found = []
    for tokens in documents:
        total = 0.0
        for inputs, targets in windows(tokens, prefix, block, block):
            nats = nats_of(model, inputs, targets)
            total += nats.double().sum().item()  # before the update
            gradients = torch.autograd.grad(nats.mean(), weights)
            with torch.no_grad():
                for weight, gradient, size in zip(weights, gradients, sizes, strict=True):
                    weight -= lr * gradient / (size + epsilon)
        found.append(total)
    return found


class Adapted(nn.Module):
    """A linear map with a low-rank one beside it: y = W x + B A x."""

    def __init__(self, base: nn.Module, a: Tensor) -> None:
        super().__init__()
        self.base, self.initial = base, a
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(a.new_zeros(base.out_features, len(a)))

    def forget(self) -> None:
        with torch.no_grad():
            self.a.copy_(self.initial)
            self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def document_lora(
    model: nn.Module,
    initial: dict[str, Tensor],
    documents: Sequence[Tokens],
    prefix: int,
    *,
    segment: int,
    window: int,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
) -> list[float]:
    """Nats of each document as parameter-golf's record learns: adapters and Adam of its own for each document.

    Args:
        model: whose linear maps are replaced by adapted ones.
        initial: of each map that is adapted, by name, what A begins with; B begins with zeros.
    """
    model.requires_grad_(False)
    adapters = []
    for name, a in initial.items():
        parent, _, child = name.rpartition(".")
        adapters.append(Adapted(model.get_submodule(name), a))
        setattr(model.get_submodule(parent), child, adapters[-1])
    learned = [weight for adapter in adapters for weight in (adapter.a, adapter.b)]
    found = []
    for tokens in documents:
        for adapter in adapters:
            adapter.forget()
        adam = torch.optim.Adam(learned, lr=lr, betas=betas, eps=epsilon)
        total = 0.0
        for inputs, targets in windows(tokens, prefix, segment, window):
            nats = nats_of(model, inputs, targets)
            total += nats.double().sum().item()  # before the update
            adam.zero_grad()
            nats.mean().backward()
            adam.step()
        found.append(total)
    return found
