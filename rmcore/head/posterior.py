"""The Laplace posterior of β: its precision P, kept as a sum, and the triangular factor that serves (design 2.4).

P is summed in float64 and never inverted. New data marks the factor stale, and it is rebuilt before it serves: there is
no way to read an old factor next to new data. Nothing here keeps an autograd graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmcore import ops
from rmcore._base.errors import FactorizationError, NonFiniteError, reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.head.ranks import Ranks
from rmcore.ops import reference
from rmcore.ops.dispatch import Backend
from rmcore.ops.reference import TILE, Likelihood
from rmcore.ops.weights import FeatureMap

__all__ = ["Posterior", "all_finite", "check_finite"]


class Posterior:
    """P = s·I + Σ w φφᵀ over everything accumulated so far.

    Args:
        num_features: D.
        ridge: s > 0, the prior precision of β.
        likelihood: ``logistic`` (w = p(1−p), v = φᵀP⁻¹φ) or ``gaussian`` (w = 1, v = s·φᵀP⁻¹φ).
        device: where P lives.
    """

    def __init__(
        self,
        num_features: int,
        *,
        ridge: float = 1.0,
        likelihood: Likelihood = "logistic",
        device: torch.device | str = "cpu",
    ) -> None:
        check_number("num_features", num_features, COUNT, "at least 1")
        check_number("ridge", ridge, Within(above=0), "a positive finite number")
        if likelihood not in ("logistic", "gaussian"):
            reject("likelihood", repr(likelihood), "'logistic' or 'gaussian'")
        self.num_features = num_features
        self.ridge = ridge
        self.likelihood: Likelihood = likelihood
        self.count = 0
        """How many data (rows or pairs) P has seen."""
        self._gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # lower triangle
        self._cholesky: Tensor | None = None
        self._factor: Tensor | None = None

    @property
    def stale(self) -> bool:
        """True when data came in since the factor was last built (or none was ever built)."""
        return self._factor is None

    @property
    def gram(self) -> Tensor:
        """Σ w φφᵀ (D, D) float64; the lower triangle is meaningful, the upper is not."""
        return self._gram

    @property
    def precision(self) -> Tensor:
        """P (D, D) float64, full and symmetric."""
        p = self._gram.tril() + self._gram.tril(-1).mT
        p.diagonal().add_(self.ridge)
        return p

    @torch.no_grad()
    def accumulate(
        self,
        hidden: Tensor,
        labels: Tensor,
        feature_map: FeatureMap,
        beta: Tensor,
        *,
        pairs: Tensor | None = None,
        sample_weight: Tensor | None = None,
        beta0: float = 0.0,
        backend: Backend = "auto",
    ) -> tuple[Tensor, float]:
        """Add data. Arguments as in :func:`rmcore.ops.accumulate`.

        Returns:
            The gradient Φᵀ(y − p) (D,) float64 and Σ log-likelihood, both of this data alone, at ``beta``.

        Raises:
            NonFiniteError: a row of ``hidden`` has NaN or Inf, or is so large that the sums do; P is unchanged.
            InputError: shapes do not fit; P is unchanged.
        """
        check_finite(hidden)
        gradient = torch.zeros(self.num_features, dtype=torch.float64, device=self._gram.device)
        added = torch.zeros_like(self._gram)
        total = ops.accumulate(
            hidden.detach(),
            labels,
            feature_map,
            beta.detach(),
            precision=added,
            gradient=gradient,
            pairs=pairs,
            sample_weight=sample_weight,
            beta0=beta0,
            likelihood=self.likelihood,
            backend=backend,
        )
        # An entry of a Gram matrix is at most its largest diagonal entry, so these D values tell of all D².
        if not bool((added.diagonal() + gradient).isfinite().all()):
            raise NonFiniteError("hidden: got rows so large that Σ w φφᵀ overflows, expected finite sums")
        self._gram += added
        self.count += int(labels.shape[0])
        self._cholesky = self._factor = None
        return gradient, float(total)

    def merge(self, other: Posterior) -> None:
        """Add the data of another posterior (another shard, another rank).

        Raises InputError where width, ridge or likelihood differ.
        """
        for name in ("num_features", "ridge", "likelihood"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                reject(f"other.{name}", theirs, str(mine))
        self._gram.add_(other._gram.to(self._gram.device))
        self.count += other.count
        self._cholesky = self._factor = None

    def summed(
        self, ranks: Ranks, gradient: Tensor | None = None, log_likelihood: float = 0.0
    ) -> tuple[Posterior, Tensor, float]:
        """The posterior of all ranks' data, in one reduction: P's packed lower triangle, gradient and both counts.

        Added in rank order, so that it is the same on every rank to the bit. Against one pass over all data the sums
        differ by their order only: an entry of P by at most (N + ranks)·2⁻⁵³ of Σ w |φᵢφⱼ|, in practice by far less.

        Args:
            ranks: each of which calls this.
            gradient: (D,) float64 of this rank's data, as :meth:`accumulate` returns it; None for zeros.
            log_likelihood: likewise.

        Returns:
            Posterior, gradient and log-likelihood of all data.
        """
        tiles = reference.pack_lower(self._gram, TILE)
        gradient = tiles.new_zeros(self.num_features) if gradient is None else gradient
        told = torch.tensor([log_likelihood, self.count], dtype=torch.float64, device=tiles.device)
        total = ranks.total(torch.cat([tiles.flatten(), gradient, told]))
        gram = reference.unpack_lower(total[: tiles.numel()].view_as(tiles), self.num_features)
        whole = Posterior.from_gram(gram, int(total[-1]), ridge=self.ridge, likelihood=self.likelihood)
        return whole, total[tiles.numel() : -2], float(total[-2])

    def cholesky(self) -> Tensor:
        """L (D, D) float64 with P = L Lᵀ.

        Raises:
            FactorizationError: P is not positive definite in float64, with its condition number and what to change.
        """
        if self._cholesky is None:
            p = self._gram.tril()
            p.diagonal().add_(self.ridge)
            lower, info = torch.linalg.cholesky_ex(p)
            if int(info) != 0 or not bool(lower.diagonal().isfinite().all()):
                raise self._not_positive_definite(int(info))
            self._cholesky = lower
        return self._cholesky

    def factor(self) -> Tensor:
        """U (D, D) float64 lower triangular with v = ‖Uφ‖², rebuilt if stale. Raises as :meth:`cholesky`."""
        if self._factor is None:
            eye = torch.eye(self.num_features, dtype=torch.float64, device=self._gram.device)
            factor = torch.linalg.solve_triangular(self.cholesky(), eye, upper=False)
            self._factor = factor.mul_(math.sqrt(self.ridge)) if self.likelihood == "gaussian" else factor
        return self._factor

    def solve(self, vector: Tensor) -> Tensor:
        """P⁻¹ vector, (D,) → (D,) float64, by two triangular solves."""
        return torch.cholesky_solve(vector.double()[:, None], self.cholesky())[:, 0]

    def log_determinant(self) -> float:
        """Log |P|, for model evidence."""
        return 2 * float(self.cholesky().diagonal().log().sum())

    def to(self, device: torch.device | str) -> Posterior:
        """Move P; the factor is rebuilt there when next needed."""
        self._gram = self._gram.to(device)
        self._cholesky = self._factor = None
        return self

    @classmethod
    def from_gram(cls, gram: Tensor, count: int, *, ridge: float, likelihood: Likelihood) -> Posterior:
        """A posterior from a saved Σ w φφᵀ (its lower triangle is read)."""
        posterior = cls(gram.shape[0], ridge=ridge, likelihood=likelihood, device=gram.device)
        posterior._gram = gram.double().clone()
        posterior.count = count
        return posterior

    def _not_positive_definite(self, minor: int) -> FactorizationError:
        if not bool(self._gram.tril().isfinite().all()):
            return FactorizationError(
                "precision: got NaN or Inf in Σ w φφᵀ, expected finite sums. Check the hidden states"
            )
        eigenvalues = torch.linalg.eigvalsh(self.precision)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        condition = math.inf if low <= 0 else high / low
        enough = max(self.ridge * 10, self.ridge - 2 * low, high * 1e-14)
        return FactorizationError(
            f"precision: got a matrix that is not positive definite (leading minor {minor} of {self.num_features}; "
            f"eigenvalues {low:.3g}..{high:.3g}, condition {condition:.3g}) after {self.count} data, expected positive "
            f"definite. Raise ridge (now {self.ridge:g}; at least {enough:.3g}), "
            "or use fewer features",
            condition=condition,
        )


def all_finite(values: Tensor) -> bool:
    """Whether a sum of all values is finite. If so, all are; if not, nearly always some are not.

    NaN and Inf survive every sum, so it clears all values at a thirtieth of the price of looking at each.
    """
    return math.isfinite(values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32))


def check_finite(hidden: Tensor, name: str = "hidden") -> None:
    """Raise NonFiniteError naming the rows of (N, ...) that hold NaN or Inf."""
    if all_finite(hidden):
        return
    finite = torch.isfinite(hidden if hidden.dim() > 1 else hidden[:, None]).flatten(1).all(dim=1)
    if not bool(finite.all()):
        rows = tuple((~finite).nonzero()[:, 0].tolist())
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise NonFiniteError(
            f"{name}: got NaN or Inf in {len(rows)} of {len(hidden)} rows ({shown}), expected finite", rows
        )
