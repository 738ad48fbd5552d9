"""What several files of this folder build on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def data(make_data):
    return make_data(dtype=torch.float32)


@pytest.fixture
def head(data, fit_head):
    return fit_head(data, dtype=torch.bfloat16)
