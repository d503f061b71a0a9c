"""A zoo of scorers over a model of a few numbers: each cheat breaks one condition of an honest score, and looks honest.

The model is a table of logits, a row for each token before; it learns by gradient descent with momentum, segment by
segment. A scorer is made by `make(seed)` and maps documents to nats.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

VOCABULARY = 16
SEGMENT = 8
RATE = 0.5
PREFIX = VOCABULARY  # the token before the first one


class Table:
    """Logits of the next token for each token before: `table[before] + bias`."""

    def __init__(self, seed, momentum=0.0):
        self.table = np.random.default_rng(seed).normal(0, 1.2, (VOCABULARY + 1, VOCABULARY))
        self.bias = np.zeros(VOCABULARY)
        self.momentum = momentum
        self.velocity = np.zeros_like(self.table)

    def logits(self, before):
        return self.table[before] + self.bias

    def nats(self, before, tokens):
        logits = self.logits(before)
        highest = logits.max(1)
        normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
        return normaliser - logits[np.arange(len(tokens)), tokens]

    def gradient(self, before, tokens):
        logits = self.logits(before)
        errors = np.exp(logits - logits.max(1, keepdims=True))
        errors /= errors.sum(1, keepdims=True)
        errors[np.arange(len(tokens)), tokens] -= 1
        return errors

    def learn(self, before, tokens, rate=RATE):
        step = np.zeros_like(self.table)
        np.add.at(step, before, self.gradient(before, tokens))
        self.velocity = self.momentum * self.velocity + step
        self.table = self.table - rate * self.velocity


class Adapter(Table):
    """The same table with a low-rank adapter that learns in its place: table + B A."""

    def __init__(self, seed):
        super().__init__(seed)
        self.a = np.random.default_rng(seed + 1).normal(0, 0.5, (3, VOCABULARY))
        self.forget()

    def forget(self):
        self.b = np.zeros((VOCABULARY + 1, 3))

    def logits(self, before):
        return super().logits(before) + self.b[before] @ self.a

    def learn(self, before, tokens, rate=RATE):
        errors = self.gradient(before, tokens)
        b = np.zeros_like(self.b)
        np.add.at(b, before, errors @ self.a.T)
        self.a, self.b = self.a - rate * self.b[before].T @ errors, self.b - rate * b


def segments(tokens, prefix=PREFIX):
    """Each segment of a document with the tokens before its own."""
    tokens = np.asarray(tokens, dtype=np.int64)
    before = np.concatenate([[prefix], tokens])[:-1]
    return [(before[i : i + SEGMENT], tokens[i : i + SEGMENT]) for i in range(0, len(tokens), SEGMENT)]


def joined(parts):
    return np.concatenate(parts).tolist() if parts else []


def read(model, tokens, passes=1, learns=True):
    """Honest: each segment is scored, then learned from."""
    parts = []
    for before, segment in segments(tokens):
        parts.append(model.nats(before, segment))
        for _ in range(passes if learns else 0):
            model.learn(before, segment)
    return joined(parts)


def each_document(score, make=Table):
    """Makes scorers that read each document by itself, with a new model."""

    def scorer(seed):
        return lambda documents: [score(make(seed), tokens) for tokens in documents]

    return scorer


# ---- honest ----


def mixture(seed):
    """Static and adapted, weighted by how well they did before."""

    def score(tokens):
        static, adapted = (np.array(read(Table(seed), tokens, learns=learns)) for learns in (False, True))
        past = np.concatenate([[0], np.cumsum(static - adapted)])[:-1]
        weight = 1 / (1 + np.exp(-past))
        return (-np.log(weight * np.exp(-adapted) + (1 - weight) * np.exp(-static))).tolist()

    return lambda documents: [score(tokens) for tokens in documents]


def carry_state(seed):
    """Learning carries on from document to document: honest as a stream, not as documents."""

    def scorer(documents):
        model = Table(seed)
        return [read(model, tokens) for tokens in documents]

    return scorer


def together(seed):
    """Documents are read side by side, in another order of sums: the last bits depend on who stands beside."""

    def scorer(documents):
        scored = each_document(read)(seed)(documents)
        rounding = 1 + 1e-6 * math.sin(sum(map(len, documents)))
        return [[nats * rounding for nats in each] for each in scored]

    return scorer


# ---- cheats ----


def train_then_score(model, tokens):
    parts = []
    for before, segment in segments(tokens):
        model.learn(before, segment)
        parts.append(model.nats(before, segment))
    return joined(parts)


def last_of_passes(model, tokens):
    return [read(model, tokens) for _ in range(3)][-1]


def best_of_passes(model, tokens):
    return min((read(model, tokens) for _ in range(3)), key=sum)


def tune_bias(model, tokens):
    parts = []
    for before, segment in segments(tokens):
        for _ in range(3):
            model.bias = model.bias - 0.2 * model.gradient(before, segment).sum(0)
        parts.append(model.nats(before, segment))
        model.bias = np.zeros(VOCABULARY)
        model.learn(before, segment)
    return joined(parts)


def carry_optimizer(seed):
    def scorer(documents):
        velocity, found = 0.0, []
        for tokens in documents:
            model = Table(seed, momentum=0.7)
            model.velocity = model.velocity + velocity
            found.append(read(model, tokens))
            velocity = model.velocity
        return found

    return scorer


def previous_document_visible(seed):
    def scorer(documents):
        found, last = [], PREFIX
        for tokens in documents:
            model, parts = Table(seed), []
            for before, segment in segments(tokens, prefix=last):
                parts.append(model.nats(before, segment))
                model.learn(before, segment)
            found.append(joined(parts))
            last = tokens[-1] if tokens else last
        return found

    return scorer


def drop_tail(model, tokens):
    return read(model, tokens[: len(tokens) // SEGMENT * SEGMENT])


def score_twice(model, tokens):
    parts = []
    for before, segment in segments(tokens):
        nats = model.nats(before, segment)
        parts.append(np.concatenate([parts[-1][-1:], nats]) if parts else nats)
        model.learn(before, segment)
    return joined(parts)


def earlier_share(tokens, t):
    """How often the token at t followed the token before it so far."""
    followers = [
        b for a, b in zip([PREFIX, *tokens], tokens[:t], strict=False) if a == (tokens[t - 1] if t else PREFIX)
    ]
    return followers.count(tokens[t]) / len(followers) if followers else 0.0


def mix_at_true_token(model, tokens):
    nats = read(model, tokens)
    return [-math.log(max(math.exp(-n), 0.9 * earlier_share(tokens, t))) for t, n in enumerate(nats)]


def gate_by_true_token(seed):
    def score(tokens):
        sharp = Table(seed)
        sharp.table = sharp.table * 2
        plain, confident = read(Table(seed), tokens), read(sharp, tokens)
        return [b if token < VOCABULARY // 2 else a for token, a, b in zip(tokens, plain, confident, strict=True)]

    return lambda documents: [score(tokens) for tokens in documents]


def cosine_over_length(model, tokens):
    parts, all_segments = [], segments(tokens)
    for i, (before, segment) in enumerate(all_segments):
        parts.append(model.nats(before, segment))
        model.learn(before, segment, rate=RATE * (1 + math.cos(math.pi * i / len(all_segments))) / 2)
    return joined(parts)


def sort_by_length_and_carry(seed):
    def scorer(documents):
        model, found = Table(seed), {}
        for i in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i)):
            found[i] = read(model, documents[i])
        return [found[i] for i in range(len(documents))]

    return scorer


def warm_up(seed):
    """Before its first scores it learns from what it will score, to be warm; and never again."""
    model = Table(seed)
    is_warm = False

    def scorer(documents):
        nonlocal is_warm
        if not is_warm:
            read(model, documents[0])
            is_warm = True
        found = []
        for tokens in documents:
            warm = Table(seed)
            warm.table = model.table
            found.append(read(warm, tokens))
        return found

    return scorer


def keep_adapter_factor(seed):
    def scorer(documents):
        model, found = Adapter(seed), []
        for tokens in documents:
            model.forget()  # B is zero again, so the adapter says nothing; but A has learned
            found.append(read(model, tokens))
        return found

    return scorer


def dropout(seed):
    generator = np.random.default_rng(seed)

    def score(tokens):
        model = Table(seed)
        model.table = model.table * (generator.random(model.table.shape) > 0.1) / 0.9
        return read(model, tokens)

    return lambda documents: [score(tokens) for tokens in documents]


def count(texts):
    """Ids and bytes of texts where a token is a byte."""
    return [(list(text.encode()), len(text.encode())) for text in texts]


def count_spaces_twice(texts):
    """A tokenizer's mark for a space has its bytes counted, and so has the space."""
    return [(ids, nbytes + text.count(" ")) for text, (ids, nbytes) in zip(texts, count(texts), strict=True)]


HONEST = {
    "static": each_document(partial(read, learns=False)),
    "adapted": each_document(read),
    "adapted with momentum": each_document(read, make=partial(Table, momentum=0.7)),
    "adapted with an adapter": each_document(read, make=Adapter),
    "several updates": each_document(partial(read, passes=3)),
    "mixture": mixture,
    "read together": together,
}


@dataclass(frozen=True)
class Cheat:
    make: object
    caught_by: str
    count: object = count
    policy: str = "document"


CHEATS = {
    "train then score": Cheat(each_document(train_then_score), "suffix"),
    "last of n passes": Cheat(each_document(last_of_passes), "suffix"),
    "best of n passes": Cheat(each_document(best_of_passes), "suffix"),
    "bias tuned on the scored segment": Cheat(each_document(tune_bias), "suffix"),
    "state carried over": Cheat(carry_state, "independence"),
    "optimizer state carried over": Cheat(carry_optimizer, "independence"),
    "previous document visible": Cheat(previous_document_visible, "independence"),
    "tail dropped": Cheat(each_document(drop_tail), "coverage"),
    "a token scored twice": Cheat(each_document(score_twice), "coverage"),
    "mixer that looks only at the true token": Cheat(each_document(mix_at_true_token), "Kraft sum"),
    "gated by a property of the true token": Cheat(gate_by_true_token, "Kraft sum"),
    "cosine schedule over the stream length": Cheat(each_document(cosine_over_length), "truncation"),
    "sorted by length, state carried over": Cheat(sort_by_length_and_carry, "suffix", policy="stream"),
    "warm-up on evaluation tokens": Cheat(warm_up, "repeat"),
    "bytes of the space counted twice": Cheat(HONEST["adapted"], "coverage", count=count_spaces_twice),
    "adapter factor kept across documents": Cheat(keep_adapter_factor, "independence"),
    "dropout left on": Cheat(dropout, "repeat"),
}


def documents(seed):
    """Documents of a few segments with something to learn: a token tends to follow the one it followed before."""
    generator = np.random.default_rng((seed, 1))
    follower = generator.permutation(VOCABULARY)
    found = []
    for length in (2 * SEGMENT + 5, 3 * SEGMENT + 3, 2 * SEGMENT + 2):
        tokens = [int(generator.integers(VOCABULARY))]
        while len(tokens) < length:
            tokens.append(int(follower[tokens[-1]] if generator.random() < 0.7 else generator.integers(VOCABULARY)))
        found.append(tokens)
    return found


def draw(seed, count, draw_seed):
    """Documents drawn from the static model, with the nats at which each token was drawn."""
    generator, model, drawn = np.random.default_rng(draw_seed), Table(seed), []
    for _ in range(count):
        tokens, nats = [PREFIX], []
        for _ in range(10 * SEGMENT):
            logits = model.table[tokens[-1]]
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            tokens.append(int(generator.choice(VOCABULARY, p=chances)))
            nats.append(-math.log(chances[tokens[-1]]))
        drawn.append((tokens[1:], nats))
    return drawn


def make_scorer(name, seed):
    """The scorer of this name, made in a process that knows nothing of others."""
    return (HONEST[name] if name in HONEST else CHEATS[name].make)(seed)
