"""verl's advantage estimator ``rmcore``: a sample's score is its advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError

__all__ = ["ADVANTAGE_ESTIMATOR", "passthrough_advantages", "register"]

ADVANTAGE_ESTIMATOR = "rmcore"
"""The name of the pass-through estimator in ``algorithm.adv_estimator``."""


def passthrough_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, config: object = None, index: object = None, **_: object
) -> tuple[Tensor, Tensor]:
    """verl's advantage estimator ``rmcore``: a sample's score is its advantage, at every token of the response.

    Args:
        token_level_rewards: (B, T), each sample's A_i at its last token and 0 elsewhere.
        response_mask: (B, T), 1 for the policy's own tokens.
        config: not used, like ``index`` and all else that verl gives every estimator.
        index: not used.

    Returns:
        advantages and returns, (B, T) both, the same.

    Raises:
        NonFiniteError: a sample's score is NaN or infinite; its row is in ``rows``.
    """
    with torch.no_grad():
        score = token_level_rewards.sum(-1, keepdim=True)
        wrong = tuple((~score.isfinite()).nonzero()[:, 0].tolist())
        if wrong:
            raise NonFiniteError(f"token_level_rewards: got NaN or Inf in rows {wrong[:8]}, expected numbers", wrong)
        advantages = score * response_mask
    return advantages, advantages


def register() -> None:
    """Make the estimator known to verl. Importing this module does it where verl is loaded already.

    Raises:
        ImportError: verl is not installed.
    """
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est(ADVANTAGE_ESTIMATOR)(passthrough_advantages)
