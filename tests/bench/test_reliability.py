"""What reliability weights do to recorded advantages: the advantages are an engine's, the cosine is a cosine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmcore import RewardEngine
from rmcore.bench.reliability import advantages_of, cosines, main, table
from rmcore.head.estimators import Laplace


def test_advantages_and_variances_are_the_engines(hand_head):
    hidden, pairs = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24).view(12, 2)
    laplace = Laplace.fit(hidden, (hidden[pairs[:, 0], 0] > hidden[pairs[:, 1], 0]).float(), pairs)
    advantages, variance = advantages_of(laplace, hidden, 4)
    scores = RewardEngine(hand_head([1.0, 0.0, 0.0]), uncertainty=laplace).score_hidden(hidden, [4] * 6)
    torch.testing.assert_close(advantages, scores.advantages)
    torch.testing.assert_close(variance, scores.advantage_variance)


def test_weights_gain_where_the_unsure_are_wrong_and_shuffled_ones_do_not(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=400), rng.random(400) * 4
    advantage = truth + noise * rng.normal(size=400)
    found = cosines(advantage, noise**2, truth, np.arange(400) // 4, 200)
    assert found["unweighted"] == pytest.approx(
        advantage @ truth / np.sqrt((advantage**2).sum() * (truth**2).sum()), abs=1e-4
    )
    middle = found["tau"]["0.5"]
    assert middle["low"] > 0
    assert middle["low"] <= middle["gain"] <= middle["high"]
    assert middle["shuffled"] < 0.3 * middle["gain"]
    blind = cosines(advantage, rng.permutation(noise**2), truth, np.arange(400) // 4, 200)["tau"]["0.5"]
    assert blind["low"] < 0 < blind["high"]
    text = table({"parts": {"here": {"laplace": found}}})
    assert "| laplace | " in text
    monkeypatch.delenv("RMCORE_DATA", raising=False)
    assert main([]) == 2
    assert "RMCORE_DATA" in capsys.readouterr().err
