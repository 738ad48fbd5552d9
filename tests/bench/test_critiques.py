"""Accuracy behind critiques, cross-fitted: critiques that tell the answer are learnt from, and no fold sees itself."""

from __future__ import annotations

import numpy as np
import torch

from rmcore.bench.critiques import cross_fitted
from rmcore.head import HeadConfig
from rmcore.model.critiqued_data import CritiquedData
from rmcore.model.critiques import StateCounts


def made(signal: float) -> CritiquedData:
    """60 pairs, two states of the chosen response and one of the rejected; ``signal`` tells them apart."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(180, 8, generator=generator)
    hidden[:, 0] += signal * torch.tensor([1.0, 1.0, -1.0]).repeat(60)
    start = torch.arange(0, 180, 3)
    pairs = torch.stack([torch.stack([start, start + 2], 1), torch.stack([start + 1, start + 2], 1)], 1).flatten(0, 1)
    states = StateCounts(((2, 1),) * 60)
    return CritiquedData(hidden, torch.ones(120), pairs, torch.full((120,), 0.5), states, tuple(range(60)))


def test_critiques_that_tell_are_learnt_from_and_others_are_not() -> None:
    fold, config = np.arange(60) % 5, HeadConfig(8, features="linear", row_ridge=None)
    assert cross_fitted(made(3.0), fold, config).mean() > 0.95
    noise = cross_fitted(made(0.0), fold, config).mean()
    assert 0.2 < noise < 0.8, "a head that had seen the pairs it is asked about would get nearly all right"
