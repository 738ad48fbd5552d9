"""The comparison of uncertainties: its figures are those of the estimator, and what it writes can be read."""

from __future__ import annotations

import json

import pytest
import torch

from rmcore.bench.uncertainties import fit_estimator, main, measure
from rmcore.evaluation.evaluate import PairStates
from rmcore.evaluation.statistics import accuracy, log_loss
from rmcore.evaluation.streams import StreamPair
from rmcore.head.estimators import ESTIMATORS


@pytest.fixture(scope="module")
def figures():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 5, generator=generator)
    pairs = torch.arange(60).view(30, 2)
    noise = torch.randn(30, generator=generator)  # so that some pairs are got wrong, and AUROC is a number
    labels = (hidden[pairs[:, 0], 0] - hidden[pairs[:, 1], 0] + noise > 0).float()
    estimator = fit_estimator("laplace", hidden, labels, pairs, seed=0)
    stream = tuple(StreamPair(f"p{k // 2}", "a", "b", float(labels[k]), "x") for k in range(30))
    found = measure(estimator, PairStates(hidden[pairs], torch.ones(30, 2)), stream, replicates=20, seed=0)
    return found, estimator.pairs(hidden, torch.full((30,), 2)), labels


def test_figures_are_the_estimators(figures):
    found, said, labels = figures
    assert found["accuracy"][0] == pytest.approx(100 * accuracy(said.logit, labels))
    assert found["log_loss"] == pytest.approx(log_loss(said.preference, labels))
    assert found["brier"] == pytest.approx(float((torch.sigmoid(said.preference) - labels).square().mean()))
    assert [low <= point <= high for point, low, high in found["uplift"]] == [True] * 3


def test_a_table_a_plot_and_figures_are_written_and_nothing_without_data(figures, tmp_path, monkeypatch, capsys):
    own = {**figures[0], "uplift_sd_over_seeds": [0.0] * 3}
    document = {
        "streams": {"s": {"title": "a stream", "pairs": 30}},
        "fractions": [0.1, 0.25, 0.45],
        "betas": [0, 0.01, 0.2, 1],
        "estimators": {n: {"fit_s": 1, "score_us": 2, "bytes": 1024, "streams": {"s": own}} for n in ESTIMATORS},
    }
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments, work=lambda data, seeds, replicates: document) == 0
    assert json.loads((tmp_path / "out/uncertainties.json").read_text()) == document
    text = (tmp_path / "out/uncertainties.md").read_text()
    assert all(text.count(f"| {name} |") == 2 for name in ESTIMATORS)
    assert (tmp_path / "out/uncertainties.png").stat().st_size > 10_000
    monkeypatch.delenv("RMCORE_DATA", raising=False)
    assert main([]) == 2
    assert "RMCORE_DATA" in capsys.readouterr().err
