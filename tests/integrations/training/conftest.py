"""Small runs: a two-layer model, 24 pairs, a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmcore.model import Preference
from rmcore.model.backbone import Backbone


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Any]:
    """``config_of(**settings)``: a run of a few steps on the CPU that writes nothing unless told to."""
    from rmcore.integrations.training import PairwiseRewardConfig

    usual = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "head_learning_rate": 2e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return lambda **settings: PairwiseRewardConfig(**{"output_dir": str(tmp_path / "run"), **usual, **settings})


@pytest.fixture
def backbone_of(make_backbone) -> Callable[..., Backbone]:
    """``backbone_of(kind, **config)``: a small backbone of two layers, new each time."""

    def make(kind: str = "llama", **config: Any) -> Backbone:
        return make_backbone(
            kind, model={"num_hidden_layers": 2, **config.pop("model", {})}, **{"pooling": "last", **config}
        )

    return make


@pytest.fixture
def held_out(preferences: list[Preference]) -> list[Preference]:
    """Pairs of which some contradict the others."""
    turned = [Preference(p.prompt, p.rejected, p.chosen) for p in preferences[:3]]
    return [*preferences[3:12], *turned]
