"""Muon, an optimizer for matrices, whose Newton-Schulz steps may be more precise than torch's."""

import math

import torch


class PreciseMuon(torch.optim.Optimizer):
    """Muon: momentum 0.95 (Nesterov), whose update each matrix takes made nearly orthogonal.

        m ← 0.95 m + 0.05 g,   u = NewtonSchulz(0.95 m + 0.05 g),   θ ← (1 − ε w) θ − ε sqrt(max(1, rows / columns)) u

    What `torch.optim.Muon` does, but for the precision of the five Newton-Schulz steps, which there is bfloat16: a CPU
    without bfloat16 instructions imitates them, and they take longer than forward and backward.

    Args:
        matrices: weights [rows, columns].
        lr: ε.
        weight_decay: w.
        dtype: of the Newton-Schulz steps.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    STEPS = 5

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change each matrix by its gradient."""
        for group in self.param_groups:
            for matrix in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with its singular values moved near 1, in five steps X ← aX + (b XXᵀ + c (XXᵀ)²) X."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        wide = matrix.to(self.dtype).T if tall else matrix.to(self.dtype)
        wide = wide / wide.norm().clamp(min=1e-7)
        for _ in range(self.STEPS):
            gram = wide @ wide.T
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        return wide.T if tall else wide
