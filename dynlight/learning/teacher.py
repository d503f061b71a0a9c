"""Teacher: another language model that reads the same windows, learns nothing, and may be learned from."""

from typing import Any

import torch
from transformers import PreTrainedModel

from dynlight.documents.segments import Context, Segment
from dynlight.errors import SettingError, require
from dynlight.learning.carried import Memory, each_of, restored
from dynlight.learning.forward import Keeps, Reading, nats_function, read_alone
from dynlight.learning.rows import Batch
from dynlight.learning.trial import reason_against_memory, reason_against_reading, reason_against_rows


class Teacher:
    """Reads the documents of a wave, with a memory of its own: in one batch, or where a trial shows that it can't one by one.

    Args:
        model: with the vocabulary of the model that learns.
        context: what a forward has in view.
        together: documents of a wave, at most.
        compile: whether the forward is compiled, or the mode of it.
    """

    def __init__(
        self, model: PreTrainedModel, context: Context, together: int = 1, compile: bool | str = False
    ) -> None:
        self._model = model
        self._context = context
        self._nats_of = nats_function(model, compile)
        self._memory: Memory = None
        self.reason_against_batch = reason_against_rows(model, context, [], Batch([])) if together > 1 else None

    @torch.no_grad()
    def score(self, segment: Segment, keeps: Keeps = ()) -> Reading:
        """Reads a segment: nats [D, S], and what is to be kept."""
        documents = len(segment.documents)
        memory = None if segment.is_first else each_of(self._memory, lambda tensor: tensor[:documents])
        if self.reason_against_batch is None:
            reading = self._nats_of(segment, memory, self._context, keeps=keeps)
        else:
            reading = read_alone(self._model, [], [], segment, memory, self._context, keeps=keeps)
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
    shared = {id(weight) for weight in model.parameters()} & {id(weight) for weight in teacher.parameters()}
    require(
        not shared, "teacher", "be another model, which learns nothing", got="one with weights of the model that learns"
    )
    known, own = (
        len((each.get_output_embeddings() or each.get_input_embeddings()).weight) for each in (teacher, model)
    )
    require(known == own, "teacher.pretrained", f"predict the {own:,} tokens that the model does", got=f"{known:,}",
            advice="choose a model of the same family")  # fmt: skip
    try:
        context.check(teacher.config)
    except SettingError as error:
        raise _refused(teacher, str(error)) from error


def try_teacher(teacher: PreTrainedModel, context: Context) -> None:
    """Raises SettingError where a trial shows that a teacher cannot be read in this context."""
    reason = reason_against_reading(teacher, context)
    if reason is None and context.memory:
        reason = reason_against_memory(teacher)
    if reason is not None:
        raise _refused(teacher, f"it is a model {reason}")


def _refused(teacher: PreTrainedModel, reason: str) -> SettingError:
    must = "be a model that can be read in this context"
    return SettingError("teacher.pretrained", must, got=teacher.config.model_type, advice=reason)
