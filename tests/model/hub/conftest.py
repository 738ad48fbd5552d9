"""What several files of this folder build on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.folders import preference_rows

from rmcore import Backbone, Preference, RewardModel


@pytest.fixture(scope="module")
def model(backbone_path: Path) -> RewardModel:
    backbone = Backbone.from_pretrained(str(backbone_path), device="cpu", pooling="mean")
    pairs = [Preference(**row) for row in preference_rows(12)]
    return RewardModel.fit(backbone, pairs, num_features=32, dtype=torch.float32)[0]


@pytest.fixture
def embedded(model: RewardModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "embedded", backbone="embed")
    return tmp_path / "embedded"
