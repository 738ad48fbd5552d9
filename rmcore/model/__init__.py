"""Texts in, hidden states and scores out: a backbone of transformers with a head on it.

- ``reward_model``: :class:`RewardModel`, loaded, trained, saved.
- ``backbone``, ``backbone_config``: the transformer and how it is read.
- ``text``: from prompts and responses to tokens; ``encoding`` shares prefixes.
- ``training_pairs``, ``training``, ``data``: preferences to a fitted head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.model.backbone import Backbone
    from rmcore.model.backbone_config import BackboneConfig
    from rmcore.model.response_scores import ResponseScores
    from rmcore.model.reward_model import RewardModel
    from rmcore.model.training_pairs import Preference

__all__ = ["Backbone", "BackboneConfig", "Preference", "ResponseScores", "RewardModel"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.model.backbone": ("Backbone",),
        "rmcore.model.backbone_config": ("BackboneConfig",),
        "rmcore.model.response_scores": ("ResponseScores",),
        "rmcore.model.reward_model": ("RewardModel",),
        "rmcore.model.training_pairs": ("Preference",),
    },
)
