"""Reset: when what was learned is forgotten."""

from typing import Literal

from lightning.pytorch import Callback, Trainer

from dynlight.choices.learner import Learner
from dynlight.documents.segments import Segment
from dynlight.errors import SettingError, require


class ResetWeights(Callback):
    """Restores weights, optimizer state and random state before the first segment of a document.

    Formula: θ ← θ0 + keep · (θ − θ0). Memory is not a matter of this choice: it never crosses a document boundary.

    Args:
        every: `document`, or `never` (learning carries on through the documents in their given order).
        keep: the share of what was learned that stays, from 0 (all is forgotten) to 1; optimizer state never does. Of a document
            that failed nothing stays.

    Raises:
        SettingError: if `every` is neither, or `keep` is out of range or not 0 where nothing is reset.
    """

    def __init__(self, every: Literal["document", "never"] = "document", keep: float = 0.0) -> None:
        if every not in ("document", "never"):
            raise SettingError("reset.every", "be document or never", got=every)
        require(0 <= keep <= 1, "reset.keep", "be from 0 to 1", got=keep)
        is_of_use = keep == 0 or every == "document"
        require(is_of_use, "reset.keep", "be 0 with reset.every never, where nothing is reset", got=keep)
        self.every = every
        self.keep = keep

    @property
    def carries_over(self) -> bool:
        """Whether what is learned from one document is carried on to the next."""
        return self.every == "never" or self.keep > 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, batch: Segment, batch_idx: int) -> None:
        if batch.is_first and self.every == "document":
            pl_module.reset(len(batch.documents), self.keep)

    def __str__(self) -> str:
        kept = f", {100 * self.keep:g}% kept" if self.keep else ""
        return "never" if self.every == "never" else f"every document{kept}"
