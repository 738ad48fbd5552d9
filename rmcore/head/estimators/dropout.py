"""MC dropout over cached states (Gal & Ghahramani 2016): T masks before the last layer of a reward network.

The layers below are computed once for each row; under T masks a reward is (φ ∘ mask_t)ᵀw, so that all T are one product
of (R, width) with (width, T). A mask is a draw of the *network*: it is the same for all rows, as for a pair's two, and
drawn once by seed, so that equal rows get equal scores. What dropout inside a backbone would add is not in these
states, and costs T passes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.estimators.protocol import PairEstimate, VarianceKind, check_training, check_width, refuse_update
from rmcore.head.estimators.samples import RewardNetworks, Training, sample_deviations, sampled_estimate, train_networks

__all__ = ["Dropout"]


class Dropout:
    """MC dropout of one network.

    Args:
        networks: one network, trained with dropout.
        rate: share of the last layer's inputs that a mask sets to 0, in (0, 1).
        masks: T ≥ 2.
        seed: of the masks.
    """

    name: ClassVar[str] = "dropout"
    kind: ClassVar[VarianceKind] = "epistemic"

    def __init__(self, networks: RewardNetworks, *, rate: float = 0.1, masks: int = 64, seed: int = 0) -> None:
        if len(networks.weights[0]) != 1:
            reject("networks", len(networks.weights[0]), "one network")
        if not 0 < rate < 1:
            reject("rate", rate, "a share strictly between 0 and 1")
        if masks < 2:
            reject("masks", masks, "at least 2: one has no variance")
        self.networks, self.rate, self.seed = networks, rate, seed
        width = networks.weights[-1].shape[-1]
        keep = torch.rand(masks, width, generator=torch.Generator().manual_seed(seed)) >= rate
        self.masks = keep / (1 - rate)
        """(T, width), kept inputs divided by the share that is kept."""

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        rate: float = 0.1,
        masks: int = 64,
        layers: tuple[int, ...] = (128, 128),
        epochs: int = 5,
        seed: int = 0,
    ) -> Dropout:
        """Train the network with dropout; data as of :meth:`rmcore.head.estimators.laplace.Laplace.fit`.

        Args:
            hidden: (R, h) rows.
            labels: (N,) in [0, 1].
            pairs: (N, 2) int64.
            rate: in training and in serving.
            masks: T.
            layers: widths of the ReLU layers; () puts dropout on the rows themselves, before a linear reward.
            epochs: passes over the pairs.
            seed: of weights, mini-batches and masks.
        """
        check_training(hidden, labels, pairs)
        how = Training(layers=tuple(layers), epochs=epochs, anchor=0.0, dropout=rate, seed=seed)
        return cls(train_networks(hidden, labels, pairs, 1, how), rate=rate, masks=masks, seed=seed)

    @torch.no_grad()
    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`."""
        return sampled_estimate(self._rewards(hidden), group_sizes)

    @torch.no_grad()
    def deviations(self, hidden: Tensor) -> Tensor:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.deviations`: d = T."""
        return sample_deviations(self._rewards(hidden))

    def _rewards(self, hidden: Tensor) -> Tensor:
        check_width(hidden, self.networks.width)
        features = self.networks.features(self.networks.standardised(hidden))[0]
        return features @ (self.masks * self.networks.weights[-1][0]).T

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Refused: a network's weights have no posterior that single verdicts could be added to."""
        refuse_update(self.name)

    def write(self, folder: Path) -> dict[str, Any]:
        """The network's tensors and which inputs each mask keeps."""
        kept = (self.masks > 0).to(torch.uint8)
        return {"rate": self.rate, "seed": self.seed, **self.networks.write(folder, masks=kept)}

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> Dropout:
        """The inverse of :meth:`write`."""
        networks, beside = RewardNetworks.read(folder, values, "masks")
        rate, kept = float(values["rate"]), beside["masks"].float()
        found = cls(networks, rate=rate, masks=len(kept), seed=int(values["seed"]))
        found.masks = kept / (1 - rate)
        return found
