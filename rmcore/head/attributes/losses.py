"""What attribute heads are trained by, each a mean over rows; N rows, A attributes, Q quantiles, NaN = not labelled.

Sources: URM (arXiv:2410.00847) Eq. 4 and 5; QRM (arXiv:2409.10164); PURM (arXiv:2503.22480).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rmcore._base.errors import reject

__all__ = [
    "bradley_terry",
    "gaussian_nll",
    "gaussian_nll_entries",
    "pinball",
    "purm_logit",
    "quantile_levels",
    "sampled_mse",
]


def gaussian_nll(mean: Tensor, log_std: Tensor, labels: Tensor) -> Tensor:
    """−Σ_k log N(s_k; μ_k, σ_k), the labelled attributes' sum (URM Eq. 4, with its constant).

    Args:
        mean: (N, A).
        log_std: (N, A) log σ.
        labels: (N, A).

    Raises InputError for other shapes.
    """
    return _mean_of_rows(gaussian_nll_entries(mean, log_std, labels), ~labels.isnan())


def gaussian_nll_entries(mean: Tensor, log_std: Tensor, labels: Tensor) -> Tensor:
    """(N, A) of what :func:`gaussian_nll` adds up, 0 where nobody labelled."""
    target, known = _labelled(mean, log_std, labels)
    standard = (target - mean) * (-log_std).exp()
    entries = 0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)
    return torch.where(known, entries, torch.zeros_like(entries))


def sampled_mse(mean: Tensor, log_std: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Σ_k (μ_k + ε_k σ_k − s_k)², the reparametrised regression (URM Eq. 5).

    Over ε its expectation is Σ_k (μ_k − s_k)² + σ_k², so σ goes to nothing: it teaches means alone.

    Args:
        mean: (N, A).
        log_std: (N, A) log σ.
        labels: (N, A).
        noise: (N, A) ε ~ N(0, 1).

    Raises InputError for other shapes.
    """
    target, known = _labelled(mean, log_std, labels)
    if noise.shape != mean.shape:
        reject("noise", f"shape {tuple(noise.shape)}", f"{tuple(mean.shape)}, that of mean")
    return _mean_of_rows((mean + noise * log_std.exp() - target).square(), known)


def quantile_levels(count: int) -> Tensor:
    """(Q,) QRM's levels τ: ``count`` of them, equally far apart inside (0, 1), float64."""
    if count < 1:
        reject("count", count, "at least 1")
    return torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1]


def pinball(quantiles: Tensor, labels: Tensor) -> Tensor:
    """Σ_k mean_q max(τ_q e, (τ_q − 1) e) for e = s_k − quantile_kq, at :func:`quantile_levels`.

    Args:
        quantiles: (N, A, Q).
        labels: (N, A).

    Raises InputError for other shapes.
    """
    if quantiles.dim() != 3:
        reject("quantiles", f"shape {tuple(quantiles.shape)}", "(N, A, Q)")
    target, known = _labelled(quantiles[..., 0], quantiles[..., 0], labels)
    levels = quantile_levels(quantiles.shape[2]).to(quantiles)
    error = target[..., None] - quantiles
    return _mean_of_rows(torch.maximum(levels * error, (levels - 1) * error).mean(-1), known)


def bradley_terry(logit: Tensor, weight: Tensor | None = None) -> Tensor:
    """−log σ(logit), the mean over pairs (N,) or their mean by ``weight`` (N,)."""
    loss = functional.softplus(-logit)
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum()


def purm_logit(difference: Tensor, variance: Tensor) -> Tensor:
    """The logit of P(chosen > rejected) = E σ(z), z ~ N(difference, variance), by MacKay's probit approximation.

    difference / √(1 + π variance / 8), in the place of PURM's 1,000 draws; the probability is within 0.02 of the
    integral.

    Args:
        difference: (N,) μ_c − μ_r.
        variance: (N,) σ_c² + σ_r².
    """
    return difference / (1 + math.pi / 8 * variance).sqrt()


def _labelled(mean: Tensor, log_std: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(labels with 0 for NaN, which are known): a NaN must not get into a gradient, where 0 · NaN is NaN."""
    if not (mean.dim() == 2 and mean.shape == log_std.shape == labels.shape):
        got = f"shapes {tuple(mean.shape)}, {tuple(log_std.shape)}, {tuple(labels.shape)}"
        reject("mean, log_std, labels", got, "one shape (N, A)")
    known = ~labels.isnan()
    return labels.to(mean.dtype).masked_fill(~known, 0.0), known


def _mean_of_rows(loss: Tensor, known: Tensor) -> Tensor:
    """The sum of labelled entries over the number of rows that have one; 0 with a graph where there is none."""
    rows = known.any(1).sum().clamp(min=1)
    return torch.where(known, loss, torch.zeros_like(loss)).sum() / rows
