"""Mixture: one prediction from many experts, without choosing among them.

The experts are the static model, the rules that learn from the document, each at its rate, a teacher, and memories. Which expert is best
differs from text to text and is known only afterwards; the mixture needs no choice, and is nearly as good as the best.
"""

import math
from dataclasses import dataclass

import numpy as np

from dynlight.errors import SettingError


@dataclass(frozen=True)
class Mixture:
    """Predicts each token with all experts, each weighted by how well it did on the tokens before, since the last reset.

    Formula: p(x_t) = Σ_e w_t(e) p_e(x_t), with w_1(e) = 1/n and w_{t+1}(e) = (1 − α) w_t(e) p_e(x_t) / p(x_t) + α/n:
    Bayes' rule, after which a part α of all weight is spread evenly over the experts. With α = 0 it is plain Bayes, whose
    nats of a document are at most those of its best expert + ln n; with α above 0 ("fixed share") the best expert may
    change within the document, which costs about ln(n/α) nats a change and α nats a token. Sources: Herbster and Warmuth
    1998, "Tracking the best expert"; Koolen and de Rooij 2013, "Universal codes from switching strategies".

    It is a distribution over the vocabulary, as a mean of distributions by weights that don't depend on the token. A
    failed expert has weight 0 from then on and is not counted in n. An expert whose nats are NaN fails before that token;
    one that gave the token probability 0 fails after it. The caller guarantees that NaN depends on earlier tokens only.

    Args:
        switching: α, the part of all weight that is spread evenly over the experts after each token.
        teacher: whether the run's teacher is one of the experts.

    Raises:
        SettingError: if α is not at least 0 and under 1.
    """

    switching: float = 0.002
    teacher: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.switching < 1:
            raise SettingError("mixture.switching", "be at least 0 and under 1", got=self.switching)

    def prior(self, experts: int, documents: int) -> np.ndarray:
        """Ln w_1 of E experts for D documents, float64 [E, D]."""
        return np.full((experts, documents), -math.log(experts))

    def predict(
        self, log_weights: np.ndarray, nats: np.ndarray, is_scored: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nats of the mixture on a segment, from the nats of its experts.

        Shapes: E experts, D documents, S columns of the segment.

        Args:
            log_weights: ln w before the segment, [E, D]; −inf for an expert that has failed.
            nats: of each expert, [E, D, S]; an expert that fails is not finite from some token on.
            is_scored: whether a column has a token, bool [D, S]; None: all have. The others change no weight.

        Returns:
            nats: float64 [D, S]; not finite where no expert is left, 0 where there is no token.
            mean_weights: each expert's mean weight over the tokens of the segment, float64 [E, D].
            log_weights: ln w after the segment, float64 [E, D].
        """
        log_chances = -nats.astype(np.float64)
        was_healthy = np.isfinite(log_weights)[:, :, None]
        healthy = was_healthy & np.logical_and.accumulate(np.isfinite(log_chances), axis=2)  # after each token
        predicts = np.concatenate([was_healthy, healthy[:, :, :-1]], axis=2) & ~np.isnan(log_chances)
        log_chances = np.where(predicts, log_chances, -np.inf)
        is_scored = np.ones(nats.shape[1:], dtype=bool) if is_scored is None else is_scored
        mixed = np.zeros(nats.shape[1:])
        sums_of_weights = np.zeros(nats.shape[:2])
        with np.errstate(divide="ignore", invalid="ignore"):  # ln 0 is −∞; without an expert left, all is NaN
            for t in range(nats.shape[2]):
                has_token = is_scored[:, t]
                prior = np.where(predicts[:, :, t], log_weights, -np.inf)
                prior -= _log_sum(prior)
                joint = prior + log_chances[:, :, t]
                log_chance = _log_sum(joint)
                sums_of_weights += np.where(has_token, np.exp(prior), 0.0)
                mixed[:, t] = np.where(has_token, -log_chance, 0.0)
                after = self._switched(joint - log_chance, healthy[:, :, t])
                log_weights = np.where(has_token, after, log_weights)
        return mixed, sums_of_weights / np.maximum(1, is_scored.sum(axis=1)), log_weights

    def _switched(self, log_weights: np.ndarray, healthy: np.ndarray) -> np.ndarray:
        """Ln w once the part α is spread evenly over the healthy experts, float64 [E, D]."""
        if not self.switching:
            return np.where(healthy, log_weights, -np.inf)
        spread = math.log(self.switching) - np.log(healthy.sum(axis=0))
        return np.where(healthy, np.logaddexp(math.log1p(-self.switching) + log_weights, spread), -np.inf)

    def __str__(self) -> str:
        teacher = ", teacher" if self.teacher else ""
        return f"mixture({f'switching {self.switching:g}' if self.switching else 'Bayes'}{teacher})"


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Ln Σ exp over the experts."""
    highest = values.max(axis=0)
    return highest + np.log(np.exp(values - highest).sum(axis=0))
