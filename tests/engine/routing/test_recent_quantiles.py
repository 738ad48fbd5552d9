"""Quantiles of a stream of scores of which the latest count most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.engine.routing.recent import ForgettingSample, SampleQuantiles

# ------------------------------------------------------------------------------------ streaming quantiles


@given(st.lists(st.lists(st.floats(-100, 100), max_size=40), max_size=12), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_the_tail_holds_its_share_of_the_weight(batches, share):
    sample, weights, values, seen = ForgettingSample(16), [], [], 0
    for batch in batches:
        sample.add(np.array(batch, dtype=float))
        seen += len(batch)
        values += batch
        weights += [seen] * len(batch)
    new = np.array([1.0, 2.0, 3.0])
    tail = sample.tail(share, new)
    kept = len(values[-64:])
    every = np.concatenate([values[-64:], new])
    mass = np.concatenate([0.5 ** ((seen + 3 - np.array(weights[len(values) - kept :])) / 16), np.ones(3)])
    above, equal = mass[every > tail.threshold].sum(), mass[every == tail.threshold].sum()
    assert equal > 0
    assert 0 <= tail.tied <= 1
    assert above + tail.tied * equal == pytest.approx(share * mass.sum())


def test_a_batch_larger_than_the_sample_keeps_its_distribution():
    sample = ForgettingSample(16)
    sample.add(np.random.default_rng(16).permutation(np.linspace(0, 1, 100_000)))
    assert sample.seen == 100_000
    assert len(sample.state_dict()["values"]) == 64
    assert sample.tail(0.25, np.empty(0)).threshold == pytest.approx(0.75, abs=0.02)


def test_quantiles_of_a_long_step_stay_close():
    sample = SampleQuantiles(capacity=256)
    values = np.random.default_rng(17).normal(size=100_000)
    for k in range(0, len(values), 100):
        sample.add(values[k : k + 100])
    for level, got in zip((0.1, 0.5, 0.9), sample.quantiles((0.1, 0.5, 0.9)), strict=True):
        assert np.mean(values < got) == pytest.approx(level, abs=0.02)
    assert len(sample.state_dict()["values"]) <= 512
    sample.clear()
    assert sample.quantiles((0.5,)) is None
