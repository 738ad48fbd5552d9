"""A head's configuration chosen by log-loss on pairs left out."""

import math
from dataclasses import replace

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.head.config import HeadConfig
from rmcore.model.tune import GRID, tune


def data(count=120, concat=False):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * count, 4, generator=random)
    if concat:
        rows[1::2] = -rows[::2]
        better = rows[::2, 0] > 0
        return rows, torch.stack([better, ~better], 1).flatten().float(), None
    return rows, (rows[::2, 0] > rows[1::2, 0]).float(), torch.arange(2 * count).view(-1, 2)


@pytest.mark.parametrize("concat", [False, True])
def test_what_is_chosen_has_the_least_loss_of_all_tried(concat, monkeypatch):
    monkeypatch.setitem(GRID, "num_features", (32, 64))
    config = HeadConfig(4, mode="concat" if concat else "difference", num_features=64, ridge=100.0, kernel_scale=0.1)
    chosen, trials = tune(config, *data(concat=concat))
    given, *others = trials
    assert (given.setting, len(others)) == ("", 4 - 1 + 3 + 3 + 1)
    best = min(trials, key=lambda trial: trial.loss)
    assert best.loss < given.loss < math.log(2) + 0.01
    assert best.accuracy > 0.8
    assert getattr(chosen, best.setting) == best.value
    names = {name: getattr(config, name) for name in GRID}
    assert replace(chosen, **names) == config  # nothing else is touched
    assert tune(config, *data(concat=concat)) == (chosen, trials)


def test_linear_features_have_a_ridge_only_and_few_pairs_are_too_few():
    config = HeadConfig(4, features="linear", ridge=3.0)
    chosen, trials = tune(config, *data())
    assert {trial.setting for trial in trials} == {"", "ridge"}
    assert chosen.ridge in (3.0, *GRID["ridge"])
    with pytest.raises(InputError, match="at least 30"):
        tune(config, *data(29))
