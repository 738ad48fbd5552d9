"""A small fp16 head for the tests of the operations."""

from __future__ import annotations

import pytest
import torch

from rmcore.ops import reference
from rmcore.ops.weights import FeatureMap, HeadWeights

H, D = 24, 40


@pytest.fixture
def weights() -> HeadWeights:
    """h = 24, D = 40, folded."""
    omega, b = reference.draw_features(D, H)
    projection, phase = reference.fold_projection(omega, b, 4.0)
    feature_map = FeatureMap(
        "rff", projection.half(), phase, None, None, "none", False, H, D, torch.float16, feature_scale=(2 / D) ** 0.5
    )
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(D, D, generator=generator, dtype=torch.float64)
    factor = reference.triangular_factor(a @ a.mT / D + torch.eye(D, dtype=torch.float64))
    return HeadWeights.build(feature_map, torch.randn(D, generator=generator), 0.25, factor, 0.4)
