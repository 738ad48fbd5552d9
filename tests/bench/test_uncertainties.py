"""The comparison of uncertainties: its figures are those of the estimator, and what it writes can be read."""

from __future__ import annotations

import json

import pytest
import torch

from rmcore.bench import attribute_uncertainties
from rmcore.bench.attribute_uncertainties import NAMES, Responses, attribute_figures, calculations
from rmcore.bench.filters import filter_curves
from rmcore.bench.uncertainties import COVERAGES, fit_estimator, main, measure
from rmcore.evaluation.evaluate import PairStates
from rmcore.evaluation.statistics import accuracy, log_loss
from rmcore.evaluation.streams import StreamPair
from rmcore.head.attributes import FitOptions
from rmcore.head.estimators import ESTIMATORS
from rmcore.model.data import AttributeRow


@pytest.fixture(scope="module")
def figures():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 5, generator=generator)
    pairs = torch.arange(60).view(30, 2)
    noise = torch.randn(30, generator=generator)  # so that some pairs are got wrong, and AUROC is a number
    labels = (hidden[pairs[:, 0], 0] - hidden[pairs[:, 1], 0] + noise > 0).float()
    estimator = fit_estimator("laplace", hidden, labels, pairs, seed=0)
    stream = tuple(StreamPair(f"p{k // 2}", "a", "b", float(labels[k]), "x") for k in range(30))
    found, run = measure(estimator, PairStates(hidden[pairs], torch.ones(30, 2)), stream, replicates=20, seed=0)
    return found, estimator.pairs(hidden, torch.full((30,), 2)), labels, run


def test_figures_are_the_estimators(figures):
    found, said, labels, _ = figures
    assert found["accuracy"][0] == pytest.approx(100 * accuracy(said.logit, labels))
    assert found["log_loss"] == pytest.approx(log_loss(said.preference, labels))
    wrong = (said.logit > 0) != (labels > 0.5)
    assert found["risk"][-1] == pytest.approx(100 * float(wrong.double().mean()))
    assert found["risk"][4] == pytest.approx(100 * float(wrong[said.variance.argsort()[:15]].double().mean()))
    assert found["brier"] == pytest.approx(float((torch.sigmoid(said.preference) - labels).square().mean()))
    assert [low <= point <= high for point, low, high in found["uplift"]] == [True] * 3


@pytest.fixture(scope="module")
def attributes():
    """Twenty prompts of three responses whose first entries say how good they are; calculations lie elsewhere."""
    generator, count = torch.Generator().manual_seed(1), 60
    hidden = torch.randn(count, 8, generator=generator)
    hidden[:, 6:] = 0
    labels = (2 + hidden[:, :1] + 0.2 * torch.randn(count, len(NAMES), generator=generator)).clamp(0, 5)
    rows = [AttributeRow("p", "r", tuple(map(float, label))) for label in labels]
    responses = Responses(rows, hidden, labels, torch.arange(count) // 3)
    numeric = torch.zeros(10, 8)
    numeric[:, 6:] = 3.0

    def measured(estimator, states, stream):
        return measure(estimator, states, stream, replicates=5, seed=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribute_uncertainties, "ESTIMATORS", {name: ESTIMATORS[name] for name in ("laplace", "urme")})
        patch.setattr(attribute_uncertainties, "TRAINING", FitOptions(steps=20))
        return attribute_figures(responses, numeric, measured, replicates=5)


def test_figures_on_attributes_are_of_held_out_prompts(attributes):
    assert (attributes["responses"], attributes["prompts"]) == (60, 20)
    assert attributes["estimators"]["urme"]["accuracy"][0] > 70
    assert attributes["numeric"]["gap"]["numeric"] > attributes["numeric"]["gap"]["held_out"]
    assert {name: set(own) for name, own in attributes["filter"].items()} == {
        "laplace": {"variance", "margin"},
        "urme": {"variance", "margin", "gap", "covariance"},
    }
    kept = attributes["filter"]["urme"]["gap"]["share"]
    assert kept[0] == 1.0
    assert kept == sorted(kept, reverse=True)
    assert attributes["filter"]["urme"]["gap"]["accuracy"][0] == pytest.approx(
        attributes["estimators"]["urme"]["accuracy"][0], abs=1e-3
    )
    assert attributes["best_of"]["gap"]["0"] == attributes["best_of"]["covariance"]["0"]
    right, wrong = calculations(2)
    assert eval_sum(right[0]) == int(right[1].rpartition("= ")[2])
    assert eval_sum(wrong[0]) != int(wrong[1].rpartition("= ")[2])


def eval_sum(prompt):
    a, b, c = (int(part) for part in prompt.removeprefix("Calculate ").rstrip(".").replace("*", "+").split("+"))
    return a * b + c


def test_a_table_a_plot_and_figures_are_written_and_nothing_without_data(
    figures, attributes, tmp_path, monkeypatch, capsys
):
    curves = filter_curves([figures[3]], replicates=100)
    assert curves["variance"]["accuracy"][0] == pytest.approx(figures[0]["accuracy"][0], abs=1e-3)
    own = {**figures[0], "uplift_sd_over_seeds": [0.0] * 3, "filter": curves}
    document = {
        "streams": {"s": {"title": "a stream", "pairs": 30}},
        "fractions": [0.1, 0.25, 0.45],
        "threads": 1,
        "load": 2.5,
        "betas": [0, 0.01, 0.2, 1],
        "attributes": attributes,
        "coverages": list(COVERAGES),
        "estimators": {n: {"fit_s": 1, "score_us": 2, "bytes": 1024, "streams": {"s": own}} for n in ESTIMATORS},
    }
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments, work=lambda data, seeds, replicates: document) == 0
    assert json.loads((tmp_path / "out/uncertainties.json").read_text()) == document
    text = (tmp_path / "out/uncertainties.md").read_text()
    assert all(text.count(f"| {name} |") == (3 if name in attributes["estimators"] else 2) for name in ESTIMATORS)
    assert "| gap | 1 |" in text
    assert "| variance | 11 |" in text  # a stream's nine estimators, two on attributes
    assert text.count("| laplace, margin |") == 2
    assert (tmp_path / "out/uncertainties.png").stat().st_size > 10_000
    monkeypatch.delenv("RMCORE_DATA", raising=False)
    assert main([]) == 2
    assert "RMCORE_DATA" in capsys.readouterr().err
