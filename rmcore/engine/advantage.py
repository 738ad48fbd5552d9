"""Advantages and trainer rewards from a group's preferences (design 2.8)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.ops import reference

__all__ = [
    "Baseline",
    "check_tau",
    "group_rewards",
    "grpo_advantages",
    "reliability_weights",
    "reliable_advantages",
    "rloo_advantages",
    "rloo_variance",
]


Baseline: TypeAlias = Literal["leave-one-out", "group-mean"]


def _check_square(preferences: Tensor) -> None:
    if preferences.dim() < 2 or preferences.shape[-1] != preferences.shape[-2] or preferences.shape[-1] == 0:
        reject("preferences", f"shape {tuple(preferences.shape)}", "(..., K, K) with K ≥ 1")


def rloo_advantages(preferences: Tensor, *, complete: bool = False) -> Tensor:
    """A_i = mean over j ≠ i of p̃_ij: RLOO over pairwise preferences (NeurIPS 2025, arXiv:2402.14740).

    Args:
        preferences: (..., K, K) antisymmetric p̃, logits. A NaN pair has no preference (a row that could not be scored
            and was not judged) and is left out of both its members' means; the diagonal is not read.
        complete: the caller knows that every pair has a preference and that 0 stands on the diagonal: the same numbers
            for less work.

    Returns:
        (..., K). K = 1 gives 0; a member with no usable pair in a group of K > 1 gives NaN.
    """
    _check_square(preferences)
    if preferences.shape[-1] == 1:
        return torch.zeros_like(preferences[..., 0])
    total, count = _sums(preferences, complete)
    return total / count


def group_rewards(
    preferences: Tensor,
    baseline: Baseline = "leave-one-out",
    *,
    complete: bool = False,
) -> Tensor:
    """Rewards from which a stock trainer gets :func:`rloo_advantages` back, to rounding.

    With S_i = Σ_j p̃_ij over the m members that have preferences (ΣS = 0): S_i/m for a leave-one-out baseline (TRL's
    RLOOTrainer), S_i/(m−1) for a group mean without std scaling (GRPOTrainer with scale_rewards="none"). Members
    without a usable pair get NaN, which trainers are told as None. The identity is exact when every pair between the m
    members has a preference. (..., K, K) → (..., K). ``complete`` as in :func:`rloo_advantages`. Raises InputError for
    what is no square, and for another baseline.
    """
    _check_square(preferences)
    if baseline not in ("leave-one-out", "group-mean"):
        reject("baseline", repr(baseline), "'leave-one-out' or 'group-mean'")
    if preferences.shape[-1] == 1:
        return torch.zeros_like(preferences[..., 0])
    total, count = _sums(preferences, complete)
    if complete:
        return total / (count + 1 if baseline == "leave-one-out" else count)
    members = (count > 0).sum(-1, keepdim=True).to(total.dtype)
    total = torch.where(count > 0, total, torch.nan)
    return total / (members if baseline == "leave-one-out" else (members - 1).clamp_min(1))


def rloo_variance(variance: Tensor, weight: Tensor) -> Tensor:
    """Variance of :func:`rloo_advantages` of p̃_ij = w_ij·g_ij, exactly, where pairs share a group's rows.

    A_i = 1/m_i Σ_j w_ij (s_i − s_j) is linear in the rows' scores s, so its variance is aᵀΣa with Σ their covariance,
    which the v_ij determine (:func:`rmcore.ops.reference.difference_variance`): O(K³) a group.

    Args:
        variance: (..., K, K) v, symmetric; NaN is not read where no pair with a weight needs it.
        weight: (..., K, K) symmetric: 1/u where the head's p̃ = g/u stands, 0 where a judge decided (its verdict is a
            number like another, with no variance from here), NaN where a pair has no preference and is left out.

    Returns:
        (..., K). K = 1 gives 0; a member with no usable pair in a group of K > 1 gives NaN.

    Raises:
        InputError: shapes do not fit.
    """
    _check_square(weight)
    if variance.shape != weight.shape:
        reject("variance", f"shape {tuple(variance.shape)}", f"{tuple(weight.shape)}, as of weight")
    if weight.shape[-1] == 1:
        return torch.zeros_like(weight[..., 0])
    eye = torch.eye(weight.shape[-1], dtype=torch.bool, device=weight.device)
    usable = ~(weight.isnan() | eye)
    each = weight.masked_fill(~usable, 0.0)
    count = usable.sum(-1).to(weight.dtype)
    coefficients = (torch.diag_embed(each.sum(-1)) - each) / count.clamp_min(1)[..., None]
    found = reference.difference_variance(variance.masked_fill(variance.isnan() | eye, 0.0), coefficients)
    return found.masked_fill(count == 0, torch.nan)


def reliability_weights(variance: Tensor, tau: float) -> Tensor:
    """1 / (1 + variance/τ), in (0, 1]: how much a response's advantage counts for a trainer; any shape, NaN stays.

    τ is the variance at which it counts half. Raises InputError unless τ is positive and finite.
    """
    check_tau(tau)
    return 1 / (1 + variance / tau)


def check_tau(tau: float, name: str = "tau") -> None:
    """Raise InputError, by ``name``, for a τ that :func:`reliability_weights` would refuse."""
    expected = "a positive finite number: the variance at which an advantage counts half"
    check_number(name, tau, Within(above=0), expected)


def reliable_advantages(advantages: Tensor, variance: Tensor, tau: float, *, centred: bool = False) -> Tensor:
    """w_i·A_i with the weights of :func:`reliability_weights` (UARM, arXiv:2606.19818).

    Unlike the A_i they do not sum to 0 over a group. A trainer that subtracts a baseline takes their mean away, so of
    them it can be given no more than w_i·A_i − mean w·A, which ``centred`` is.

    Args:
        advantages: (..., K); NaN for a member without a preference, which is left out.
        variance: (..., K) of them.
        tau: τ.
        centred: less the group's mean.

    Raises:
        InputError: shapes or τ do not fit.
    """
    if variance.shape != advantages.shape:
        reject("variance", f"shape {tuple(variance.shape)}", f"{tuple(advantages.shape)}, as of advantages")
    weighted = advantages * reliability_weights(variance, tau)
    return weighted - weighted.nanmean(-1, keepdim=True) if centred else weighted


def _sums(preferences: Tensor, complete: bool) -> tuple[Tensor, Tensor]:
    """(..., K) Σ_j p̃_ij, and over how many j; () where that is all others."""
    if complete:
        total = preferences.sum(-1)
        # A tensor, because a GPU divides by a number by multiplying with its rounded reciprocal.
        return total, total.new_full((), preferences.shape[-1] - 1)
    eye = torch.eye(preferences.shape[-1], dtype=torch.bool, device=preferences.device)
    usable = ~(preferences.isnan() | eye)
    return preferences.masked_fill(~usable, 0.0).sum(-1), usable.sum(-1).to(preferences.dtype)


def grpo_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i − mean) / (std + eps) over the last dimension (arXiv:2402.03300), std unbiased as in TRL.

    ``scale_by_std=False`` leaves the division out (Dr. GRPO, arXiv:2503.20783). (..., K) → (..., K); K = 1 gives 0.
    Raises InputError without a last dimension, or where it is empty.
    """
    if rewards.dim() < 1 or rewards.shape[-1] == 0:
        reject("rewards", f"shape {tuple(rewards.shape)}", "(..., K) with K ≥ 1")
    return reference.grpo_advantages(rewards, scale_by_std=scale_by_std, eps=eps)
