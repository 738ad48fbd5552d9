"""SNGP and URM in one: what the fit does not know from one, what is in the answers themselves from the other.

g and its epistemic variance are the SNGP head's, v_e = ‖UΔφ‖² in logits; the answers' own spread is that of an
attribute head (arXiv:2410.00847), n_i = Σ_k w_k² σ_k², in the units of its reward. The two meet by one number, the
factor c that gives the reward's differences the size of the head's logits on the training pairs, √(Σ g² / Σ d²) with
d = r_i − r_j. (The most likely c would be no measure: a reward that orders all training pairs wants an infinite one.)
With n = n_i + n_j the variance of a pair is v_e + c² n (law of total variance, both parts told apart), and routers,
best-of-n and filters go by either or by the sum (``variance=``). Verdicts teach the SNGP head; the spread stays as it
is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.config import HeadConfig
from rmcore.head.estimators.attributes import URM, AttributeLabels
from rmcore.head.estimators.protocol import PairEstimate, VarianceKind, check_width, row_sums
from rmcore.head.estimators.sngp import SNGP
from rmcore.ops import reference

__all__ = ["SNGPWithURM"]


class SNGPWithURM:
    """An SNGP head's logit and epistemic variance, an attribute head's aleatoric one.

    Args:
        sngp: the one.
        urm: the other, over the same rows.
        scale: c > 0, logits a unit of the attribute head's reward.
    """

    name: ClassVar[str] = "sngp-urm"
    kind: ClassVar[VarianceKind] = "total"

    def __init__(self, sngp: SNGP, urm: URM, scale: float = 1.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            reject("scale", scale, "a positive finite number")
        if urm.width != sngp.head.config.hidden_size:
            reject("urm", f"width {urm.width}", f"{sngp.head.config.hidden_size}, the head's")
        self.sngp, self.urm, self.scale = sngp, urm, scale

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        config: HeadConfig | None = None,
        dtype: torch.dtype | None = None,
        attributes: AttributeLabels | None = None,
        **training: Any,
    ) -> SNGPWithURM:
        """Fit both and their common unit.

        Args:
            hidden: (R, h) rows.
            labels: (N,) in [0, 1].
            pairs: (N, 2) int64.
            config: of the SNGP head, as :meth:`SNGP.fit` takes it.
            dtype: in which that serves.
            attributes: what the attribute head learns from; None for the pairs alone, as :meth:`URM.fit`.
            **training: of the attribute head, as there.

        Raises InputError and NonFiniteError as those.
        """
        sngp = SNGP.fit(hidden, labels, pairs, config=config, dtype=dtype)
        urm = URM.fit(hidden, labels, pairs, attributes=attributes, **training)
        return cls(sngp, urm, _common_unit(sngp, urm, hidden, pairs))

    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`."""
        found = self.sngp.pairs(hidden, group_sizes)
        # In logits: a head's own amplitude says how much of its v its preference is divided by.
        unit = self.sngp.head.config.resolved_amplitude / reference.mean_field_amplitude()
        epistemic = found.variance * unit
        noise = self.urm.attributes(hidden).score_variance
        assert noise is not None
        aleatoric = self.scale**2 * row_sums(noise, group_sizes)
        variance = epistemic + aleatoric
        u = reference.uncertainty(variance, reference.mean_field_amplitude())
        preference = reference.preference(found.logit, u)
        return PairEstimate(found.logit, variance, preference, epistemic=epistemic, aleatoric=aleatoric)

    def deviations(self, hidden: Tensor) -> Tensor:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.deviations`: the epistemic part's."""
        check_width(hidden, self.urm.width)
        unit = self.sngp.head.config.resolved_amplitude / reference.mean_field_amplitude()
        return self.sngp.deviations(hidden) * math.sqrt(unit)

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Teach the SNGP head; the attribute head has no posterior and stays."""
        self.sngp.update(hidden, labels, pairs)

    def write(self, folder: Path) -> dict[str, Any]:
        """Both, each in the file that it has by itself."""
        return {"scale": self.scale, "sngp": self.sngp.write(folder), "urm": self.urm.write(folder)}

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> SNGPWithURM:
        """The inverse of :meth:`write`."""
        return cls(SNGP.read(folder, values["sngp"]), URM.read(folder, values["urm"]), float(values["scale"]))


def _common_unit(sngp: SNGP, urm: URM, hidden: Tensor, pairs: Tensor) -> float:
    """c of training pairs; 1 where one of the two tells them nothing."""
    first, second = pairs.unbind(1)
    reward = urm.rewards(hidden)
    rows = hidden[pairs.flatten()]
    g = sngp.pairs(rows, torch.full((len(pairs),), 2, dtype=torch.int64)).logit
    size, own = float(g.double().square().sum()), float((reward[first] - reward[second]).square().sum())
    return math.sqrt(size / own) if size > 0 and own > 0 else 1.0
