"""Fast inference kernels and a reward engine for uncertainty-aware reward models.

A pairwise reward model with a spectral-normalised Gaussian-process head gives every pair of responses a preference and
an epistemic uncertainty in one pass; only uncertain pairs go to an LLM judge; what comes back are rewards and RLOO
advantages.

Importing rmcore imports torch and nothing slower: transformers, triton and the HTTP client load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy
from rmcore._base.version import __version__

if TYPE_CHECKING:
    from rmcore import ops
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
    "grpo_advantages",
    "ops",
    "rloo_advantages",
]

_ROUTING, _LEARNING = "rmcore.engine.routing", "rmcore.engine.learning"

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.engine.advantage": ("grpo_advantages", "rloo_advantages"),
        "rmcore.engine.engine": ("RewardEngine",),
        "rmcore.engine.groups": ("GroupScores",),
        "rmcore.engine.routing": ("AdaptiveRouter", "BudgetRouter"),
        "rmcore.head": ("FrozenHead", "HeadConfig", "SNGPHead"),
        "rmcore.judge": ("ChatJudge",),
        "rmcore.model": ("Backbone", "Preference", "RewardModel"),
        "rmcore.ops": (),
    },
    moved={
        **dict.fromkeys(
            ("AlwaysRoute", "Budget", "NeverRoute", "RandomRouter", "Router", "ThresholdRouter"),
            f"import it from {_ROUTING}",
        ),
        **dict.fromkeys(("LearningConfig", "VerdictLearner"), f"import it from {_LEARNING}"),
        "Judge": "import it from rmcore.judge",
    },
)

lazy.refuse_moved_modules(
    __name__,
    {
        "accounting": "rmcore.engine.usage",
        "accounts": "rmcore.engine.accounts",
        "advantage": "rmcore.engine.advantage",
        "backbone": "rmcore.model.backbone",
        "backbone_config": "rmcore.model.backbone_config",
        "backends": "rmcore.ops.backends",
        "checkpoint": "rmcore.head.checkpoint",
        "data": "rmcore.model.data",
        "demo": "rmcore.cli.run_demo",
        "encoding": "rmcore.model.encoding",
        "errors": "rmcore._base.errors",
        "evaluate": "rmcore.evaluation.statistics",
        "fit": "rmcore.head.fit",
        "groups": "rmcore.engine.groups",
        "learning": _LEARNING,
        "operators": "rmcore.ops.library",
        "plots": "rmcore.evaluation.plots",
        "posterior": "rmcore.head.posterior",
        "quality": "rmcore.evaluation.evaluate",
        "quantize": "rmcore.ops.quantize",
        "reference": "rmcore.ops.reference",
        "report": "rmcore.evaluation.report",
        "routing": _ROUTING,
        "scoring": "rmcore.engine",
        "selection": "rmcore.engine.selection",
        "serve": "rmcore.integrations.server",
        "streams": "rmcore.evaluation.streams",
        "text": "rmcore.model.text",
        "training": "rmcore.model.training",
        "weights": "rmcore.ops.weights",
    },
)
