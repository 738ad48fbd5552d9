"""The library's own estimator: the SNGP head (random Fourier features and their exact posterior)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head import checkpoint
from rmcore.head.config import HeadConfig
from rmcore.head.estimators.protocol import PairEstimate, VarianceKind, check_training, check_width
from rmcore.head.fit import fit
from rmcore.head.frozen import FrozenHead
from rmcore.head.sngp import SNGPHead

__all__ = ["SNGP"]


class SNGP:
    """A frozen head in difference mode as an estimator.

    Args:
        head: the head; its kernels score.
    """

    name: ClassVar[str] = "sngp"
    kind: ClassVar[VarianceKind] = "epistemic"

    def __init__(self, head: FrozenHead) -> None:
        if head.config.mode != "difference":
            reject("head", f"mode {head.config.mode!r}", "a difference-mode head")
        self.head = head

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        config: HeadConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> SNGP:
        """Fit a head (:func:`rmcore.head.fit.fit`); ``config`` defaults to ``HeadConfig(h)``."""
        check_training(hidden, labels, pairs)
        head = SNGPHead(config or HeadConfig(hidden.shape[1]))
        return cls(fit(head, hidden, labels, pairs=pairs, dtype=dtype)[0])

    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`."""
        scores = self.head.score_pairs(hidden, group_sizes, dtype=torch.float64)
        return PairEstimate(scores.logit, scores.variance, scores.preference, epistemic=scores.variance)

    def deviations(self, hidden: Tensor) -> Tensor:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.deviations`: Uφ, of a head that has its posterior."""
        head = self.head
        if head.posterior is None:
            reject("head.posterior", "none", "a head fitted here or saved with include_posterior=True")
        check_width(hidden, head.config.hidden_size)
        phi = head.feature_map(hidden.to(head.device)).double() * head.feature_map.feature_scale
        return (phi @ head.posterior.factor().mT).cpu()

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Add pairs to the posterior at the present β (:meth:`FrozenHead.update`)."""
        check_training(hidden, labels, pairs)
        self.head.update(hidden, labels, pairs=pairs)

    def write(self, folder: Path) -> dict[str, Any]:
        """As a head is stored in a model's folder."""
        return {"head": checkpoint.write_head(self.head, folder)}

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> SNGP:
        """The inverse of :meth:`write`."""
        return cls(checkpoint.read_head(folder, values.get("head"), "cpu"))
