"""Fast inference kernels and a reward engine for uncertainty-aware reward models.

A pairwise reward model with a spectral-normalised Gaussian-process head gives every pair of responses a preference and
an epistemic uncertainty in one pass; only uncertain pairs go to an LLM judge; what comes back are rewards and RLOO
advantages.

Importing rmcore imports torch and nothing slower: transformers, triton and the HTTP client load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmcore.advantage import grpo_advantages, rloo_advantages
    from rmcore.engine import GroupScores, RewardEngine
    from rmcore.head import FrozenHead, SNGPHead
    from rmcore.judge.base import Judge
    from rmcore.learning import LearningConfig, VerdictLearner
    from rmcore.model import RewardModel
    from rmcore.routing import (
        AdaptiveRouter,
        AlwaysRoute,
        Budget,
        BudgetRouter,
        NeverRoute,
        RandomRouter,
        Router,
        ThresholdRouter,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRouter",
    "AlwaysRoute",
    "Budget",
    "BudgetRouter",
    "FrozenHead",
    "GroupScores",
    "Judge",
    "LearningConfig",
    "NeverRoute",
    "RandomRouter",
    "RewardEngine",
    "RewardModel",
    "Router",
    "SNGPHead",
    "ThresholdRouter",
    "VerdictLearner",
    "__version__",
    "grpo_advantages",
    "rloo_advantages",
]

_HOMES = {
    "rmcore.advantage": ("grpo_advantages", "rloo_advantages"),
    "rmcore.engine": ("GroupScores", "RewardEngine"),
    "rmcore.head": ("FrozenHead", "SNGPHead"),
    "rmcore.judge.base": ("Judge",),
    "rmcore.learning": ("LearningConfig", "VerdictLearner"),
    "rmcore.model": ("RewardModel",),
    "rmcore.routing": (
        "AdaptiveRouter",
        "AlwaysRoute",
        "Budget",
        "BudgetRouter",
        "NeverRoute",
        "RandomRouter",
        "Router",
        "ThresholdRouter",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rmcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
