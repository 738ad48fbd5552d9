"""SNGP and URM in one: what the fit does not know from one, what is in the answers themselves from the other.

g and its epistemic variance are the SNGP head's, v_e = ‖UΔφ‖² in logits; the answers' own spread is that of an
attribute head (arXiv:2410.00847), n_i = Σ_k w_k² σ_k², in the units of its reward. The two meet by one number, the
factor c by which the attribute head's reward becomes a logit, the most likely one on the training pairs:

    max over c of Σ log σ(±c d / √(1 + π/8 · c² n)),     d = r_i − r_j,  n = n_i + n_j

so that the variance of a pair is v_e + c² n (law of total variance, both parts told apart), and routers, best-of-n and
filters go by either or by the sum (``variance=``). Verdicts teach the SNGP head; the spread stays as it is.
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

_RANGE = 7.0  # of log c


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
        return cls(sngp, urm, _common_unit(urm, hidden, labels, pairs))

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


def _common_unit(urm: URM, hidden: Tensor, labels: Tensor, pairs: Tensor) -> float:
    """The most likely c on labelled pairs; for an attribute head that orders none of them it goes to nothing."""
    from scipy.optimize import minimize_scalar

    said = urm.attributes(hidden)
    assert said.score_variance is not None
    first, second = pairs.unbind(1)
    d, n = said.score[first] - said.score[second], said.score_variance[first] + said.score_variance[second]
    y = labels.double()

    def lost(log_scale: float) -> float:
        c = math.exp(log_scale)
        logit = c * d / reference.uncertainty(c * c * n, reference.mean_field_amplitude())
        return -float(reference.log_likelihood(logit, y).sum())

    return math.exp(float(minimize_scalar(lost, bounds=(-_RANGE, _RANGE), method="bounded").x))
