"""A head held against soft labels: each says how probable it is that the first response is better."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from rmcore._base.errors import reject
from rmcore.evaluation.report import as_vector
from rmcore.evaluation.statistics import log_loss

__all__ = ["SoftFit", "soft_fit"]


@dataclass(frozen=True)
class SoftFit:
    """How well a head's probabilities p meet soft labels y; nats a pair.

    Attributes:
        pairs: how many there are, hard labels and ties included.
        soft: how many labels are neither 0 nor 1.
        cross_entropy: mean of −[y log p + (1 − y) log(1 − p)]; with hard labels alone it is the log loss.
        entropy: of the labels: the least that the cross-entropy could be.
        divergence: the rest, the mean KL(y‖p): 0 for a head that says what the labels say.
        distance: mean |p − y|.
    """

    pairs: int
    soft: int
    cross_entropy: float
    entropy: float
    divergence: float
    distance: float

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A paragraph."""
        return (
            f"Soft labels: {self.soft} of {self.pairs}. Cross-entropy {self.cross_entropy:.4f} nats, of which the "
            f"labels' own entropy is {self.entropy:.4f} and the head's divergence from them {self.divergence:.4f}; "
            f"mean |p − y| {self.distance:.3f}.\n"
        )


def soft_fit(logit: npt.ArrayLike, label: npt.ArrayLike) -> SoftFit:
    """Compare served logits, log p/(1 − p), with labels in [0, 1].

    Raises InputError for other values, other lengths or no pairs.
    """
    served = as_vector("logit", logit)
    y = as_vector("label", label, length=served.size, low=0, high=1)
    loss = log_loss(served, y)
    entropy = float((special.entr(y) + special.entr(1 - y)).mean())
    if not math.isfinite(loss):
        reject("logit", "values beyond what a float holds", "finite logits")
    return SoftFit(
        pairs=y.size,
        soft=int(((y > 0) & (y < 1)).sum()),
        cross_entropy=loss,
        entropy=entropy,
        divergence=max(loss - entropy, 0.0),  # rounding alone can make it negative (Gibbs' inequality)
        distance=float(np.abs(special.expit(served) - y).mean()),
    )
