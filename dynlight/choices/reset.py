"""Reset: when what was learned is forgotten."""

from typing import Literal

from lightning.pytorch import Callback, Trainer

from dynlight.choices.learner import Learner
from dynlight.documents.segments import Segment
from dynlight.errors import SettingError


class ResetWeights(Callback):
    """Restores weights, optimizer state and random state before the first segment of a document.

    Memory is not a matter of this choice: it never crosses a document boundary.

    Args:
        every: `document`, or `never` (learning carries on through the documents in their given order).

    Raises:
        SettingError: if `every` is neither.
    """

    def __init__(self, every: Literal["document", "never"] = "document") -> None:
        if every not in ("document", "never"):
            raise SettingError("reset.every", "be document or never", got=every)
        self.every = every

    @property
    def carries_over(self) -> bool:
        """Whether what is learned from one document is carried on to the next."""
        return self.every == "never"

    def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, batch: Segment, batch_idx: int) -> None:
        if batch.is_first and not self.carries_over:
            pl_module.reset(len(batch.documents))

    def __str__(self) -> str:
        return "never" if self.carries_over else "every document"
