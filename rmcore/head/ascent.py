"""Newton's method as the library climbs a log posterior, and one step of learning for a few small beliefs at once.

:func:`ascend` is the climb: of a head's β over a data set (:func:`rmcore.head.fit.newton`), and here of M beliefs of
D ≤ 20 or so weights about the same few data, where a pass is some matrix products of numpy and takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Climb", "Curvature", "ascend", "learn"]

Floats = npt.NDArray[np.float64]
Vector = TypeVar("Vector", Tensor, Floats)


class Curvature(Protocol):
    """What a climb asks of P, the negative Hessian."""

    def solve(self, vector: Any) -> Any:
        """P⁻¹ vector."""


Seen = TypeVar("Seen", bound=Curvature)


@dataclass(frozen=True, slots=True)
class Climb(Generic[Vector, Seen]):
    """Where a climb ended: the place, P there, and what it took (:class:`rmcore.head.fit.FitReport`)."""

    at: Vector
    curvature: Seen
    converged: bool
    passes: int
    values: tuple[float, ...]
    decrements: tuple[float, ...]


def ascend(
    evaluate: Callable[[Vector], tuple[Seen, Vector, float]],
    start: Vector,
    count: int,
    *,
    max_passes: int = 30,
    tolerance: float = 1e-8,
    progress: Callable[[str], None] | None = None,
) -> Climb[Vector, Seen]:
    """Damped Newton: x ← x + t P⁻¹ g, t halved while the value falls.

    Args:
        evaluate: at a vector: P, the gradient g and the value of a concave function, in one pass over the data.
        start: (D,) where to begin.
        count: of data; what is left to gain is measured against it.
        max_passes: evaluations at most.
        tolerance: converged when half of gᵀP⁻¹g, the nats still to gain, is below this times ``count``.
        progress: called with a line of text after each step.
    """
    at = start
    curvature, slope, value = evaluate(at)
    values, decrements, passes, converged = [value], [], 1, False
    while passes < max_passes:
        step = curvature.solve(slope)
        decrement = float(slope @ step)
        decrements.append(decrement)
        if decrement / 2 <= tolerance * max(count, 1):
            converged = True
            break
        scale, accepted = 1.0, False
        while passes < max_passes and scale > 1e-6:
            candidate = at + scale * step
            trial = evaluate(candidate)
            passes += 1
            if trial[2] >= value:
                (curvature, slope, value), at, accepted = trial, candidate, True
                break
            scale /= 2
        if not accepted:
            # No step improves any more: the remaining decrement is below what the features' arithmetic resolves.
            converged = decrement / 2 <= 1e-5 * count
            break
        values.append(value)
        if progress is not None:
            progress(f"pass {passes}: log posterior {value:.4f}, to gain about {decrement / 2:.2e}")
    return Climb(at, curvature, converged, passes, tuple(values), tuple(decrements))


# -- small beliefs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Blocks:
    """M precisions, side by side."""

    precision: Floats
    """(M, D, D)"""

    def solve(self, vector: Floats) -> Floats:
        """(M·D,) → (M·D,)."""
        beliefs, width = self.precision.shape[:2]
        solved = np.linalg.solve(self.precision, vector.reshape(beliefs, width, 1))
        return np.asarray(solved.reshape(-1), dtype=np.float64)


def learn(
    mean: Floats, precision: Floats, inputs: Floats, labels: Floats, weight: Floats, *, tolerance: float = 1e-8
) -> tuple[Floats, Floats]:
    """What M beliefs N(mean, precision⁻¹) about logistic weights become by the same data: one step of online Laplace.

    As :func:`rmcore.head.fit.newton` with a prior, for features taken as they are, in float64 throughout. The beliefs
    climb together: their steps are their own, and halved together, which a concave sum allows.

    Args:
        mean: (M, D).
        precision: (M, D, D), symmetric, positive definite.
        inputs: (N, D) features, finite.
        labels: (N,) in [0, 1].
        weight: (N,) ≥ 0, how much each datum counts.
        tolerance: as in :func:`ascend`; of the M·N data in all.

    Returns:
        The means and precisions after it, new arrays.
    """
    beliefs, width = mean.shape
    target = (2 * labels - 1)[:, None]

    def evaluate(flat: Floats) -> tuple[_Blocks, Floats, float]:
        at = flat.reshape(beliefs, width)
        logit = inputs @ at.T  # (N, M)
        tail = np.exp(-np.abs(logit))
        probability = np.where(logit >= 0, 1.0, tail) / (1 + tail)
        # y log σ(g) + (1−y) log σ(−g) = (2y − 1) g/2 − |g|/2 − log(1 + e^−|g|), which never overflows
        likelihood = 0.5 * (target * logit - np.abs(logit)) - np.log1p(tail)
        bend = weight[:, None] * probability * (1 - probability)
        after = precision + (bend.T[:, None, :] * inputs.T) @ inputs
        moved = at - mean
        pull = (precision @ moved[:, :, None])[:, :, 0]
        slope = (weight[:, None] * (labels[:, None] - probability)).T @ inputs - pull
        value = float((weight @ likelihood).sum()) - 0.5 * float((moved * pull).sum())
        return _Blocks(after), slope.reshape(-1), value

    climb = ascend(evaluate, mean.reshape(-1), beliefs * len(labels), tolerance=tolerance)
    after = climb.curvature.precision
    return climb.at.reshape(beliefs, width), (after + after.transpose(0, 2, 1)) / 2  # sums differ in the last bit
