"""Reset: when what was learned is forgotten."""

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import Callback, Trainer

from dynlight.documents.waves import Segment
from dynlight.errors import SettingError

if TYPE_CHECKING:
    from dynlight.learning.module import DynamicEvaluation


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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: "DynamicEvaluation", batch: Segment, batch_idx: int
    ) -> None:
        if self.every == "document" and batch.is_first:
            pl_module.reset(len(batch.documents))

    def __str__(self) -> str:
        return "every document" if self.every == "document" else "never"
