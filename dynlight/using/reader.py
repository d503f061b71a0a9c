"""Reader: dynamic evaluation of a text that goes on, as an object."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jsonargparse import Namespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynlight.choices.context import has_states, position_limit
from dynlight.documents.document import Document, prefix_token, tokenize
from dynlight.documents.segments import Context, Segment
from dynlight.documents.waves import segments_behind
from dynlight.errors import SettingError, require
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.score import Score
from dynlight.recording.hashes import hash_of_tokenizer, hash_of_weights
from dynlight.recording.kept import SoFar
from dynlight.recording.rows import columns_of_tokens
from dynlight.running.pretrained import Pretrained
from dynlight.running.run import Run
from dynlight.running.trainer import on_one_device
from dynlight.using.saved import load, save
from dynlight.using.steps import take_steps

# What a reader may be told of Lightning's Trainer: what decides its numbers.
OF_TRAINER = ("accelerator", "precision", "deterministic", "benchmark")


class Reader:
    """Reads a text that goes on: a log, a chat, a code base. What is read is scored first and then learned from.

    Each call of `read` goes on where the last one ended, with the weights, the optimizer and the memory as they are, and makes
    the steps of `dynlight.fit` (`DynamicEvaluation.training_step`). If every read ends where a segment ends, nats are those
    of `dynlight.fit` on the whole text, to the last bit. Otherwise the last segment of a read is shorter, and the next one
    begins behind it.

    Args:
        model: `tiny-books`, a Hub name or a folder; or what `Pretrained` describes; or a model of transformers, which is
            prepared in place.
        tokenizer: of a model that comes without its own.
        context: what is scored next, with what in view.
        trainer: settings of Lightning's Trainer, such as `{"accelerator": "cpu", "precision": "bf16-mixed"}`.
        choices: as of `DynamicEvaluation`: `parameters`, `update`, `rates`, `mixture`, …

    Raises:
        SettingError: if the model cannot be read, or the choices don't fit it.
    """

    def __init__(
        self,
        model: str | Pretrained | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        context: Context,
        trainer: Mapping[str, Any] | None = None,
        **choices: Any,
    ) -> None:
        settings = {"accelerator": "auto", "devices": 1, **(trainer or {})}
        for name in settings:
            require(name in (*OF_TRAINER, "devices"), f"trainer.{name}", "be left out with a Reader", got=settings[name],
                    advice=f"there are {', '.join(OF_TRAINER)}")  # fmt: skip
        require(settings["devices"] in (1, "1", "auto", [0]), "trainer.devices", "be 1", got=settings["devices"])
        source = Pretrained(model) if isinstance(model, str) else model
        loads = ""
        if isinstance(source, Pretrained):
            choices = {"compile": source.compile} | choices
            tokenizer = source.load_tokenizer() if tokenizer is None else tokenizer
            source, loads = source.load(), source.how_to_load()
        require(tokenizer is not None, "tokenizer", "be given with a model of transformers", got="None")
        module = DynamicEvaluation(source, tokenizer, context=context, **choices)
        self._begin(module, settings | {"devices": 1}, loads)

    @classmethod
    def of(cls, run: Run) -> Self:
        """A reader with the model and the choices of a run, on one device, without its loggers and callbacks.

        Raises:
            SettingError: if they cannot be read, or all processes of the run learn one set of weights.
        """
        reader = cls.__new__(cls)
        settings = on_one_device(run.choices.trainer).as_dict()
        reader._begin(run.module(), settings, run.choices.model.how_to_load())
        return reader

    def _begin(self, module: DynamicEvaluation, settings: Mapping[str, Any], loads: str) -> None:
        self.module = module
        self.loads = loads or repr(str(module.model.name_or_path))  # what `from_pretrained` is given
        self.settings = Namespace(**{**settings, "logger": False, "callbacks": None})
        self._prefix = prefix_token(module.tokenizer)
        self._hashes: dict[str, str] = {}
        self._texts = 0  # that were begun
        self._start_anew()

    def _start_anew(self) -> None:
        self._texts += 1
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._segments = 0
        self.is_whole = True  # whether all that was begun was read
        self.so_far = SoFar()

    def __len__(self) -> int:
        """How many tokens were read."""
        return len(self._tokens)

    def read(self, text: str) -> pd.DataFrame:
        """Scores a text that follows what was read so far, and learns from it, segment by segment.

        Returns:
            a row a token, with columns as of `tokens.parquet`: `token` (its place in all that was read), `segment`, `text`,
            `nats` before it was learned from, `static_nats` by the initial weights (NaN without a reference), and with a
            teacher or a mixture `teacher_nats`, `expert_nats`.

        Raises:
            SettingError: if the text is no valid Unicode, or its numbers go wrong.
        """
        document = Document.from_text(0, "text", text, self.module.tokenizer) if text else None
        tokens = torch.empty(0, dtype=torch.int64) if document is None else document.tokens
        start = len(self)
        scores = self.read_tokens(tokens, len(text.encode()))
        columns: dict[str, Any] = {
            "token": np.arange(start, start + len(tokens)),
            "segment": np.repeat(
                np.array([score.segment.cut.index for score in scores], dtype=np.int64),
                np.array([score.segment.tokens[0] for score in scores], dtype=np.int64),
            ),
            "text": np.array([] if document is None else document.pieces(0, len(tokens)), dtype=object),
            "nats": np.empty(0, np.float32),
            "static_nats": np.full(len(tokens), np.nan, np.float32),
        }
        of_tokens = [columns_of_tokens(score) for score in scores]
        for name in of_tokens[0] if of_tokens else ():
            own = [each[name][0, score.segment.scored[0]] for each, score in zip(of_tokens, scores, strict=True)]
            values = np.concatenate(own).astype(np.float32)
            columns[name] = list(values) if values.ndim > 1 else values
        return pd.DataFrame(columns)

    def check_any_length(self) -> None:
        """Raises SettingError where texts of any length cannot follow one another."""
        context, share = self.module.context, self.module.objective.replayed_share
        must = "be null where what is read ends in the middle of a segment"
        require(context.refresh is None, "context.refresh", must, got=context.refresh)
        require(not share, "objective", "not be Replayed where what is read ends in the middle of a segment", got="it")
        config = self.module.model.config
        has_none = not (context.memory and has_states(config))
        must = "have no states that are carried, as a text may end in a segment of one token"
        require(
            has_none, "model.pretrained", must, got=f"a model of type {config.model_type}", advice="choose Overlapping"
        )

    @property
    def has_failed(self) -> bool:
        """Whether numbers went wrong, so that the initial weights have taken over, or nothing can follow."""
        return self._texts in self.module.failures.of_documents

    def fills(self, text: str) -> bool:
        """Whether a text has enough tokens for a segment."""
        return len(text) > 0 and len(tokenize(text, self.module.tokenizer)[0]) >= self.module.context.segment

    def read_tokens(self, tokens: Tensor, size: int = 0) -> list[Score]:
        """Reads tokens that follow what was read so far, and returns the score of each segment.

        Args:
            tokens: int64 [tokens].
            size: of the text that they stand for, in bytes.

        Raises:
            SettingError: if they cannot be read so, or numbers go wrong.
        """
        self.make_ready()
        self.check(tokens)
        if not len(tokens):
            return []
        # One token more, which is never read: a document that goes on has not ended.
        known = torch.cat([self._tokens, tokens, tokens.new_tensor([self._prefix])])
        document = Document(self._texts, "text", "", known, torch.zeros_like(known), self._prefix)
        unread = range(len(self._tokens), len(known) - 1)
        segments = list(segments_behind(document, unread, self._segments, self.module.context))
        scores = self._fit(segments)
        if (failure := self.module.failures.of_documents.get(document.index)) is not None and failure.stopped:
            got = f"stopped in segment {failure.segment} as {failure.reason}"
            raise SettingError("text", "be read to its end", got=got, advice="lower the rate or set clip")
        for score in scores:
            self.so_far.add(self.module, score, 0)
        self.so_far.bytes += size
        self._tokens = known[:-1]
        self._segments += len(segments)
        return scores

    def check(self, tokens: Tensor) -> None:
        """Raises SettingError where these tokens cannot follow."""
        context, choices = self.module.context, self.module.objective
        must, advice = "follow what was read whole", "forget() it, or load()"
        require(self.is_whole, "text", must, got="what was cut short, or recalled", advice=advice)
        rows, highest = len(self.module.model.get_input_embeddings().weight), int(tokens.max()) if len(tokens) else 0
        require(
            highest < rows, "model.tokenizer", f"give ids below {rows}, the rows of the model's embedding", got=highest
        )
        is_cut = len(self._tokens) % context.segment == 0
        if context.refresh is not None or choices.replayed_share:
            what = "context.refresh" if context.refresh is not None else "objective Replayed"
            got = f"{len(self._tokens)} tokens before it"
            require(is_cut, "text", f"follow whole segments of {context.segment} tokens with {what}", got=got)
        if context.memory and has_states(self.module.model.config) and len(tokens) % context.segment == 1:
            # A state behind a segment of one token is not to be had: see `learning/forward.py`.
            must = f"not end in a segment of one token for {self.module.model.config.model_type}"
            raise SettingError("text", must, got=f"{len(tokens)} tokens", advice="read a token more or less")

    def _fit(self, segments: Sequence[Segment]) -> list[Score]:
        """The scores of these segments, which follow; where reading them is cut short, nothing can follow."""
        self.is_whole = False
        scores = take_steps(self.module, self.settings, segments)
        self.is_whole = True
        return scores

    def forget(self) -> None:
        """Begins anew: the initial weights, no optimizer state and no memory; the next text is another one."""
        if self.module.goes_on:
            self.module.reset()
        self._start_anew()

    def generate(self, prompt: str = "", *, static: bool = False, behind: int = 0, **settings: Any) -> str:
        """Continues a prompt by the weights as they are now: transformers' own `generate`; returns what follows the prompt.

        Nothing is learned from it, and the memory isn't used: what the model knows of what was read, it knows by its weights.
        Of several rules it is that of the fewest nats so far.

        Args:
            prompt: what stands before.
            static: whether the initial weights continue it.
            behind: how many of the tokens read last stand before the prompt.
            settings: of `generate`: `max_new_tokens`, `do_sample`, `temperature`, …

        Raises:
            SettingError: if `behind` is less than 0, or the model has not as many positions.
        """
        require(behind >= 0, "behind", "be at least 0", got=behind)
        for name in {"num_return_sequences", "return_dict_in_generate", "max_length"} & set(settings):
            raise SettingError(name, "be left out, as one text of max_new_tokens is returned", got=settings[name])
        own = self.module.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        before = self._tokens[max(0, len(self._tokens) - behind) :].tolist()
        read = [self._prefix, *before, *own]
        settings = {"max_new_tokens": 20} | settings
        require(
            isinstance(settings["max_new_tokens"], int), "max_new_tokens", "be a number", got=settings["max_new_tokens"]
        )
        if settings.get("temperature") == 0:  # the likeliest token
            settings = settings | {"do_sample": False, "temperature": None}
        limit, most = position_limit(self.module.model.config), len(read) + settings["max_new_tokens"]
        if limit is not None:
            require(most <= limit, "prompt", f"leave room within {limit} positions", got=f"{most} tokens, new ones included",
                    advice="shorten it, behind or max_new_tokens")  # fmt: skip
        self.make_ready()
        with self.weights(static) as model, self.module.trainer.precision_plugin.forward_context():
            inputs = torch.tensor([read], device=model.device)
            mask = torch.ones_like(inputs)
            padding = {"pad_token_id": self._prefix} if model.generation_config.pad_token_id is None else {}
            tokens = model.generate(inputs, attention_mask=mask, **(padding | settings))[0, inputs.shape[1] :]
        text: str = self.module.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @contextmanager
    def weights(self, static: bool = False) -> Iterator[Any]:
        """Within the block the model of transformers reads by the weights as they are now, or by the initial ones.

        Where numbers went wrong on the way, the initial ones have taken over.
        """
        module = self.module
        learned = {} if static or not module.goes_on else self.learned()
        if learned:
            with module.weights.put_in_model((next(iter(learned)), 0)):
                yield module.model
        elif module.goes_on and module.rules:
            with module.weights.under_initial():
                yield module.model
        else:
            yield module.model

    def learned(self) -> dict[int, dict[str, Tensor]]:
        """By rule what each has learned, that of the fewest nats first; none where numbers went wrong."""
        return {} if self.has_failed else self.so_far.learned(self.module, 0)

    def save(self, folder: str | Path) -> None:
        """Writes what was learned, as PEFT or transformers loads it, and all that `load` needs to read on."""
        save(self, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Goes on where the reader that was saved here had ended.

        Raises:
            SettingError: if there is none, or it had another model or other choices.
        """
        load(self, Path(folder))

    def progress_state(self) -> dict[str, Any]:
        """The state behind what was read: tensors and plain data."""
        self.make_ready()
        counts = {"segments": self._segments, "text": self._texts, "is_whole": self.is_whole}
        state = {"module": self.module.progress_state(), "so_far": vars(self.so_far), **counts}
        return copy.deepcopy(state) | {"tokens": self._tokens}  # the first go on changing

    def load_progress_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `progress_state` gave."""
        self.make_ready()
        self.module.load_progress_state(state["module"])
        self._tokens, self.so_far = state["tokens"], SoFar(**state["so_far"])
        self._segments, self._texts, self.is_whole = state["segments"], state["text"], state["is_whole"]

    def recall(self, tokens: Tensor, learned: Mapping[str, Tensor]) -> None:
        """Puts what was learned from a document in the place of what was learned here, to generate by it; nothing can follow.

        Args:
            tokens: of the document.
            learned: of the weights that have changed, by name.
        """
        self.make_ready()
        weights = self.module.weights
        for owner in weights.owners:
            for (name, own), initial in zip(weights.learned_by(owner).items(), weights.initial, strict=True):
                own.detach().copy_(learned.get(name, initial))
        self._start_anew()
        self._tokens, self.is_whole = tokens, False  # of memory and optimizer nothing is kept

    @property
    def sequence(self) -> Tensor:
        """The prefix and all tokens that were read, int64 [1 + tokens]."""
        return torch.cat([self._tokens.new_tensor([self._prefix]), self._tokens])

    @property
    def device(self) -> torch.device:
        """Where it reads, once it is ready."""
        device: torch.device = self.module.trainer.strategy.root_device
        return device

    def make_ready(self) -> None:
        """Has Lightning prepare the module, unless it has read something."""
        if not self.module.goes_on:
            self._fit([])

    @property
    def protocol(self) -> str:
        """The choices in one line: what a number of this reader means."""
        self.make_ready()
        return self.module.protocol

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the model's initial weights (`model`), of the tokenizer, and of the teacher, if there is one."""
        self.make_ready()
        if not self._hashes:
            module = self.module
            tensors = dict(module.model.named_parameters()) | dict(module.model.named_buffers())
            initial = dict(zip(module.weights.names, module.weights.initial, strict=True))
            self._hashes = {
                "model": hash_of_weights(tensors | initial),
                "tokenizer": str(hash_of_tokenizer(module.tokenizer)),
            }
            if module.teacher_model is not None:
                self._hashes["teacher"] = hash_of_weights(module.teacher_model.state_dict())
        return self._hashes
