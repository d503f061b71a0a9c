"""A run as a scorer of token ids, built from a YAML as `dynlight.fit` builds it."""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dynlight.auditing.checks import PROBES
from dynlight.auditing.subject import Scorer, Tokens
from dynlight.choices.context import position_limit
from dynlight.choices.schedule import due
from dynlight.choices.update import at_rate
from dynlight.documents.document import Document, prefix_token
from dynlight.documents.segments import Segment
from dynlight.errors import SettingError
from dynlight.learning.module import DynamicEvaluation
from dynlight.recording.meter import Meter
from dynlight.running.configuration import folder_of
from dynlight.running.run import Run
from dynlight.running.trainer import quiet

_DOCUMENTS = 3
_LONG = 2  # documents over which a difference in the last digit may grow


class AuditedRun:
    """The run that arguments describe, and what an audit may know of it.

    Args:
        arguments: as for `python -m dynlight.fit`.

    Raises:
        SettingError: if the arguments describe no run.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self._run = Run.of(self.arguments)
        out = folder_of(self._run.config)
        self.folder = out.with_name(out.name + "-audit")
        self.choices = self._run.choices
        self.tokenizer = self._run.tokenizer
        self.model = self.choices.model.load()
        self.prefix = prefix_token(self.tokenizer)
        self.scorer = self._scorer()

    @property
    def policy(self) -> str:
        """What the nats of a document may depend on, by the run's own reset."""
        return "stream" if self.choices.reset.carries_over else "document"

    def knowledge(self) -> dict[str, Any]:
        """What `audit` takes besides the scorer and the policy."""
        choices = self.choices
        rule = choices["update"] or torch.optim.SGD
        plain = {"rates": None, "mixture": None, "memories": None}
        rate_0 = {**plain, "update": at_rate(rule, 0.0)} | (
            {"rates": [0.0], "update": rule} if _is_mixed(choices) else {}
        )
        return {
            "documents": self.pieces(),
            "vocabulary": self.model.config.get_text_config().vocab_size,
            "segment": choices.context.segment,
            "learns": self._learns,
            "make": partial(make_scorer, self.arguments),
            "texts": self._probes(),
            "count": self._count,
            "tokenize": self._tokenize,
            "sampler": self.sample,
            "guess": self.guess,
            "rate_0": self._scorer(**rate_0),
            "static": self._scorer(**plain, update=None),
            "noisy": self._noisy(),
            "long": self._long_documents(),
            "samples": 128,
            "positions": 2,
            "seed": self._run.config.seed,
        }

    def description(self) -> dict[str, Any]:
        """The entries of audit.json that describe the run."""
        lengths = [len(tokens) for tokens in self.pieces()]
        return {
            "command": " ".join(["python -m dynlight.audit", *self.arguments]),
            "policy": self.policy,
            "lengths": lengths,
        }

    def pieces(self) -> list[Tokens]:
        """Pieces of the run's documents, of different lengths, the longest of two segments that are learned from."""
        segment = self.choices.context.segment
        learned = [i for i in range(10_000) if self._learns(i)][:2] or [0, 1]
        longest = (learned[-1] + 1) * segment + segment // 8 + 1
        lengths = [longest, max(2, longest - segment // 2), max(2, longest - segment - 1)]
        stream = self.choices.data.first(_DOCUMENTS, sum(lengths))
        available = [document.tokens.tolist() for document in stream.load(self.tokenizer) if len(document)]
        if not available:
            raise SettingError("data.path", "hold at least one token", got=f"none: {self.choices.data.path!r}")
        pieces = []
        for number, length in enumerate(lengths):
            tokens = available[number % len(available)]
            if number >= len(available):  # another piece of a document that was used before
                begin = min(sum(lengths[:number]), len(tokens) // 2)
                tokens = tokens[begin:] + tokens[:begin]
            pieces.append((tokens * -(-length // len(tokens)))[:length])
        return pieces

    def _noisy(self) -> "RunScorer | None":
        """The scorer with noise in the initial weights; None where their own last digit is far above that of fp32."""
        if self.model.dtype != torch.float32:
            return None
        return RunScorer(self._run, with_noise(self.model), self.prefix, self.scorer.changes)

    def _long_documents(self) -> list[Tokens]:
        """The beginnings of the run's first documents, of up to so many segments that a difference can grow."""
        segment = self.choices.context.segment
        stream = self.choices.data.first(_LONG, min(64 * segment, max(4096, 8 * segment)))
        return [document.tokens.tolist() for document in stream.load(self.tokenizer) if len(document)]

    def guess(self, prefix: Tokens) -> Sequence[float]:
        """A guess at the chance of each token after a prefix: half what the static model says of as much as it sees, half counts.

        What adapts to a document expects its tokens again, which the static model may not.
        """
        room = position_limit(self.model.config) or len(prefix) + 1
        with torch.no_grad():
            inputs = torch.tensor([[self.prefix, *prefix][-room:]])
            static = torch.softmax(self.model(input_ids=inputs, logits_to_keep=1).logits[0, -1].double(), -1)
        counts = torch.bincount(torch.tensor(prefix, dtype=torch.int64), minlength=len(static)).double()
        return (0.5 * static + 0.5 * counts / max(1, len(prefix))).tolist()

    def sample(self, count: int, seed: int) -> list[tuple[Tokens, list[float]]]:
        """Documents drawn from the static model, each with the nats of its tokens under that model."""
        length = min(2 * self.choices.context.segment + 1, position_limit(self.model.config) or 1_000_000, 512)
        generator = torch.Generator().manual_seed(seed)
        inputs, cache = torch.full((count, 1), self.prefix), DynamicCache()
        tokens: list[Tensor] = []
        nats: list[Tensor] = []
        with torch.no_grad():
            for _ in range(length):
                logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1]
                chances = torch.log_softmax(logits.double(), -1)
                inputs = torch.multinomial(chances.exp(), 1, generator=generator)
                tokens.append(inputs)
                nats.append(-chances.gather(1, inputs))
        return list(zip(torch.cat(tokens, 1).tolist(), torch.cat(nats, 1).tolist(), strict=True))

    def _learns(self, segment: int) -> bool:
        """Whether a segment is learned from by the schedule, or was where that depends on its score.

        Of a run that never learns every one counts.
        """
        if segment in self._surprising:
            return True
        schedule = self.choices.schedule
        choices = self.choices
        learns_by_default = choices["mixture"] is not None and not choices["memories"]
        is_static = choices["update"] is None and choices["rates"] is None and not learns_by_default
        is_due = is_static or schedule.every == "never" or due(segment, schedule.every)
        return is_due and not self._surprising

    @cached_property
    def _surprising(self) -> set[int]:
        """The segments of the run's first documents that were learned from, where that depends on what they scored."""
        if not self._run.outline.trigger.is_set:
            return set()
        documents = [_document(i, tokens, self.prefix) for i, tokens in enumerate(self._long_documents())]
        return self.scorer.read(documents).learned

    def _scorer(self, **changes: Any) -> "RunScorer":
        """The scorer of the run with changed choices."""
        chosen = self._run.chosen(**changes)
        if not _is_mixed(chosen) and chosen["on_failure"] == "stop":
            changes["reference"] = None  # it costs time, and no score depends on it
        return RunScorer(self._run, self.model, self.prefix, changes)

    def _probes(self) -> list[str]:
        """Texts that the tokenizer makes tokens of; `Document` itself refuses any other."""
        return [text for text in PROBES if len(self._tokenize(text))]

    def _tokenize(self, text: str) -> Tokens:
        return self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))

    def _count(self, texts: list[str]) -> list[tuple[Tokens, int]]:
        """Ids and bytes that the run itself adds up, over all segments of each text."""
        documents = [Document.from_text(i, f"text {i}", text, self.tokenizer) for i, text in enumerate(texts)]
        collect = self.scorer.read(documents)
        return [(collect.tokens.get(i, []), collect.bytes.get(i, 0)) for i in range(len(texts))]


class RunScorer:
    """Documents of token ids → nats, with a new module and Trainer for each call, as in a run of `dynlight.fit`.

    Args:
        run: that reads.
        model: with its weights; each call reads with a copy.
        prefix: the token before a document's first.
        changes: of the run's choices.
    """

    def __init__(self, run: Run, model: Any, prefix: int, changes: dict[str, Any]) -> None:
        self._run = run
        self._model = model
        self._prefix = prefix
        self.changes = changes

    def __call__(self, documents: list[Tokens]) -> list[list[float]]:
        collect = self.read([_document(i, tokens, self._prefix) for i, tokens in enumerate(documents)])
        return [collect.nats.get(i, []) for i in range(len(documents))]

    def read(self, documents: list[Document]) -> "Collect":
        """Runs the Trainer over documents and returns what it committed."""
        collect = Collect()
        if any(len(document) for document in documents):
            module = self._run.module(copy.deepcopy(self._model), **self.changes)
            self._run.read(module, documents, [collect])
        return collect


class Collect(Meter):
    """Keeps what each segment committed, by document."""

    def __init__(self) -> None:
        self.nats: dict[int, list[float]] = {}
        self.tokens: dict[int, Tokens] = {}
        self.bytes: dict[int, int] = {}
        self.learned: set[int] = set()  # segments that were learned from, of any document

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        if (score := module.score) is None:
            return
        for row in score.rows:
            index, columns = segment.documents[row].index, segment.scored[row]
            if sum(score.updates_of(row)):
                self.learned.add(segment.cut.index)
            self.nats.setdefault(index, []).extend(score.nats[row, columns].tolist())
            self.tokens.setdefault(index, []).extend(segment.targets[row, columns].tolist())
            self.bytes[index] = self.bytes.get(index, 0) + segment.bytes[row]


def make_scorer(arguments: Sequence[str]) -> Scorer:
    """The scorer of a run, for a fresh process to make."""
    quiet()
    return AuditedRun(arguments).scorer


def with_noise(model: Any) -> Any:
    """A copy of the model whose fp32 weights differ in their last digit."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=generator))
    return copied


def _is_mixed(choices: Any) -> bool:
    """Whether several experts predict together."""
    return choices["rates"] is not None or choices["mixture"] is not None or bool(choices["memories"])


def _document(index: int, tokens: Tokens, prefix: int) -> Document:
    """A document of these ids; each stands for one letter, as the ids have no known text."""
    ids = torch.tensor(tokens, dtype=torch.int64)
    return Document(index, f"document {index}", "x" * len(ids), ids, torch.arange(1, len(ids) + 1), prefix)
