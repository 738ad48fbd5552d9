"""Accuracy behind critiques, cross-fitted: critiques that tell the answer are learnt from, and no fold sees itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rmcore.bench.critiques import cross_fitted, shuffled
from rmcore.head import HeadConfig
from rmcore.model import Preference
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


def test_asked_otherwise_than_it_was_fitted_a_head_knows_nothing_of_what_it_has_not_seen() -> None:
    fold, config = np.arange(60) % 5, HeadConfig(8, features="linear", row_ridge=None)
    told = made(3.0)
    turned = replace(told, hidden=-told.hidden)
    assert cross_fitted(told, fold, config, turned).mean() < 0.05
    assert cross_fitted(told, fold, config, told).tolist() == cross_fitted(told, fold, config).tolist()


def test_the_control_stands_every_response_behind_another_prompts_critique() -> None:
    pairs = [
        Preference(f"p{k // 3}", "a", "b", critiques=((f"p{k // 3} good {k}",), (f"p{k // 3} bad {k}",)))
        for k in range(30)
    ]
    found = shuffled(pairs, 0)
    assert found == shuffled(pairs, 0)
    said = [text for pair in found for side in pair.critiques for (text,) in [side]]
    assert sorted(said) == sorted(text for pair in pairs for (text,) in pair.critiques), "none is lost or said twice"
    assert not any(text.split()[0] == pair.prompt for pair in found for (text,) in pair.critiques)
    with pytest.raises(ValueError, match="one prompt"):
        shuffled(pairs[:3], 0)
