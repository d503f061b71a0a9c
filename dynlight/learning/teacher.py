"""Teacher: another language model that reads the same windows, learns nothing, and may be learned from."""

from typing import Any

import torch
from transformers import PreTrainedModel

from dynlight.choices.context import refused_memory
from dynlight.documents.segments import Context, Segment
from dynlight.errors import require
from dynlight.learning.carried import Memory, each_of, restored
from dynlight.learning.forward import Keeps, Reading, nats_function
from dynlight.learning.trial import reason_against_memory


class Teacher:
    """Reads the documents of a wave in one batch, with a memory of its own.

    Args:
        model: with the vocabulary of the model that learns.
        context: what a forward has in view.
        compile: whether the forward is compiled, or the mode of it.
    """

    def __init__(self, model: PreTrainedModel, context: Context, compile: bool | str = False) -> None:
        self._model = model
        self._context = context
        self._nats_of = nats_function(model, compile)
        self._memory: Memory = None

    @torch.no_grad()
    def score(self, segment: Segment, keeps: Keeps = ()) -> Reading:
        """Reads a segment: nats [D, S], and what is to be kept."""
        documents = len(segment.documents)
        memory = None if segment.is_first else each_of(self._memory, lambda tensor: tensor[:documents])
        reading = self._nats_of(segment, memory, self._context, keeps=keeps)
        self._memory = reading.memory
        return reading

    def progress_state(self) -> Memory:
        """The memory."""
        return self._memory

    def load_progress_state(self, state: Any) -> None:
        """Puts back what `progress_state` gave."""
        self._memory = restored(state, self._model.device)


def check_teacher(teacher: PreTrainedModel, model: PreTrainedModel, context: Context) -> None:
    """Raises SettingError unless a teacher reads the same tokens, in this context; its weights may lie on `meta`."""
    known, own = (each.get_output_embeddings().weight.shape[0] for each in (teacher, model))
    require(known == own, "teacher.pretrained", f"predict the {own:,} tokens that the model does", got=f"{known:,}",
            advice="choose a model of the same family")  # fmt: skip
    context.check(teacher.config)


def try_teacher(teacher: PreTrainedModel, context: Context) -> None:
    """Raises SettingError where a teacher cannot be read with a memory, if the context has one."""
    if context.memory and (reason := reason_against_memory(teacher)) is not None:
        raise refused_memory(teacher.config, reason, got=type(context).__name__)
