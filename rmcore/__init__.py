"""Fast inference kernels and a reward engine for uncertainty-aware reward models.

A pairwise reward model with a spectral-normalised Gaussian-process head gives every pair of responses a preference and
an epistemic uncertainty in one pass; only uncertain pairs go to an LLM judge; what comes back are rewards and RLOO
advantages.

Importing rmcore imports torch and nothing slower: transformers, triton and the HTTP client load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import launcher as _launcher  # noqa: F401 - which parent started this process, before it may go
from rmcore._base import lazy, moved
from rmcore._base.version import __version__

if TYPE_CHECKING:
    from rmcore import errors, ops
    from rmcore.engine.advantage import grpo_advantages, rloo_advantages
    from rmcore.engine.engine import RewardEngine
    from rmcore.engine.groups import GroupScores
    from rmcore.engine.routing import AdaptiveRouter, BudgetRouter
    from rmcore.head import FrozenHead, HeadConfig, SNGPHead
    from rmcore.judge import ChatJudge
    from rmcore.model import Backbone, Preference, RewardModel

__all__ = [
    "AdaptiveRouter",
    "Backbone",
    "BudgetRouter",
    "ChatJudge",
    "FrozenHead",
    "GroupScores",
    "HeadConfig",
    "Preference",
    "RewardEngine",
    "RewardModel",
    "SNGPHead",
    "__version__",
    "errors",
    "grpo_advantages",
    "ops",
    "rloo_advantages",
]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.engine.advantage": ("grpo_advantages", "rloo_advantages"),
        "rmcore.engine.engine": ("RewardEngine",),
        "rmcore.engine.groups": ("GroupScores",),
        "rmcore.engine.routing": ("AdaptiveRouter", "BudgetRouter"),
        "rmcore.errors": (),
        "rmcore.head": ("FrozenHead", "HeadConfig", "SNGPHead"),
        "rmcore.judge": ("ChatJudge",),
        "rmcore.model": ("Backbone", "Preference", "RewardModel"),
        "rmcore.ops": (),
    },
    moved=moved.NAMES,
)

lazy.refuse_moved_modules(__name__, moved.MODULES)
