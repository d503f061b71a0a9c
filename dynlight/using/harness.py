"""Harness: dynamic evaluation as a model of EleutherAI's lm-evaluation-harness, which brings the tasks.

lm_eval --model dynlight            where lm-eval looks for models of other packages: the entry point `lm_eval.models`
python -m dynlight.tasks            the same command with any lm-eval
lm_eval.simple_evaluate(model="dynlight", …)   after `import dynlight.using.harness`
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import dropwhile
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from dynlight.choices.context import has_states
from dynlight.documents.document import Document
from dynlight.documents.segments import Segment
from dynlight.errors import require
from dynlight.learning.module import DynamicEvaluation
from dynlight.recording.meter import Meter
from dynlight.running.run import Run
from dynlight.running.trainer import on_one_device, quiet_for_now, silent_trainer
from dynlight.using.reader import Reader

# Settings that need no section in `--model_args`.
_SECTIONS = {
    "model": ("pretrained", "revision", "gguf_file", "tokenizer", "dtype", "trust_remote_code"),
    "context": ("segment", "memory", "sinks", "window"),
    "parameters": ("rank",),
    "update": ("lr",),
    "data": ("together",),
}
_SECTION_OF = {name: section for section, names in _SECTIONS.items() for name in names}


class DynamicLM(HFLM):  # type: ignore[misc] # lm-eval has no types
    """A language model that learns from what it reads, for the tasks of lm-eval.

    | request | what is learned | log-likelihood or answer |
    |---|---|---|
    | `loglikelihood_rolling` | the text, segment by segment, each scored first | that of `dynlight.fit` on the same texts |
    | `loglikelihood` | with `learn="context"` the context, segment by segment; else nothing | of the continuation, by one forward |
    | `generate_until` | likewise | transformers' `generate` |

    A continuation is never learned from, and what a context has taught is forgotten before the next one. The forward and
    `generate` are those of lm-eval's own `hf`, by the weights that have learned: so are tokens, windows (context and
    continuation, cut on the left where they are longer than the model's positions; all of the context is learned from even
    so), stop strings and chat templates, and with `learn="none"` or a rate of 0 answers are those of `hf`.

    A rolling task loads the model once more. `dtype` is float32 where not set, `hf` takes that of the file.

    Settings are those of `python -m dynlight.fit`: `model_args="config=X.yaml"`, of whose `data` only `together` counts, or
    each by its name there (`update=SGD,update.momentum=0.9,trainer.precision=bf16-mixed`); without their section
    `pretrained`, `revision`, `gguf_file`, `tokenizer`, `dtype`, `trust_remote_code`, `segment`, `memory`, `sinks`, `window`,
    `rank`, `lr` and `together`. `reference=null` saves the forward by the initial weights, whose score no task asks for. The
    context is `TransformerXL`, with a `window` `Overlapping`, where none is named.

    Args:
        config: a YAML of dynlight.
        learn: from what besides the texts of rolling log-likelihoods: `none`, or the `context` of each request.
        batch_size: of `hf`: requests in a forward; those of different contexts have different weights with `learn="context"`.
        max_batch_size: of `hf`, where the size of a batch is `auto`.
        device: `cpu`; any other, as `cuda:0`: what there is.
        max_length: of `hf`: tokens in a window; left out: the model's positions.
        settings: of dynlight.

    Raises:
        SettingError: if the settings cannot be run; or, with `learn="context"`, if nothing learns, or several rates, a mixture
            or memories predict together, which the forward of `hf` cannot.
    """

    def __init__(
        self,
        config: str | None = None,
        learn: Literal["none", "context"] = "none",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        require(learn in ("none", "context", None), "learn", "be none or context", got=learn)
        self.learn = learn or "none"  # lm-eval makes None of the word
        if device is not None:
            require(device.partition(":")[2] in ("", "0"), "device", "be the first", got=device,
                    advice="choose another by CUDA_VISIBLE_DEVICES")  # fmt: skip
        if device == "cpu":
            settings["trainer.accelerator"] = "cpu"
        self.run = Run.of(arguments_of(config, settings))
        self._check(self.run.outline)
        self.reader = Reader.of(self.run)
        source = {"tokenizer": self.run.tokenizer, "revision": self.run.config.model.revision}
        own = {"batch_size": batch_size, "max_batch_size": max_batch_size, "max_length": max_length}
        with _quiet_about_models_in_memory():
            super().__init__(self.reader.module.model, **source, **own)
        with quiet_for_now():
            self._device = silent_trainer(on_one_device(self.run.choices.trainer), []).strategy.root_device

    def _check(self, module: DynamicEvaluation) -> None:
        """Raises SettingError where a context cannot be learned from, or not by one set of weights."""
        if self.learn == "none":
            return
        has_none = not (module.context.memory and has_states(module.model.config))
        must = "be none for a model with states, as a context may end in a segment of one token"
        require(has_none, "learn", must, got="context")
        require(bool(module.rules), "learn", "be none where nothing learns", got="context", advice="choose an update")
        for name in ("rates", "memories", "mixture"):
            got = self.run.choices[name]
            require(not got, name, "be left out with learn=context, where one set of weights answers",
                    got=got, advice="choose an update and its lr")  # fmt: skip

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats; the texts are the documents of one run of `dynlight.fit`.

        Raises:
            SettingError: if a text cannot be read to its end.
        """
        texts = [request.args[0] for request in requests]
        documents = [Document.from_text(i, f"text {i}", text, self.tokenizer) for i, text in enumerate(texts)]
        nats = _Nats()
        with quiet_for_now():
            module = self.run.read(self.run.module(), documents, [nats])
        for index, failure in module.failures.of_documents.items():
            if not failure.stopped:
                rank_zero_warn(
                    f"{documents[index].name} was read by the initial weights from segment {failure.segment} on"
                )
            require(not failure.stopped, documents[index].name, "be read to its end", advice="lower the rate or set clip",
                    got=f"stopped in segment {failure.segment} as {failure.reason}")  # fmt: skip
        likelihoods = [0.0 - nats.of_documents[document.index] for document in documents]
        for text, likelihood in zip(texts, likelihoods, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihood)
        return likelihoods

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest; each context is read once."""
        of_contexts: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, tokens, _) in enumerate(requests):
            of_contexts[tuple(tokens) if self.learn == "context" else ()].append(place)
        answers: dict[int, tuple[float, bool]] = {}
        for context, places in of_contexts.items():
            with self._having_read(context):
                own = [requests[place] for place in places]
                found = super()._loglikelihood_tokens(own, disable_tqdm or len(of_contexts) > 1, override_bs)
            answers |= dict(zip(places, found, strict=True))
        return [answers[place] for place in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What each context is continued with."""
        if self.learn == "none":
            with self._having_read(()):
                return super().generate_until(requests, disable_tqdm)
        answers = []
        for request in requests:
            with self._having_read(self.tok_encode(request.args[0])):
                answers += super().generate_until([request], disable_tqdm=True)
        return answers

    @contextmanager
    def _having_read(self, context: Sequence[int]) -> Iterator[None]:
        """Within the block the model reads by weights that have learned from these tokens, and from no others."""
        self.reader.forget()
        own = list(dropwhile(self.prefix_token_id.__eq__, context))  # the reader begins with it anyway
        self.reader.read_tokens(torch.tensor(own, dtype=torch.int64))
        with self.reader.weights(static=not own) as model:
            model.to(self.device)  # Lightning leaves it on the CPU
            yield

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results: besides what `hf` tells, that and how the model has learned."""
        learned = {"loglikelihood_rolling": "each text, segment by segment, each scored before it is learned from"}
        if self.learn == "context":
            learned["loglikelihood, generate_until"] = "each context, and nothing of a continuation"
        protocol = self.reader.protocol
        own = {"learn": self.learn, "learned_from": learned if self.reader.module.rules else {}, "protocol": protocol}
        return super().get_model_info() | {"dynlight": version("dynlight"), **own}


if "dynlight" not in model_registry:  # where lm-eval has not found the entry point itself
    model_registry.register("dynlight")(DynamicLM)


def arguments_of(config: str | None, settings: dict[str, Any]) -> list[str]:
    """The arguments of `python -m dynlight.fit` that a configuration and single settings over it stand for."""
    named = {f"{_SECTION_OF[name]}.{name}" if name in _SECTION_OF else name: each for name, each in settings.items()}
    if config is None:
        context = "Overlapping" if "context.window" in named else "TransformerXL"
        named = {"data.path": "requests of lm-eval", "context": context} | named
    # A class comes before its settings.
    values = [(name, named[name]) for name in sorted(named, key=lambda name: name.count("."))]
    texts = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values]
    return [*([f"--config={config}"] if config is not None else []), *texts]


@contextmanager
def _quiet_about_models_in_memory() -> Iterator[None]:
    """Silences within the block what `hf` says of a model that is loaded already: that settings may be ignored."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Nats(Meter):
    """Adds up the nats of each document."""

    def __init__(self) -> None:
        self.of_documents: defaultdict[int, float] = defaultdict(float)

    def see(self, module: DynamicEvaluation, segment: Segment) -> None:
        if (score := module.score) is not None:
            for row in score.rows:
                self.of_documents[segment.documents[row].index] += score.sums[row]
