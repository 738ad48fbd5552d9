"""How far a response is from the rows a difference-mode head was fitted on: :class:`RowPosterior` (design 2.6).

The variance of a *difference* does not measure distance to the training data: its prior is 2κ²(1 − k(yᵢ, yⱼ)), so with
few data it is ‖Δ‖ again. The posterior of a *row's* score does: P_r = s·k₀·I + Σ φφᵀ over the training rows, on the
head's own features, and

    n = s·φᵀP_r⁻¹φ · k₀ / k(x, x)      the share of the prior variance of a row's score that those rows leave

near 0 on a training row and near 1 far from all of them. k(x, x) is κ² (= k₀) for random features, whose ‖φ‖² is that
up to 1 ± 1/√(2D), so n may exceed 1 by as much; for linear features it is ‖φ‖², n ≤ 1 exactly, and k₀ is the mean of
it over the training rows. It is a gaussian :class:`~rmcore.head.posterior.Posterior`, summed by ``ops.accumulate`` and
served by ``ops.score`` with a second factor, on every backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmcore import ops
from rmcore._base.errors import reject
from rmcore.head.posterior import Posterior, check_finite
from rmcore.head.ranks import Ranks
from rmcore.ops.dispatch import Backend
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["RowPosterior", "counted_rows"]


class RowPosterior:
    """The posterior of a row's score, immutable: :meth:`with_rows` makes another.

    Args:
        feature_map: the head's.
        prior: k₀ > 0, the prior variance of a row's score.
        posterior: gaussian, with ridge s·k₀; None for one that serves and does not learn.
        weights: the serving weights, where already built (loading); otherwise from the posterior.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        prior: float,
        posterior: Posterior | None,
        weights: HeadWeights | None = None,
    ) -> None:
        if posterior is None and weights is None:
            reject("posterior, weights", "neither", "one of them")
        self.feature_map = feature_map
        self.prior = prior
        self.posterior = posterior
        self._weights = weights

    @classmethod
    def fit(
        cls,
        feature_map: FeatureMap,
        hidden: Tensor,
        ridge: float,
        *,
        backend: Backend = "auto",
        ranks: Ranks | None = None,
    ) -> RowPosterior:
        """From training rows (R, h), each counted once; ``ridge`` is s, in units of the prior.

        Of several ranks each gives its own rows; one that two of them have counts twice.

        Raises as :meth:`Posterior.accumulate`.
        """
        d = feature_map.num_features
        if feature_map.features == "rff":
            prior = feature_map.feature_scale**2 * d / 2
        elif ranks is None:
            prior = float(_squared_norm(feature_map, hidden).mean()) or 1.0
        else:
            norms = _squared_norm(feature_map, hidden).double()
            total, count = ranks.total(torch.stack([norms.sum(), norms.new_tensor(len(norms))])).tolist()
            prior = total / count or 1.0
        empty = Posterior(d, ridge=ridge * prior, likelihood="gaussian", device=hidden.device)
        rows = cls(feature_map, prior, empty).with_rows(hidden, backend=backend)
        if ranks is None or rows.posterior is None:
            return rows
        return cls(feature_map, prior, rows.posterior.summed(ranks)[0])

    @property
    def count(self) -> int | None:
        """How many rows it has seen; None where it came without its posterior."""
        return None if self.posterior is None else self.posterior.count

    @property
    def weights(self) -> HeadWeights:
        """The serving weights: v of ``ops.score`` is n, or for linear features n·‖φ‖²."""
        if self._weights is None:
            assert self.posterior is not None
            factor = self.posterior.factor()
            if self.feature_map.features == "rff":
                factor = factor / math.sqrt(self.prior)
            self._weights = HeadWeights.build(self.feature_map, factor.new_zeros(len(factor)), 0.0, factor, 0.0)
        return self._weights

    @torch.no_grad()
    def novelty(self, hidden: Tensor, *, backend: Backend = "auto") -> Tensor:
        """``n`` (R,) float32 of rows (R, h); a row that is not finite, or overflows, gets NaN."""
        n = ops.score(hidden, self.weights, backend=backend).variance
        if self.feature_map.features == "linear":
            norm = _squared_norm(self.feature_map, hidden).to(n)
            n = torch.where(norm == 0, 1.0, n / norm)  # a row of zeros tells nothing
        return torch.where(n.isfinite(), n, torch.nan)

    @torch.no_grad()
    def with_rows(self, hidden: Tensor, *, backend: Backend = "auto") -> RowPosterior:
        """One that has seen these rows (R, h) too; the same as having been fitted with them.

        Raises:
            InputError: it came without its posterior.
            NonFiniteError: a row holds NaN or Inf, or overflows.
        """
        if self.posterior is None:
            reject("row posterior", "serving weights only", "a head fitted here or saved with include_posterior=True")
        check_finite(hidden)
        known = self.posterior
        posterior = Posterior.from_gram(known.gram, known.count, ridge=known.ridge, likelihood="gaussian")
        if not len(hidden):
            return RowPosterior(self.feature_map, self.prior, posterior)
        nothing = torch.zeros(len(hidden), device=hidden.device)
        beta = torch.zeros(known.num_features, dtype=torch.float64, device=hidden.device)
        posterior.accumulate(hidden, nothing, self.feature_map, beta, backend=backend)
        return RowPosterior(self.feature_map, self.prior, posterior)

    def to(self, device: torch.device | str, feature_map: FeatureMap) -> RowPosterior:
        """The same on another device, where the head's features are ``feature_map``."""
        known = self.posterior
        posterior = None
        if known is not None:
            gram = known.gram.to(device)
            posterior = Posterior.from_gram(gram, known.count, ridge=known.ridge, likelihood=known.likelihood)
        return RowPosterior(feature_map, self.prior, posterior, self.weights.to(device, feature_map))


def counted_rows(hidden: Tensor, pairs: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """The rows of ``hidden`` that a pair of positive weight names, each once, in their order."""
    named = pairs if sample_weight is None else pairs[sample_weight > 0]
    counted = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    counted[named.flatten()] = True
    return hidden if bool(counted.all()) else hidden[counted]


def _squared_norm(feature_map: FeatureMap, hidden: Tensor) -> Tensor:
    return feature_map(hidden).square().sum(-1) * feature_map.feature_scale**2
