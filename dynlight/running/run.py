"""Run: what a configuration describes, and the one place where it is assembled."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer, seed_everything

from dynlight.documents.document import Document
from dynlight.errors import SettingError, require
from dynlight.learning.module import DynamicEvaluation
from dynlight.learning.processes.processes import way_of
from dynlight.learning.stream import DocumentStream
from dynlight.running.configuration import CHOICES, instantiate, parse
from dynlight.running.trainer import on_one_device, silent_trainer


class Run:
    """What a configuration describes; tokenizer, documents and weights are read when they are asked for.

    Args:
        config: as `parse` gives it.

    Raises:
        SettingError: if its settings cannot be run.
    """

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self.choices = instantiate(config)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Run":
        """The run that the arguments of `python -m dynlight.fit` describe, to be read without logging it anywhere."""
        config = parse(arguments)
        config.trainer.logger = False
        return cls(config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            SettingError: if the context cannot read the model, or there is no tokenizer.
        """
        self.choices.context.check(self.choices.model.config())
        return self.choices.model.load_tokenizer()

    @cached_property
    def documents(self) -> list[Document]:
        """The documents.

        Raises:
            SettingError: if they cannot be read, or the model has no embedding for one of their tokens.
        """
        documents: list[Document] = self.choices.data.load(self.tokenizer)
        _check_tokens(documents, len(self.outline.model.get_input_embeddings().weight))
        return documents

    @cached_property
    def teacher(self) -> Any:
        """The teacher with its weights, which nothing changes; None: there is none.

        Raises:
            SettingError: if it cannot be read, or has other tokens.
        """
        if self.choices.teacher is None:
            return None
        with _named_teacher():
            teacher, tokenizer = self.choices.teacher, self.choices.teacher.load_tokenizer()
            must = "have the tokenizer of model.pretrained"
            is_same = tokenizer.get_vocab() == self.tokenizer.get_vocab()
            require(is_same, "teacher.pretrained", must, got=teacher.pretrained)
            return teacher.load()

    def stream(self) -> DocumentStream:
        """The stream of all documents."""
        documents, stream = self.documents, copy.copy(self.choices.data)
        stream.loaded = documents
        return stream

    @cached_property
    def outline(self) -> DynamicEvaluation:
        """The module without weights, on torch's `meta` device."""
        teacher = None
        if self.choices.teacher is not None:
            compile = self.choices.teacher.compile
            require(compile is False, "teacher.compile", "be left out, as model.compile is for both", got=compile)
            with _named_teacher():
                teacher = self.choices.teacher.outline()
        return DynamicEvaluation(self.choices.model.outline(), self.tokenizer, teacher=teacher, **self.chosen())

    def check(self, trainer: Trainer) -> None:
        """Raises SettingError where this trainer cannot read as the choices say; no weights are loaded."""
        self.outline.check(trainer, self.choices.data.together)
        if compile := self.choices.model.compile:
            is_sharded, got = way_of(trainer.strategy) == "sharded", "true" if compile is True else compile
            require(not is_sharded, "model.compile", "be false with trainer.strategy model_parallel", got=got)

    def chosen(self, **changes: Any) -> dict[str, Any]:
        """The choices that a module is made of, with changes; copies, as some of them hold state."""
        chosen = {name: self.choices[name] for name in CHOICES} | changes
        return {name: value if name == "update" else copy.deepcopy(value) for name, value in chosen.items()}

    def module(self, model: Any = None, digests: bool = False, **changes: Any) -> DynamicEvaluation:
        """The module, ready for a Trainer; all random numbers start from the configuration's seed.

        Args:
            model: the model with its weights (default: loaded anew).
            digests: whether its scores carry digests.
            changes: of the choices.
        """
        seed_everything(self.config.seed, verbose=False)
        model = self.choices.model.load() if model is None else model
        compile = self.choices.model.compile
        settings = {"teacher": self.teacher, "digests": digests, "compile": compile}
        return DynamicEvaluation(model, self.tokenizer, **settings, **self.chosen(**changes))

    def read(
        self,
        module: DynamicEvaluation,
        documents: Sequence[Document],
        meters: Sequence[Callback] = (),
        together: int | Literal["auto"] | None = None,
        settings: Namespace | None = None,
    ) -> DynamicEvaluation:
        """Reads documents with a module, in this process alone and without output, and returns the module afterwards.

        Args:
            module: as `module()` returns it.
            documents: that are read.
            meters: callbacks that look on.
            together: how many documents adapt at once (default: as configured, or 1 where that is `auto`).
            settings: of the Trainer (default: those of the configuration, on one device).
        """
        together = self.choices.data.together if together is None else together
        stream = DocumentStream.of(documents, 1 if together == "auto" else together)
        settings = on_one_device(copy.deepcopy(self.choices.trainer)) if settings is None else settings
        silent_trainer(settings, meters).fit(module, stream)
        return module


@contextmanager
def _named_teacher() -> Iterator[None]:
    """Lets an error at the teacher name its section, where the class names that of the model."""
    try:
        yield
    except SettingError as error:
        raise SettingError.worded(re.sub(r"^model\.", "teacher.", str(error))) from error


def _check_tokens(documents: Sequence[Document], rows: int) -> None:
    """Raises SettingError where a document has a token that the model has no embedding for."""
    for document in documents:
        if (highest := max(document.prefix, int(document.tokens.max()) if len(document) else 0)) >= rows:
            raise SettingError(
                "model.tokenizer",
                f"give ids below {rows}, the rows of the model's embedding",
                got=f"{highest} in {document.name}",
                advice="choose the tokenizer that the model was trained with",
            )
