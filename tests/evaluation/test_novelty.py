"""Novelty as a score beside u and the margin: where the head knows it, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.evaluation.evaluate import PairStates, evaluate_pairs, scored_pairs
from rmcore.evaluation.plots.report import _label
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.risk import evaluate_risk
from rmcore.evaluation.statistics import auroc, correctness
from rmcore.evaluation.streams import StreamPair

PAIRS = [StreamPair(f"prompt {k}", "a", "b", float(k % 2), "test") for k in range(30)]


@pytest.fixture(scope="module")
def data(make_data):
    return make_data(rows=120, pairs=200, dtype=torch.float32)


def states(silent=()):
    hidden = 2 * torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(30, dtype=torch.bool)
    mask[list(silent)] = True
    return PairStates(hidden, torch.ones(30, 2), mask)


def test_it_is_the_mean_of_the_rows_novelty(data, fit_head):
    head = fit_head(data)
    scored = scored_pairs(head, states(), PAIRS)
    n = head.novelty(states().hidden.flatten(0, 1)).view(30, 2).mean(1)
    np.testing.assert_allclose(scored.novelty, n, rtol=1e-6)
    report = evaluate_pairs(scored, replicates=0)
    assert [score.name for score in report.scores][:4] == ["u", "margin", "rank_sum", "novelty"]
    wrong = correctness(scored.logit, scored.label) == 0
    assert report.score("novelty").auroc == auroc(scored.novelty, wrong)
    assert "| novelty |" in report.to_markdown()
    assert _label("novelty") == "novelty n"
    assert list(evaluate_risk(scored, alpha=0.3, times=2).thresholds) == ["u", "margin", "novelty"]


def test_pairs_of_which_nothing_is_known_are_as_novel_as_the_most(data, fit_head):
    head = fit_head(data)
    known, some = scored_pairs(head, states(), PAIRS).novelty, scored_pairs(head, states([3, 7]), PAIRS).novelty
    others = np.delete(np.arange(30), [3, 7])
    np.testing.assert_array_equal(some[others], known[others])
    assert some[3] == some[7] == known[others].max()


def test_it_is_left_out_where_the_head_does_not_know_it(data, fit_head):
    for head in (fit_head(data, row_ridge=None), fit_head(data, mode="concat")):
        scored = scored_pairs(head, states(), PAIRS)
        assert scored.novelty is None
        assert "novelty" not in [score.name for score in evaluate_pairs(scored, replicates=0).scores]
        assert list(evaluate_risk(scored, alpha=0.3, times=2).thresholds) == ["u", "margin"]


def test_what_scored_pairs_refuse():
    fields = {"logit": [1.0, -1.0], "label": [1, 1], "uncertainty": [1, 2], "cluster": [0, 1]}
    with pytest.raises(InputError, match=r"novelty\[1\]: got -0.5"):
        ScoredPairs(**fields, novelty=[0.5, -0.5])
    with pytest.raises(InputError, match="novelty: got 1 entries"):
        ScoredPairs(**fields, novelty=[0.5])
    with pytest.raises(InputError, match="controls: got the name 'novelty'"):
        ScoredPairs(**fields, controls={"novelty": [0.5, 0.5]})
