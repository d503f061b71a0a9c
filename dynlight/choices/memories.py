"""Memories: what is remembered of a document besides the weights, as experts of the mixture.

A memory stands over other experts, the static model or the rules that learn, and makes of the prediction of each another one,
from the tokens that it has read. The mixture learns from past tokens how much weight it gets. Nothing is hashed: counts are exact, and
each prediction is a distribution over the whole vocabulary. A new choice is a class with `read` and `flops`, with `needs` where it
asks more of its bases than nats, and with a `__str__` by which its experts are named.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dynlight.errors import require, require_at_least

State = dict[Any, Any]  # what a memory keeps: tensors and plain data; empty at first, and after each reset
STATIC = -1  # the number of the static model as a base; a rule has its own


@dataclass(frozen=True)
class Base:
    """What an expert makes of the tokens of a segment of one document.

    Shapes: S tokens, a vocabulary of V, H wide. Where the expert has failed all is NaN from that token on.
    """

    nats: np.ndarray  # of each token, float64 [S]; none where the token is not known yet
    states: Tensor | None  # of the last layer, from which each token is predicted, [S, H]
    logits: Tensor | None  # [S, V]


class DocumentMemory(ABC):
    """Predicts the tokens of a document from those before them, over the prediction of another expert.

    Args:
        over: `learned`, one expert over each rule that learns (where nothing learns, over the static model); or `static`.

    Raises:
        SettingError: if it is neither.
    """

    needs: ClassVar[tuple[Literal["logits", "states"], ...]] = ()  # of its bases

    def __init__(self, over: Literal["learned", "static"]) -> None:
        require(over in ("learned", "static"), "memories.over", "be learned or static", got=over)
        self.over = over

    @abstractmethod
    def read(
        self, state: State, tokens: Tensor, bases: Mapping[int, Base], begins: bool = True
    ) -> Mapping[int, np.ndarray]:
        """The nats of tokens, [S], float64, over each base, each from the tokens before it; then all are remembered.

        Args:
            state: what is remembered of the document, which is changed.
            tokens: that are read, int64 [S].
            bases: by a number that stays the same through a document; some may be missing from a segment on.
            begins: whether a document begins with the tokens; the state may be of documents before it.
        """

    def predict(self, state: State, bases: Mapping[int, Base], begins: bool = False) -> Mapping[int, np.ndarray]:
        """Ln p(x) of each token x of the vocabulary as the next one, float64 [V], over each base; nothing is remembered.

        What `read` would say of x, for every x. A memory that can say it at once does; this asks `read` V times.

        Args:
            state: what is remembered of the document, which is not changed.
            bases: what they make of the next token alone, S = 1, with logits, and with states where the memory needs them.
            begins: as of `read`.
        """
        log_chances = {number: log_chances_of(base) for number, base in bases.items()}
        found = {number: np.empty_like(each) for number, each in log_chances.items()}
        for token in range(max((len(each) for each in log_chances.values()), default=0)):
            own = {number: replace(base, nats=-log_chances[number][[token]]) for number, base in bases.items()}
            for number, nats in self.read(copy_of(state), torch.tensor([token]), own, begins).items():
                found[number][token] = -nats[0]
        return found

    @abstractmethod
    def flops(self, remembered: int, width: int, vocabulary: int) -> int:
        """Floating-point operations that a token costs over one base, behind so many tokens of the document."""


class NeuralCache(DocumentMemory):
    """The tokens that followed when the model was in a similar state: a cache of its last hidden states.

    Formula: p(x) = (1 − share) · p_base(x) + share · p_cache(x) at hidden state h, with
    p_cache(x) ∝ Σ_i 1[x_i = x] exp(flatness · h·h_i) over the last `size` tokens x_i of the document, h_i the state that predicted
    x_i. The first token, behind which there is nothing, has p_base alone. Source: Grave et al. 2017 (arXiv 1612.04426).

    Args:
        size: how many tokens are remembered, at least 1.
        flatness: θ, at least 0; 0 counts tokens, whatever the state.
        share: of the prediction that the cache has, at least 0 and under 1.
        over: see `DocumentMemory`.

    Raises:
        SettingError: if a number is out of range.
    """

    needs = ("states",)

    def __init__(
        self, size: int, flatness: float, share: float, over: Literal["learned", "static"] = "learned"
    ) -> None:
        super().__init__(over)
        require_at_least("memories.size", 1, size)
        require(0 <= flatness < math.inf, "memories.flatness", "be at least 0 and finite", got=flatness)
        require(0 <= share < 1, "memories.share", "be at least 0 and under 1", got=share)
        self.size = size
        self.flatness = flatness
        self.share = share

    def read(
        self, state: State, tokens: Tensor, bases: Mapping[int, Base], begins: bool = True
    ) -> Mapping[int, np.ndarray]:
        kept = state.get("states", {})
        known = torch.cat([state["tokens"], tokens]) if state else tokens
        before = len(known) - len(tokens)
        # Of each token that is read those that it is predicted from: those before it, up to `size` of them.
        distance = before + torch.arange(len(tokens))[:, None] - torch.arange(len(known))
        is_in_view = ((distance > 0) & (distance <= self.size)).to(tokens.device)
        is_same = known == tokens[:, None]
        nats, states = {}, {}
        for number, base in bases.items():
            assert base.states is not None, "it needs them"
            own = torch.cat([kept[number], base.states]) if number in kept else base.states
            closeness = self.flatness * (base.states.double() @ own.double().T)  # in double, as exponents may be large
            closeness = closeness.masked_fill(~is_in_view, -math.inf)
            recalled = closeness.masked_fill(~is_same, -math.inf).logsumexp(1) - closeness.logsumexp(1)
            mixed = _mixed(base.nats, recalled.cpu().numpy(), self.share)
            nats[number] = np.where(is_in_view.any(1).cpu().numpy(), mixed, base.nats)
            states[number] = own[-self.size :]
        state |= {"tokens": known[-self.size :], "states": states}
        return nats

    def predict(self, state: State, bases: Mapping[int, Base], begins: bool = False) -> Mapping[int, np.ndarray]:
        found = {}
        for number, base in bases.items():
            assert base.states is not None, "it needs them"
            found[number] = log_chances = log_chances_of(base)
            if state:
                closeness = self.flatness * (base.states.double() @ state["states"][number].double().T)
                shares = closeness[0].softmax(0).cpu().numpy()
                recalled = np.bincount(state["tokens"].cpu().numpy(), shares, len(log_chances))
                with np.errstate(divide="ignore"):  # ln 0 is −∞
                    found[number] = -_mixed(-log_chances, np.log(recalled), self.share)
        return found

    def flops(self, remembered: int, width: int, vocabulary: int) -> int:
        return 2 * width * min(remembered, self.size)

    def __str__(self) -> str:
        return f"neural cache({self.size}, flatness {self.flatness:g}, share {self.share:g})"


class NGrams(DocumentMemory):
    """Which tokens followed the last few tokens, counted in the document, the base expert where it has seen too little.

    Formula: p_n(x) = (c(x) + concentration · p_{n−1}(x)) / (c + concentration), with c how often the last n tokens were followed
    by another in the document, c(x) how often by x, for n from `shortest` to order − 1, below which stands the base expert.
    Source: MacKay & Peto 1995, "A hierarchical Dirichlet language model".

    Args:
        order: one more than the tokens of the longest context.
        concentration: κ, how many tokens the lower order weighs as much as, above 0; .inf: the base expert alone.
        shortest: tokens of the shortest context, under `order`. What is counted behind 0 or 1 tokens says less than any
            language model, but has been counted so often that it would outweigh it.
        over: see `DocumentMemory`.

    Raises:
        SettingError: if a number is out of range.
    """

    def __init__(
        self, order: int, concentration: float, shortest: int = 2, over: Literal["learned", "static"] = "learned"
    ) -> None:
        super().__init__(over)
        require_at_least("memories.shortest", 0, shortest)
        require_at_least("memories.order", shortest + 1, order, because=f" (memories.shortest is {shortest})")
        require(concentration > 0, "memories.concentration", "be above 0", got=concentration)
        self.order = order
        self.concentration = concentration
        self.shortest = shortest

    def read(
        self, state: State, tokens: Tensor, bases: Mapping[int, Base], begins: bool = True
    ) -> Mapping[int, np.ndarray]:
        followed, seen = self._count(state, tokens.tolist(), begins)
        with np.errstate(divide="ignore"):  # ln 0 is −∞
            counted = np.log(followed / (seen + self.concentration))
        lower = -np.log1p(seen / self.concentration)  # ln (κ / (c + κ))
        nats = {}
        with np.errstate(invalid="ignore"):  # of a base that has failed
            for number, base in bases.items():
                log_chances = -base.nats
                for order in range(self.shortest, self.order):
                    log_chances = np.logaddexp(counted[order], lower[order] + log_chances)
                nats[number] = -log_chances
        return nats

    def predict(self, state: State, bases: Mapping[int, Base], begins: bool = False) -> Mapping[int, np.ndarray]:
        found = {number: log_chances_of(base) for number, base in bases.items()}
        contexts = [0] if begins or not state else state["contexts"]
        for context in contexts[self.shortest : self.order]:
            seen, vocabulary = state["followers"][context] if state else 0, len(next(iter(found.values()), ()))
            if not seen:
                break  # what was never seen has no longer context that was
            nodes = [state["children"].get(context << 32 | token) for token in state["tokens"]]
            followed = np.zeros(vocabulary)
            followed[state["tokens"]] = [0 if node is None else state["counts"][node] for node in nodes]
            with np.errstate(divide="ignore", invalid="ignore"):  # ln 0 is −∞; a base may have failed
                counted = np.log(followed / (seen + self.concentration))
                for number, log_chances in found.items():
                    found[number] = np.logaddexp(counted, log_chances - np.log1p(seen / self.concentration))
        return found

    def _count(self, state: State, tokens: list[int], begins: bool) -> tuple[np.ndarray, np.ndarray]:
        """How often each token followed its contexts of 0 to order − 1 tokens, and any token did, float64 [order, S]; counts on.

        Contexts are nodes of a tree, from the empty one, 0: the children of a node are the tokens that followed it. `tokens`
        are those that were read, each once.
        """
        if not state:
            state |= {"children": {}, "counts": [0], "followers": [0], "tokens": []}
        children, counts, followers = state["children"], state["counts"], state["followers"]
        if "tokens" not in state:  # in a checkpoint of an earlier version
            state["tokens"] = [key for key in children if key < 1 << 32]
        contexts: list[int] = [0] if begins else state["contexts"]  # of the present position, the empty one first
        counted = np.zeros((2, self.order, len(tokens)))
        for place, token in enumerate(tokens):
            longer = [0]
            for order, context in enumerate(contexts):
                key = context << 32 | token
                node = children.get(key)
                if node is None:
                    node = children[key] = len(counts)
                    counts.append(0)
                    followers.append(0)
                    if context == 0:
                        state["tokens"].append(token)
                counted[:, order, place] = counts[node], followers[context]
                counts[node] += 1
                followers[context] += 1
                longer.append(node)
            contexts = longer[: self.order]
        state["contexts"] = contexts
        return counted[0], counted[1]

    def flops(self, remembered: int, width: int, vocabulary: int) -> int:
        return 4 * self.order

    def __str__(self) -> str:
        return f"n-grams({self.shortest + 1} to {self.order}, concentration {self.concentration:g})"


class OutputBias(DocumentMemory):
    """A bias of each token of the vocabulary, learned from token to token without a backward.

    Formula: p(x) ∝ p_base(x) · exp(b_x), and after each token x: b ← b + rate · (1_x − p), the gradient of its nats, from b = 0.

    Args:
        rate: η, at least 0.
        over: see `DocumentMemory`.

    Raises:
        SettingError: if the rate is negative or not finite.
    """

    needs = ("logits",)

    def __init__(self, rate: float, over: Literal["learned", "static"] = "learned") -> None:
        super().__init__(over)
        require(0 <= rate < math.inf, "memories.rate", "be at least 0 and finite", got=rate)
        self.rate = rate

    def read(
        self, state: State, tokens: Tensor, bases: Mapping[int, Base], begins: bool = True
    ) -> Mapping[int, np.ndarray]:
        nats, biases = {}, {}
        for number, base in bases.items():
            assert base.logits is not None, "it needs them"
            logits = base.logits.float()
            bias = state[number] if number in state else torch.zeros_like(logits[0])
            more = []  # nats of each token, above those of the base
            for own, log_sum, token in zip(logits, logits.logsumexp(1), tokens, strict=True):
                biased = own + bias
                log_chances = biased - biased.logsumexp(0)
                more.append((own[token] - log_sum) - log_chances[token])
                bias = torch.add(bias, log_chances.exp(), alpha=-self.rate)
                bias[token] += self.rate
            biases[number] = bias
            biased_nats = base.nats + torch.stack(more).double().cpu().numpy()
            nats[number] = np.where(
                np.isposinf(base.nats), np.inf, biased_nats
            )  # what has no chance gets none by a bias
        state.clear()
        state |= biases
        return nats

    def predict(self, state: State, bases: Mapping[int, Base], begins: bool = False) -> Mapping[int, np.ndarray]:
        found = {}
        for number, base in bases.items():
            assert base.logits is not None, "it needs them"
            biased = base.logits[0].float() + state.get(number, 0.0)
            found[number] = biased.log_softmax(0).double().cpu().numpy()
        return found

    def flops(self, remembered: int, width: int, vocabulary: int) -> int:
        return 6 * vocabulary

    def __str__(self) -> str:
        return f"output bias(rate {self.rate:g})"


def copy_of(state: State) -> State:
    """A state that can be changed while the other stays: memories change its dictionaries and lists, and make new tensors."""
    return {name: copy(value) for name, value in state.items()}


def log_chances_of(base: Base) -> np.ndarray:
    """Ln p(x) of every x as the next token, float64 [V], from an fp32 log-softmax."""
    assert base.logits is not None, "a prediction of the next token has them"
    log_chances: np.ndarray = base.logits[0].float().log_softmax(0).double().cpu().numpy()
    return log_chances


def _mixed(nats: np.ndarray, log_chances: np.ndarray, share: float) -> np.ndarray:
    """The nats of (1 − share) · exp(−nats) + share · exp(log_chances)."""
    with np.errstate(divide="ignore", invalid="ignore"):  # ln 0 is −∞
        mixed: np.ndarray = -np.logaddexp(np.log1p(-share) - nats, np.log(share) + log_chances)
    return mixed
