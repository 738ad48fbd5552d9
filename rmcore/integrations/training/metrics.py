"""What an evaluation says of a head: accuracy, log-loss, calibration and, with a posterior, what u is worth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from torch import Tensor

from rmcore.evaluation.statistics import accuracy, auroc, correctness, expected_calibration_error, log_loss

__all__ = ["pair_metrics"]


def pair_metrics(
    logit: Tensor, labels: Tensor, preference: Tensor | None = None, uncertainty: Tensor | None = None
) -> dict[str, float]:
    """Metrics of pairs' logits g (N,) and labels (N,) in [0, 1].

    Accuracy and ECE are about the response that is likelier better: pairs with label 0.5 are in the log-loss alone, and
    NaN is what there is none of. With p = g / u (N,) and u (N,) also ``log_loss_u`` and ``ece_u``, of p, and
    ``auroc_u``: how well u finds the pairs that the head orders wrongly, 0.5 by chance, NaN where all or none is.
    """
    g, y = _vector(logit), _vector(labels)
    told = y != 0.5
    better = (y[told] > 0.5).astype(np.float64)
    found = {"accuracy": float("nan"), "ece": float("nan"), "log_loss": log_loss(g, y)}
    if told.any():
        found |= {"accuracy": accuracy(g[told], better), "ece": expected_calibration_error(expit(g[told]), better)}
    if preference is None or uncertainty is None:
        return found
    p, u = _vector(preference), _vector(uncertainty)
    found |= {"log_loss_u": log_loss(p, y), "ece_u": float("nan"), "auroc_u": float("nan")}
    if told.any():
        wrong = correctness(g[told], better) < 0.5
        found |= {"ece_u": expected_calibration_error(expit(p[told]), better), "auroc_u": auroc(u[told], wrong)}
    return found


def _vector(values: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(values.detach().double().cpu().numpy(), dtype=np.float64)
