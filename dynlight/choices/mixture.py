"""Mixture: one prediction from many experts, without choosing among them.

The experts are the static model and the same document learned from at several rates, or by several rules. Which of them
is best differs from text to text and is known only afterwards; their mixture is known beforehand, and nearly as good as
the best.
"""

import math
from dataclasses import dataclass

import numpy as np

from dynlight.errors import SettingError


@dataclass(frozen=True)
class Mixture:
    """Predicts each token with all experts, each weighted by how well it did on the tokens before, since the last reset.

    Formula: p(x_t) = Σ_e w_t(e) p_e(x_t), with w_1(e) = 1/n and, by Bayes' rule followed by a part α of all weight that
    is dealt out anew, w_{t+1}(e) = (1 − α) w_t(e) p_e(x_t) / p(x_t) + α/n. With α = 0 it is plain Bayes, whose nats of a
    document are at most those of its best expert + ln n; with α above 0 ("fixed share") the best expert may change within
    the document, which costs about ln(n/α) nats a change and α nats a token. Sources: Herbster and Warmuth 1998, "Tracking
    the best expert"; Koolen and de Rooij 2013, "Universal codes from switching strategies".

    It is a distribution over the vocabulary, as a mean of distributions by weights that don't depend on the token. A
    failed expert has weight 0 from then on and is not counted in n. An expert whose nats are NaN fails before that token;
    one that gave the token probability 0 fails after it. The caller guarantees that NaN depends on earlier tokens only.

    Args:
        switching: α, the part of all weight that is dealt out anew at each token.

    Raises:
        SettingError: if α is not at least 0 and under 1.
    """

    switching: float = 0.002

    def __post_init__(self) -> None:
        if not 0 <= self.switching < 1:
            raise SettingError("mixture.switching", "be at least 0 and under 1", got=self.switching)

    def prior(self, experts: int, documents: int) -> np.ndarray:
        """The logarithms of w_1, float64 [E, D]."""
        return np.full((experts, documents), -math.log(experts))

    def predict(
        self, log_weights: np.ndarray, nats: np.ndarray, is_scored: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nats of the mixture on a segment, from those of its experts.

        Args:
            log_weights: ln w before the segment, [E, D]; −inf for an expert that has failed.
            nats: of each expert, [E, D, S]; an expert that fails is not finite from some token on.
            is_scored: whether there is a token, bool [D, S]; None: everywhere. Elsewhere nothing changes.

        Returns:
            nats: float64 [D, S]; not finite where no expert is left, 0 where there is no token.
            shares: each expert's mean weight over the segment, float64 [E, D].
            log_weights: ln w after the segment, float64 [E, D].
        """
        chances = -nats.astype(np.float64)
        was_healthy = np.isfinite(log_weights)[:, :, None]
        healthy = was_healthy & np.logical_and.accumulate(np.isfinite(chances), axis=2)  # up to and with this token
        fit = np.concatenate([was_healthy, healthy[:, :, :-1]], axis=2) & ~np.isnan(chances)
        chances = np.where(fit, chances, -np.inf)
        is_scored = np.ones(nats.shape[1:], dtype=bool) if is_scored is None else is_scored
        mixed = np.zeros(nats.shape[1:])
        shares = np.zeros(nats.shape[:2])
        with np.errstate(divide="ignore", invalid="ignore"):  # ln 0 is −∞; without an expert left, all is NaN
            for t in range(nats.shape[2]):
                here = is_scored[:, t]
                now = np.where(fit[:, :, t], log_weights, -np.inf)
                now -= _log_sum(now)
                joint = now + chances[:, :, t]
                chance = _log_sum(joint)
                shares += np.where(here, np.exp(now), 0.0)
                mixed[:, t] = np.where(here, -chance, 0.0)
                log_weights = np.where(here, self._share(joint - chance, healthy[:, :, t]), log_weights)
        return mixed, shares / np.maximum(1, is_scored.sum(axis=1)), log_weights

    def _share(self, log_weights: np.ndarray, healthy: np.ndarray) -> np.ndarray:
        if not self.switching:
            return np.where(healthy, log_weights, -np.inf)
        dealt = math.log(self.switching) - np.log(healthy.sum(axis=0))
        return np.where(healthy, np.logaddexp(math.log1p(-self.switching) + log_weights, dealt), -np.inf)

    def __str__(self) -> str:
        return f"mixture(switching {self.switching:g})" if self.switching else "mixture(Bayes)"


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Ln Σ exp over the experts."""
    highest = values.max(axis=0)
    return highest + np.log(np.exp(values - highest).sum(axis=0))
