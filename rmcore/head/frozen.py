"""The SNGP head frozen for serving: :class:`FrozenHead`, and pair scores.

Hidden states (B, h) → spectral-normalised layer → random Fourier features → logit and variance (design section 2).
Sources: SNGP, Liu et al. 2020 (arXiv:2006.10108); its pairwise use for routing to a judge, NeurIPS 2025.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rmcore import ops
from rmcore._base.errors import NonFiniteError, reject
from rmcore.head.config import HeadConfig
from rmcore.head.posterior import Posterior, all_finite, check_finite
from rmcore.head.rows import RowPosterior, counted_rows
from rmcore.ops import reference
from rmcore.ops.dispatch import Backend
from rmcore.ops.functional import Scores
from rmcore.ops.pair_layout import PairLayout
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["FrozenHead", "PairScores"]


class _PairColumns(NamedTuple):
    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


class PairScores(_PairColumns):
    """Difference mode: every pair i < j of every group, flat, in the order of ``ops.pair_variance``; each (Q,).

    Attributes:
        novelty: (Q,) a pair's distance from the training data in (0, 1], the mean of its two rows'; None unless asked
            for. Not among the four columns that a ``PairScores`` is a tuple of.
        row_novelty: (R,) that of each row.
    """

    novelty: Tensor | None = None
    row_novelty: Tensor | None = None


class FrozenHead:
    """A fitted head that serves: immutable features, β, and the posterior's factor.

    ``update`` is the one thing that changes it: it adds data to the posterior and marks the factor stale, and the next
    call that needs the factor rebuilds it first.

    Args:
        config: what the head is; ``length_scale`` filled in.
        feature_map: the frozen features.
        beta: (D,) for φ.
        beta0: logit offset.
        posterior: the posterior fitted with exactly this ``feature_map``, or None for a head that will not learn.
        weights: the serving weights, where already built (loading); otherwise from the posterior.
        rows: the row posterior of the same features, or None: then the head knows no :meth:`novelty`.

    Raises InputError for neither posterior nor weights.
    """

    def __init__(
        self,
        config: HeadConfig,
        feature_map: FeatureMap,
        beta: Tensor,
        beta0: float = 0.0,
        posterior: Posterior | None = None,
        weights: HeadWeights | None = None,
        rows: RowPosterior | None = None,
    ) -> None:
        if posterior is None and weights is None:
            reject("posterior, weights", "neither", "one of them")
        self.config = config
        self.feature_map = feature_map
        self.beta = beta.detach().double()
        self.beta0 = float(beta0)
        self.posterior = posterior
        self.rows = rows
        self._weights = weights
        self._served_count = posterior.count if posterior is not None and weights is not None else -1

    @property
    def weights(self) -> HeadWeights:
        """The serving weights, rebuilt first if the posterior has new data."""
        stale = self.posterior is not None and self.posterior.count != self._served_count
        if self._weights is None or stale:
            assert self.posterior is not None
            self._weights = HeadWeights.build(
                self.feature_map, self.beta, self.beta0, self.posterior.factor(), self.config.resolved_amplitude
            )
            self._served_count = self.posterior.count
        return self._weights

    def build_weights(self) -> None:
        """Build what serves, where that has not been done yet: the first score need not wait for it."""
        _ = self.weights
        if self.rows is not None:
            _ = self.rows.weights

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.beta.device

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.feature_map.dtype

    @torch.no_grad()
    def score(
        self, hidden: Tensor, *, backend: Backend = "auto", nonfinite: Literal["raise", "keep"] = "raise"
    ) -> Scores:
        """Score hidden rows (B, h), each a pair in concat mode. See :func:`rmcore.ops.score`.

        Raises:
            NonFiniteError: a row is NaN or Inf, or overflows the serving dtype, unless ``nonfinite="keep"``, which
                returns NaN or Inf for that row.
        """
        scores = ops.score(hidden, self.weights, backend=backend)
        if nonfinite == "raise":
            _check_results(scores.logit, scores.variance, hidden)
        return scores

    @torch.no_grad()
    def score_pairs(
        self,
        hidden: Tensor,
        group_sizes: Tensor,
        *,
        backend: Backend = "auto",
        nonfinite: Literal["raise", "keep"] = "raise",
        dtype: torch.dtype = torch.float32,
        novelty: bool = False,
    ) -> PairScores:
        """Difference mode: all pairs of each group from one row a response. See :func:`rmcore.ops.pair_variance`.

        ``dtype`` is that of the result. The kernel's g and v are float32; u and p are made of them in ``dtype``, since
        v may be so small that 1 + a v has few digits left in float32, and routers rank by u. ``novelty`` asks for that
        of :meth:`novelty` too, a second pass over the rows.

        Raises:
            InputError: ``novelty`` of a head that has no row posterior.
            NonFiniteError: a row is NaN or Inf, or overflows the serving dtype, unless ``nonfinite="keep"``, which
                returns NaN for the pairs of that row; all other pairs are as if the row were not there.
        """
        if self.config.mode != "difference":
            reject("mode", self.config.mode, "a difference-mode head")
        weights = self.weights
        g, v = ops.pair_variance(hidden, group_sizes, weights, backend=backend)
        if not all_finite(sums := g + v) and not bool((finite := sums.isfinite()).all()):
            if nonfinite == "raise":
                check_finite(hidden)
                raise NonFiniteError(
                    "hidden: got finite rows that overflow the head's dtype, expected results to be finite"
                )
            self._isolate_bad_rows(hidden, group_sizes, g, v, finite, backend)
        g, v = g.to(dtype), v.to(dtype)
        u = reference.uncertainty(v, weights.amplitude)
        p = reference.preference(g, u)
        scores = PairScores(g, v, u, p)
        if novelty:
            layout = PairLayout(group_sizes)
            scores.row_novelty = self.novelty(hidden, backend=backend).to(dtype)
            scores.novelty = reference.pair_novelty(scores.row_novelty, layout.first, layout.second)
        return scores

    @torch.no_grad()
    def novelty(self, hidden: Tensor, *, backend: Backend = "auto") -> Tensor:
        """How far each row of (R, h) is from the training rows: (R,) float32 in (0, 1] (:mod:`rmcore.head.rows`).

        A row that is not finite, or overflows the serving dtype, gets NaN.

        Raises InputError in concat mode, whose v measures that distance by itself, and where the head has no row
        posterior: saved by an older version, or fitted with ``row_ridge=None``.
        """
        return self.check_novelty().novelty(hidden, backend=backend)

    def check_novelty(self) -> RowPosterior:
        """The row posterior; raises InputError as :meth:`novelty` where there is none."""
        if self.config.mode != "difference":
            reject("novelty", "a concat-mode head", "one in difference mode", "In concat mode v measures distance")
        if self.rows is None:
            reject("novelty", "a head without row posterior", "one fitted with row_ridge", "Fit the head again")
        return self.rows

    def _isolate_bad_rows(
        self, hidden: Tensor, group_sizes: Tensor, g: Tensor, v: Tensor, finite: Tensor, backend: Backend
    ) -> None:
        """Score the good rows of every spoilt group again: a kernel may share work between the rows of a group."""
        row = pair = 0
        for k in group_sizes.tolist():
            rows, pairs = slice(row, row + k), slice(pair, pair + k * (k - 1) // 2)
            row, pair = rows.stop, pairs.stop
            if bool(finite[pairs].all()):
                continue
            # A finite row is bad too where it overflows in the head.
            own = ops.score(hidden[rows], self.weights, backend=backend)
            good = (own.logit + own.variance).isfinite() & hidden[rows].isfinite().all(dim=1)
            i, j = torch.triu_indices(k, k, 1, device=good.device)
            usable = good[i] & good[j]
            g[pairs], v[pairs] = torch.nan, torch.nan
            if bool(usable.any()):
                count = good.sum().to(group_sizes)[None]
                again = ops.pair_variance(hidden[rows][good], count, self.weights, backend=backend)
                g[pairs][usable], v[pairs][usable] = again

    @torch.no_grad()
    def update(
        self, hidden: Tensor, labels: Tensor, *, pairs: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> None:
        """Add data to the posterior at the present β, and their rows to the row posterior where there is one.

        The factors are rebuilt before they next serve.

        Args:
            hidden: (R, h) rows.
            labels: (N,) in [0, 1]: of rows in concat mode, else of pairs, that the first is the better.
            pairs: (N, 2) int64 of rows, in difference mode; None in concat mode.
            sample_weight: (N,) how much each counts; None for all alike.

        Raises:
            InputError: the head was saved without its posterior, or shapes that do not fit.
            NonFiniteError: a row is NaN or Inf.
        """
        if self.posterior is None:
            reject("posterior", "none", "a head fitted here or saved with include_posterior=True")
        rows = self.rows_with(hidden, pairs, sample_weight)
        self.posterior.accumulate(
            hidden, labels, self.feature_map, self.beta, pairs=pairs, sample_weight=sample_weight, beta0=self.beta0
        )
        self.rows = rows

    def rows_with(
        self,
        hidden: Tensor,
        pairs: Tensor | None,
        sample_weight: Tensor | None = None,
        *,
        backend: Backend = "auto",
    ) -> RowPosterior | None:
        """The row posterior after rows (R, h) of new pairs (N, 2), with weights (N,); None where there is none."""
        if self.rows is None or pairs is None:
            return self.rows
        return self.rows.with_rows(counted_rows(hidden, pairs, sample_weight), backend=backend)

    def to(self, device: torch.device | str) -> FrozenHead:
        """The same head on another device."""
        feature_map = self.feature_map.to(device)
        return FrozenHead(
            self.config,
            feature_map,
            self.beta.to(device),
            self.beta0,
            None
            if self.posterior is None
            else Posterior.from_gram(
                self.posterior.gram.to(device),
                self.posterior.count,
                ridge=self.posterior.ridge,
                likelihood=self.posterior.likelihood,
            ),
            self.weights.to(device, feature_map),
            None if self.rows is None else self.rows.to(device, feature_map),
        )


def _check_results(logit: Tensor, variance: Tensor, hidden: Tensor) -> None:
    if all_finite(logit + variance):
        return
    bad = ~(logit.isfinite() & variance.isfinite())
    if bool(bad.any()):
        rows = tuple(bad.nonzero()[:, 0].tolist())
        check_finite(hidden)
        raise NonFiniteError(
            f"hidden: got rows {list(rows[:8])} that overflow the head's dtype, expected finite results", rows
        )
