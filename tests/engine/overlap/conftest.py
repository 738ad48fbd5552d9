"""What several files of this folder build on."""

from __future__ import annotations

import pytest
from support.overlap import (
    Backbone,
)

from rmcore import RewardEngine
from rmcore.engine.routing import AlwaysRoute


@pytest.fixture
def make_engine(hand_head, table_model):
    def make(judge, router=None, table=None, **kwargs) -> RewardEngine:
        model = table_model(hand_head([1.0, 0.0]), table or Backbone())
        return RewardEngine(model, judge, router or AlwaysRoute(), **{"micro_batch_tokens": 4, **kwargs})

    return make
