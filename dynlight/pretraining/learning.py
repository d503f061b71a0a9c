"""How a base model learns: the LightningModule of pretraining, and the callback that saves its checkpoints."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynlight.errors import SettingError, require
from dynlight.pretraining.muon import PreciseMuon

CURVE_ROWS = 200


def mean_nats(model: PreTrainedModel, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of −ln p(token | those before it) over windows [windows, W + 1], from an fp32 softmax."""
    logits = model(input_ids=windows[:, :-1], attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class Pretraining(LightningModule):
    """Learn a causal language model: Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases.

    Both rates follow one trapezoid over the fraction t of updates done: min(1, t / warmup, (1 − t) / decay).

    Args:
        updates: updates in the whole run.
        matrix_lr: Muon's rate, times sqrt(max(1, rows / columns)) for each matrix.
        lr: AdamW's rate, betas 0.9 and 0.95.
        weight_decay: decoupled decay of Muon's matrices, as a multiple of their rate.
        warmup: fraction of the updates over which the rates rise.
        decay: fraction of the updates over which they fall to zero.
        clip: largest norm of the gradient.
        reach: how many tokens back attention may look, itself included, in turn by update; null is the whole window.
            Where it is shorter than the window, a model learns to do without a window's first tokens, as it must when
            it reads on and on with a memory (the "attention sink" of Xiao et al. 2023, arXiv 2309.17453).
        compile: whether the forward runs through `torch.compile`.
        model: any causal model of transformers, its weights in fp32; `self.model` may be set later, before training.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        updates: int,
        matrix_lr: float = 0.02,
        lr: float = 0.003,
        weight_decay: float = 0.01,
        warmup: float = 0.02,
        decay: float = 0.7,
        clip: float = 1.0,
        reach: list[int] | None = None,
        compile: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"matrix_lr": matrix_lr, "lr": lr, "weight_decay": weight_decay}.items():
            require(math.isfinite(value) and value >= 0, f"learning.{name}", "be finite and at least 0", got=value)
        for name, fraction in {"warmup": warmup, "decay": decay}.items():
            require(0 < fraction <= 1, f"learning.{name}", "be above 0 and at most 1", got=fraction)
        require(clip > 0, "learning.clip", "be above 0", got=clip)
        require(all(tokens >= 1 for tokens in reach or []), "learning.reach", "be lengths of at least 1", got=reach)
        self.automatic_optimization = False
        self.model: Any = model
        self.updates_in_all = updates
        self.matrix_lr, self.lr, self.weight_decay = matrix_lr, lr, weight_decay
        self.warmup, self.decay, self.clip, self.reach = warmup, decay, clip, reach or []
        self.mean_nats = torch.compile(mean_nats, dynamic=False) if compile else mean_nats
        self.updates, self.seconds, self.began = 0, 0.0, 0.0
        self.curve: list[tuple[int, float, float]] = []
        self.recent: list[torch.Tensor] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Give Muon the matrices inside the blocks and AdamW all the rest."""
        outside = [module for module in self.modules() if isinstance(module, torch.nn.Embedding)]
        outside += [head] if (head := self.model.get_output_embeddings()) is not None else []
        embeddings = {weight for module in outside for weight in module.parameters()}
        matrices = [weight for weight in self.parameters() if weight.ndim == 2 and weight not in embeddings]
        others = [weight for weight in self.parameters() if weight.ndim != 2 or weight in embeddings]
        # Under bf16, Newton-Schulz steps are those of `torch.optim.Muon` to the last bit.
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else torch.float32
        muon = PreciseMuon(matrices, self.matrix_lr, self.weight_decay, dtype)
        optimizers = [muon, torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        return optimizers

    def rate_factor(self) -> float:
        """Return the factor on both rates for the next update."""
        done = (self.updates + 0.5) / self.updates_in_all
        return min(1.0, done / self.warmup, (1 - done) / self.decay)

    def attention_mask(self, window: int) -> torch.Tensor | None:
        """Return an additive mask [1, 1, W, W] for the next update, or None where all earlier tokens may be seen."""
        if not self.reach:
            return None
        reach = self.reach[self.updates % len(self.reach)]
        seen = torch.ones(window, window, dtype=torch.bool, device=self.device).tril().triu(1 - reach)
        return torch.zeros(1, 1, window, window, device=self.device).masked_fill(~seen, -math.inf)

    def on_train_start(self) -> None:
        """Start the clock at the seconds that a resumed run has taken already."""
        self.began = time.perf_counter() - self.seconds

    def training_step(self, windows: torch.Tensor) -> None:
        """Learn from the windows [windows, W + 1] of one update."""
        nats = self.mean_nats(self.model, windows, self.attention_mask(windows.shape[1] - 1))
        self.manual_backward(nats)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        factor = self.rate_factor()
        for optimizer in self.optimizers():  # type: ignore[union-attr] # Muon and AdamW, a list
            for group in optimizer.param_groups:
                group["lr"] = factor * group["full_lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        self.recent.append(nats.detach())
        if self.updates % max(1, self.updates_in_all // CURVE_ROWS) == 0 or self.updates == self.updates_in_all:
            self.add_to_curve(self.updates * windows[:, 1:].numel())

    def add_to_curve(self, tokens: int) -> None:
        """Add a row to the curve and print it: tokens read, seconds, mean nats per token since the row before."""
        self.seconds = time.perf_counter() - self.began
        loss = torch.stack(self.recent).double().mean().item()
        if not math.isfinite(loss):
            got, advice = f"{loss} after {self.updates} updates", "lower learning.lr and learning.matrix_lr"
            raise SettingError("the loss", "be finite", got=got, advice=advice)
        self.curve.append((tokens, self.seconds, loss))
        self.recent = []
        self.log_dict({"tokens": float(tokens), "nats_per_token": loss})
        print(f"{tokens:>13,} tokens {self.seconds:>8,.0f} s {loss:8.4f} nats per token", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the place in the stream and the curve to what a checkpoint keeps."""
        checkpoint["pretraining"] = {
            "updates": self.updates,
            "seconds": time.perf_counter() - self.began,
            "curve": self.curve,
            "recent": self.recent,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the place in the stream and the curve that a checkpoint keeps."""
        state = checkpoint["pretraining"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.curve, self.recent = [tuple(row) for row in state["curve"]], list(state["recent"])


class TimedCheckpoint(Callback):
    """Save a checkpoint, `last.ckpt`, every few minutes (Lightning's own is not timed under manual optimization)."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.path, self.seconds, self.saved = folder / "last.ckpt", minutes * 60, 0.0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin to count the minutes to the first checkpoint."""
        self.saved = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save a checkpoint where the last one is old enough."""
        if time.perf_counter() - self.saved >= self.seconds:
            trainer.save_checkpoint(self.path)
            self.saved = time.perf_counter()
