"""Dropout through the backbone, measured on rows of T states side by side, is what a model's own call gives."""

from __future__ import annotations

import torch

from rmcore.bench.backbone_dropout import ThroughBackbone, main
from rmcore.model.dropout import dropout_pairs, dropout_states
from rmcore.model.reward_model import RewardModel


def test_rows_of_t_states_are_scored_as_the_models_own_call_does(make_backbone, preferences, monkeypatch, capsys):
    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences[:8], num_features=16)
    responses = ["a good fox", "a bad fox", "short and polite"]
    texts = [model.backbone.encoder.encode("tell me", response) for response in responses]
    states = dropout_states(model.backbone, texts, passes=3, seed=2)
    rows = states.permute(1, 0, 2).reshape(3, -1)
    found = ThroughBackbone(model, 3).pairs(rows, torch.tensor([3]))
    own = dropout_pairs(model, ["tell me"], [responses], passes=3, seed=2)
    torch.testing.assert_close(found.logit, own.logit)
    torch.testing.assert_close(found.variance, own.variance)
    monkeypatch.delenv("RMCORE_DATA", raising=False)
    assert main([]) == 2
    assert "RMCORE_DATA" in capsys.readouterr().err
