"""Deep ensembles of MLP heads on cached states (Lakshminarayanan et al. 2017), anchored (Pearce et al. 2020).

RewardUQ's configuration (arXiv:2602.24040) by default: 20 heads of two ReLU layers of 128, anchors of strength 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.estimators.protocol import PairEstimate, VarianceKind, check_training, check_width, refuse_update
from rmcore.head.estimators.samples import RewardNetworks, Training, sample_deviations, sampled_estimate, train_networks

__all__ = ["Ensemble"]


class Ensemble:
    """M networks that differ in their initial weights, mini-batches and anchors.

    Args:
        networks: at least two.
    """

    name: ClassVar[str] = "ensemble"
    kind: ClassVar[VarianceKind] = "epistemic"

    def __init__(self, networks: RewardNetworks) -> None:
        if len(networks.weights[0]) < 2:
            reject("networks", len(networks.weights[0]), "at least 2: one has no variance")
        self.networks = networks

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        members: int = 20,
        layers: tuple[int, ...] = (128, 128),
        anchor: float = 0.1,
        epochs: int = 5,
        seed: int = 0,
    ) -> Ensemble:
        """Train all members at once; data as of :meth:`rmcore.head.estimators.laplace.Laplace.fit`.

        Args:
            hidden: (R, h) rows.
            labels: (N,) in [0, 1].
            pairs: (N, 2) int64.
            members: M ≥ 2.
            layers: widths of the ReLU layers.
            anchor: λ of :class:`~rmcore.head.estimators.samples.Training`.
            epochs: passes over the pairs.
            seed: of everything drawn.
        """
        if members < 2:
            reject("members", members, "at least 2: one has no variance")
        check_training(hidden, labels, pairs)
        how = Training(layers=tuple(layers), epochs=epochs, anchor=anchor, seed=seed)
        return cls(train_networks(hidden, labels, pairs, members, how))

    @torch.no_grad()
    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`."""
        check_width(hidden, self.networks.width)
        return sampled_estimate(self.networks.rewards(hidden), group_sizes)

    @torch.no_grad()
    def deviations(self, hidden: Tensor) -> Tensor:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.deviations`: d = M."""
        check_width(hidden, self.networks.width)
        return sample_deviations(self.networks.rewards(hidden))

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Refused: as of dropout."""
        refuse_update(self.name)

    def write(self, folder: Path) -> dict[str, Any]:
        """The networks' tensors in float32."""
        return self.networks.write(folder)

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> Ensemble:
        """The inverse of :meth:`write`."""
        return cls(RewardNetworks.read(folder, values)[0])
