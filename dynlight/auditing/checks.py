"""The checks of an audit: what is done to a scorer, what follows from it, and what it cannot see.

A scorer is looked at from outside, by its nats for documents that were changed on purpose. It is honest when
(C1) the distribution for a token depends on the model and the tokens before it alone, (C2) it is normalised over the
vocabulary, (C3) a token is scored before anything learns from it, and (C4) each token is scored once, left to right.

**Suffix and Kraft sum together are complete at the positions tested.** Let n_t(x) be the nats that a scorer reports at
position t of a document x. If they don't change with the tokens after t (suffix), they are a function of x_1 … x_t. If,
besides, Σ_v exp(−n_t(x_1 … x_{t−1}, v)) = 1 (Kraft), then q(v) = exp(−n_t(x_1 … x_{t−1}, v)) is a distribution over the
vocabulary that is fixed once x_1 … x_{t−1} are: all of C1 to C3. It does not matter how the scorer came to it; a score
that has seen its token, or any after it, can only be better than a distribution if it breaks one of the two. What they
leave open is every position, document and replacement that was not tested, deviations below the tolerance (which gain
at most that many nats a token), and a scorer that behaves when it is watched.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from dynlight.auditing.subject import Check, Nats, Place, Scorer, Subject, Tokens, Verdict, Worst

ALPHA = 1e-6  # how often an honest scorer may fail `beat the truth`
_STANDARD_ERRORS = 5.0  # how many of them an estimated Kraft sum may be away from 1
_UNDECIDED = 0.1  # a standard error of the Kraft sum above which it says nothing
_DIGITS = 1e-4  # the share of a document's nats by which rounding may move them, where three digits are shown
_AT_ONCE = 256  # variants of a document scored in one call


# What tokenizers and byte counts stumble over: runs of spaces, line ends, letters of 2 to 4 bytes, joined emoji.
PROBES = (
    "a  b   c    d ",
    " leading and trailing  ",
    "\ttabs\tand\r\nline ends\n\n\n",
    "naïve façade — “quoted” … ½",
    "κόσμε Ж ह 日本語 𝔘𝔫𝔦",
    "🙂 👩‍👩‍👧 🇩🇪 e\u0301",
    "<s>not special</s>",
    "x",
)


def coverage(
    subject: Subject,
    texts: Sequence[str] = (),
    count: Callable[[list[str]], Sequence[tuple[Tokens, int]]] | None = None,
    tokenize: Callable[[str], Tokens] | None = None,
) -> Check:
    """Each token has nats, once; tokens and bytes are those of the text.

    Done: documents as they are, one without tokens and one with a single token; each must get as many nats as it has
    tokens, finite and not negative. Where the scorer says what it reads of a text, its bytes must be those of the text in
    UTF-8 and its ids those of the tokenizer alone, for texts with runs of spaces, emoji and letters of several bytes.
    Argument: C4 in so far as it can be counted, with counts made anew. Cannot see: one token scored twice in the place of
    another, which the Kraft sum finds, as those nats then don't follow the token that stands there.
    """
    documents = [*subject.documents, [], subject.documents[0][:1]]
    worst, notes = Worst(), []
    for document, (tokens, nats) in enumerate(zip(documents, subject.score(documents), strict=True)):
        if len(nats) != len(tokens):
            worst.see(abs(len(nats) - len(tokens)), Place(document, min(len(nats), len(tokens))))
            notes.append(f"{len(nats)} nats for {len(tokens)} tokens")
        elif len(bad := np.flatnonzero(~np.isfinite(nats) | (nats < -subject.tolerance))):
            worst.see(math.inf, Place(document, int(bad[0])))
            notes.append(f"{nats[bad[0]]} nats")
    tried = f"{len(documents)} documents, one empty, one of 1 token"
    if count is not None:
        tried += f"; ids and bytes of {len(texts)} texts"
        for number, (text, (ids, nbytes)) in enumerate(zip(texts, count(list(texts)), strict=True)):
            if nbytes != len(text.encode()):
                worst.see(abs(nbytes - len(text.encode())), Place(number))
                notes.append(f"text {number}: {nbytes} bytes for {len(text.encode())}")
            if tokenize is not None and list(ids) != (expected := tokenize(text)):
                worst.see(math.inf, Place(number))
                notes.append(f"text {number}: {len(ids)} ids, not the tokenizer's {len(expected)}")
    else:
        notes.append("ids and bytes: not tried")
    return worst.check("coverage", tried, 0.0, notes[0] if notes else "")


def repeat(subject: Subject, fresh: Scorer | None) -> Check:
    """The same documents get the same nats again.

    Done: the scorer first reads other tokens of the same lengths, then the documents, then the documents again; where
    it can be made anew, a fresh process reads the documents at once. All must agree. Argument: nats that depend on what
    the scorer read in an earlier call (state that survives, warm-up on tokens that are evaluated) or on chance (dropout)
    are no function of the document. The deviation of the second reading is the noise that the other checks allow for. Cannot see: a
    warm-up that is undone before each call, which the suffix check sees.
    """
    decoy = [subject.replaced(tokens, "decoy", document) for document, tokens in enumerate(subject.documents)]
    subject.score(decoy)
    worst = Worst()
    first, second = subject.nats, subject.score(subject.documents)
    for document, (one, other) in enumerate(zip(first, second, strict=True)):
        worst.compare(other, one, document)
    subject.noise = worst.deviation if math.isfinite(worst.deviation) else 0.0
    tried = "after other tokens, again, and in a fresh process" if fresh else "after other tokens, and again"
    note = "" if fresh else "in a fresh process: not tried"
    if fresh is not None:
        anew = Subject(fresh, subject.documents, subject.vocabulary).nats
        for document, (one, other) in enumerate(zip(first, anew, strict=True)):
            worst.compare(other, one, document)
    return worst.check("repeat", tried, subject.tolerance, note)


def suffix(subject: Subject) -> Check:
    """Later tokens don't change earlier nats.

    Done: for positions t just before, within and just after a segment that is learned from, tokens up to t and all
    lengths are kept, every later token of this document and of all later ones is replaced; nats up to t must stay.
    Argument: C1 and C3: whatever learned from later tokens, or chose by them, has passed something on (train then
    score, the last or best of several passes, tuning on the scored segment). Cannot see: a score that has seen its own
    token and no later one, which breaks the Kraft sum; and what depends on lengths alone, which truncation reports.
    """
    worst, tried = Worst(), 0
    for document, tokens in enumerate(subject.documents):
        for t in subject.positions(tokens):
            variant = [
                original
                if other < document
                else subject.replaced(original, document, other, start=t + 1 if other == document else 0)
                for other, original in enumerate(subject.documents)
            ]
            tried += 1
            nats = subject.score(variant)
            before = range(document) if subject.policy == "stream" else ()
            for earlier in before:
                worst.compare(nats[earlier], subject.nats[earlier], earlier)
            worst.compare(nats[document], subject.nats[document], document, t + 1)
    return worst.check("suffix", f"{tried} positions, all later tokens replaced", subject.allowed)


def truncation(subject: Subject) -> Check:
    """Whether a prefix can be scored without knowing how much follows: reported, and it decides nothing.

    Done: the document ends after t, no document follows, and nats up to t are compared; then the document goes on for as
    long again, and all its nats are. Argument: what changes knew the length of the stream (a cosine schedule over it, a
    last window that is moved back to be full). Given the lengths, the scores still belong to normalised distributions, so
    suffix and Kraft sum hold; the lengths of documents are worth few nats, once, and established protocols (windows that
    end with the document) read them. So it is reported, for who insists on a streamable scorer. Cannot see:
    which use was made of the length.
    """
    worst, tried = Worst(), 0
    for document, tokens in enumerate(subject.documents):
        ahead = subject.documents[:document]
        for t in subject.positions(tokens):
            tried += 1
            nats = subject.score([*ahead, tokens[: t + 1]])
            worst.compare(nats[document], subject.nats[document], document, t + 1)
        longer = tokens + subject.replaced(tokens, "longer", document)
        worst.compare(subject.score([*ahead, longer])[document], subject.nats[document], document, len(tokens))
    streamable = worst.deviation <= subject.allowed
    note = f"streamable: {'yes' if streamable else 'no'}"
    where = None if streamable else worst.where
    return Check(
        "truncation",
        "reported",
        f"{tried} prefixes, {len(subject.documents)} continuations",
        worst.deviation,
        subject.allowed,
        where,
        note,
    )


def independence(subject: Subject) -> Check:
    """Other documents matter as the policy says.

    Done: under `document` the documents are reversed, one is given twice, each is scored alone, and all others are
    replaced by others of other lengths; nats must follow their document. Under `stream` the documents after each are left
    out, reversed, and replaced by others of other lengths; nats of those before must stay. Argument: nats of a document
    are then a function of it alone (or of what came before it). Finds a missing reset of weights, optimizer or adapter,
    another document in view, and values that depend on a document's place. Cannot see: what documents share that
    were not tried beside each other.
    """
    worst = Worst()
    documents, expected = subject.documents, subject.nats
    last = len(documents) - 1

    def others(document: int) -> list[Tokens]:
        chance = subject.random("others", document)
        lengths = [max(1, len(tokens) + chance.choice((-3, -1, 2, 5))) for tokens in documents]
        return [[chance.randrange(subject.vocabulary) for _ in range(length)] for length in lengths]

    if subject.policy == "document":
        for document, nats in enumerate(reversed(subject.score(documents[::-1]))):
            worst.compare(nats, expected[document], document)
        twice = subject.score([documents[0], *documents])
        for place, nats in enumerate(twice):
            worst.compare(nats, expected[max(0, place - 1)], max(0, place - 1))
        for document, tokens in enumerate(documents):
            worst.compare(subject.score([tokens])[0], expected[document], document)
            around = others(document)
            around[document] = tokens
            worst.compare(subject.score(around)[document], expected[document], document)
        tried = "documents reversed, one twice, each alone, each among others"
    else:
        for document in range(last + 1):
            known, after = documents[: document + 1], documents[document + 1 :]
            for following in ([], after[::-1], others(document)[document + 1 :]):
                nats_of_all = subject.score(known + following)
                for earlier in range(document + 1):
                    worst.compare(nats_of_all[earlier], expected[earlier], earlier)
        tried = "later documents left out, reversed, replaced"
    return worst.check("independence", f"{tried}; policy {subject.policy}", subject.allowed)


def kraft(
    subject: Subject,
    guess: Callable[[Tokens], Sequence[float]] | None = None,
    exact: int = 512,
    top: int = 96,
    samples: int = 96,
    positions: int = 6,
) -> Check:
    """The probabilities of all tokens that might stand at a position add up to 1.

    Done: prefix and suffix are fixed and the token at t is set to every v; S = Σ_v exp(−nats_t) must be 1. Above `exact`
    tokens S is estimated: the `top` tokens that a guess (the static model) holds likeliest are summed, of the others
    `samples` are drawn by chances in proportion to the guess, mixed with a tenth of uniform ones, and weighted by their
    inverse; 5 standard errors are added to the tolerance, and an estimate below 1 decides nothing: a likely token that
    was not drawn looks the same, and scores whose sum is below 1 gain nothing there. Argument: C2, and with the suffix
    check C1 and C3 (see above). t lies in a segment that is learned from and has tokens behind: elsewhere nothing learns
    from the token at t, so nothing could peek at it. Cannot see: positions that were not tried, and deviations within the
    standard error of an estimate; a scorer that gives to a rare token what it takes from others is normalised, and
    honest.
    """
    sums: list[tuple[float, float, Place]] = []  # S − 1, its standard error, and where
    for document, tokens in enumerate(subject.documents):
        for t in subject.few_positions(tokens, positions):
            chances = None if guess is None else np.asarray(guess(tokens[:t]), dtype=np.float64)
            chosen, weights = _proposal(subject, chances, exact, top, samples, (document, t))
            terms = _probabilities(subject, document, t, chosen) * weights
            error = 0.0
            if subject.vocabulary > exact:
                error = float((terms[top:] * samples).std(ddof=1)) / math.sqrt(samples)
            away = float(terms.sum()) - 1
            sums.append((math.inf if math.isnan(away) else away, error, Place(document, t)))
    if not sums:
        return Check("Kraft sum", "not tried", "needs a document with tokens behind a learned position")

    def excess(estimate: tuple[float, float, Place]) -> float:
        return abs(estimate[0]) - _STANDARD_ERRORS * estimate[1]

    is_estimate = subject.vocabulary > exact
    too_much = [each for each in sums if excess(each) > subject.allowed and (each[0] > 0 or not is_estimate)]
    away, error, where = max(too_much or sums, key=excess)
    largest_error = max(error for _, error, _ in sums)
    how = f"{top} likely, {samples} drawn tokens" if is_estimate else f"all {subject.vocabulary} tokens"
    note = f"standard error {largest_error:.1g}" if is_estimate else ""
    tolerance = subject.allowed + _STANDARD_ERRORS * error
    verdict: Verdict = "failed" if too_much else "passed"
    if not too_much and (abs(away) > tolerance or largest_error > _UNDECIDED):
        verdict, note = "undecided", f"{note}: give `guess`, or more samples"
    return Check("Kraft sum", verdict, f"{len(sums)} positions, {how}", abs(away), tolerance, where, note)


def _proposal(
    subject: Subject, chances: Nats | None, exact: int, top: int, samples: int, salt: tuple[int, int]
) -> tuple[list[int], Nats]:
    """Tokens to try at a position, and weights by which the sum of their probabilities estimates that of all tokens."""
    size = subject.vocabulary
    if size <= exact:
        return list(range(size)), np.ones(size)
    chances = np.full(size, 1 / size) if chances is None else chances[:size]
    likely = np.argsort(-chances, kind="stable")
    head, rest = likely[:top], likely[top:]
    drawing = 0.9 * chances[rest] / max(chances[rest].sum(), 1e-300) + 0.1 / len(rest)
    drawing /= drawing.sum()
    generator = np.random.default_rng(subject.random("kraft", *salt).randrange(2**32))
    drawn = generator.choice(len(rest), samples, p=drawing)
    weights = np.concatenate([np.ones(top), 1 / (samples * drawing[drawn])])
    return [*head.tolist(), *rest[drawn].tolist()], weights


def _probabilities(subject: Subject, document: int, t: int, chosen: Sequence[int]) -> Nats:
    """exp(−nats) at position t with each of the chosen tokens in its place."""
    tokens = subject.documents[document]
    variants = {v: [*tokens[:t], v, *tokens[t + 1 :]] for v in chosen}
    nats_at_t: dict[int, float] = {}
    if subject.policy == "document":  # documents don't touch each other, which independence checks
        keys = list(variants)
        for begin in range(0, len(keys), _AT_ONCE):
            at_once = keys[begin : begin + _AT_ONCE]
            for v, nats in zip(at_once, subject.score([variants[v] for v in at_once]), strict=True):
                nats_at_t[v] = float(nats[t]) if t < len(nats) else math.nan
    else:
        for v, variant in variants.items():
            nats = subject.score([*subject.documents[:document], variant])[document]
            nats_at_t[v] = float(nats[t]) if t < len(nats) else math.nan
    with np.errstate(over="ignore"):
        return np.exp(-np.array([nats_at_t[v] for v in chosen]))


def beat_the_truth(
    subject: Subject, sampler: Callable[[int, int], Sequence[tuple[Tokens, Sequence[float]]]] | None, documents: int = 8
) -> Check:
    """No scorer beats the distribution that the documents were drawn from.

    Done: documents are drawn from the static model, which gives the nats of each token that it draws; the scorer
    may not gain more than ln(1/α) nats over these, in all. Argument: for an honest scorer with probabilities q the ratio
    q(x)/p(x) has expectation at most 1 under p, so by Markov's inequality it exceeds 1/α with probability at most α. No
    look inside, and no tolerance, is needed. Cannot see: leaks that gain less than ln(1/α) nats on all documents drawn.
    """
    if sampler is None:
        return Check("beat the truth", "not tried", "needs `sampler`: documents drawn from the static model")
    drawn = sampler(documents, subject.seed)
    gains = [
        float(np.sum(truth)) - float(nats.sum()) if len(nats) == len(truth) else -math.inf
        for (_, truth), nats in zip(drawn, subject.score([list(tokens) for tokens, _ in drawn]), strict=True)
    ]
    tokens = sum(len(tokens) for tokens, _ in drawn)
    gain, limit = sum(gains), math.log(1 / ALPHA)
    where = Place(int(np.argmax(gains))) if gain > limit else None
    return Check(
        "beat the truth",
        "failed" if gain > limit else "passed",
        f"{len(drawn)} documents, {tokens} tokens drawn from the static model",
        gain,
        limit,
        where,
        f"α = {ALPHA:g}",
    )


def static_identity(subject: Subject, rate_0: Scorer | None, static: Scorer | None) -> Check:
    """Learning rate 0 scores as the static model does.

    Done: the same run with learning rate 0 and with nothing learned. Argument: the path that adapts must be the plain
    one when what it learns is nothing. Cannot see: faults that show only once weights have moved.
    """
    if rate_0 is None or static is None:
        return Check("static identity", "not tried", "needs the scorer at learning rate 0, and the static one")
    worst = Worst()
    pairs = zip(rate_0(subject.documents), static(subject.documents), strict=True)
    for document, (one, other) in enumerate(pairs):
        worst.compare(np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64), document)
    return worst.check("static identity", "learning rate 0 beside update: null", subject.tolerance)


def rounding(subject: Subject, noisy: Scorer | None, long: Sequence[Tokens]) -> Check:
    """Whether scores depend on rounding: reported, and it decides nothing about honesty.

    Done: longer documents are scored again with noise of 1e-7 in the initial weights, which is what adding in another order
    comes to; of each document's nats the share that moved is measured. Argument: at a high learning rate learning
    amplifies a difference from segment to segment, and another machine, or another number of threads, shows other digits;
    the run is right all the same, but two such runs can be compared only beyond that share. Cannot see: documents, and
    parts of them, that were not tried.
    """
    if noisy is None or not long:
        return Check("rounding", "not tried", "needs the scorer with noise in its initial weights")
    worst = Worst()
    pairs = zip(subject.score([*long]), noisy([*long]), strict=True)
    for document, (plain, moved) in enumerate(pairs):
        total = float(np.sum(plain))
        worst.see(abs(float(np.sum(moved)) - total) / max(abs(total), 1e-300), Place(document))
    holds = worst.deviation <= _DIGITS
    note = "digits hold: yes" if holds else "digits hold: no, learning amplifies rounding; a lower rate does so less"
    tried = f"{len(long)} documents of up to {max(map(len, long))} tokens, noise of 1e-7 in the weights"
    return Check("rounding", "reported", tried, worst.deviation, _DIGITS, None if holds else worst.where, note)
