"""Scores from fewer comparisons than all pairs, against RLOO, normal equations and simulation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.engine.advantage import rloo_advantages
from rmcore.engine.comparisons import comparison_advantages, comparison_pairs, comparison_scores, swiss_round

INF = math.inf


@given(st.integers(1, 40), st.sampled_from(["all", "circular", "regular"]), st.sampled_from([2, 4, 6]))
def test_designs_are_connected_and_of_the_size_they_promise(size, design, degree):
    pairs = comparison_pairs(size, design, degree=degree)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len({tuple(p) for p in pairs.tolist()}) == len(pairs)
    every = size * (size - 1) // 2
    most = {"all": every, "circular": min(size, every), "regular": min(size * degree // 2, every)}[design]
    assert len(pairs) <= most
    assert len(pairs) == most or (design == "regular" and size * (degree - 1) // 2 <= len(pairs))
    scores = comparison_scores(pairs, torch.zeros(len(pairs)), size)  # raises where a response is apart
    assert (scores.variance >= 0).all()


def test_circular_is_each_against_the_next():
    assert comparison_pairs(4, "circular").tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]]
    assert comparison_pairs(2, "circular").tolist() == [[0, 1]]
    assert comparison_pairs(1, "circular").shape == (0, 2)


def test_steps_of_a_regular_design_beat_neighbours():
    """16 responses, 4 comparisons each: better than joining each to the next and the next but one."""
    chosen = comparison_pairs(16, "regular", degree=4)
    around = torch.arange(16)
    near = torch.cat([torch.stack([around, (around + s) % 16], 1) for s in (1, 2)])
    variance = [float(comparison_scores(p, torch.zeros(len(p)), 16).variance.mean()) for p in (chosen, near)]
    assert len(chosen) == len(near) == 32
    assert variance[0] < 0.8 * variance[1]


@given(st.integers(2, 9), st.integers(0, 99))
def test_all_pairs_are_rloo(size, seed):
    square = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    square = square - square.mT
    pairs = comparison_pairs(size)
    scores = comparison_scores(pairs, square[:, pairs[:, 0], pairs[:, 1]], size)
    advantages, variance = comparison_advantages(scores)
    torch.testing.assert_close(advantages, rloo_advantages(square), atol=1e-12, rtol=1e-12)
    # A sum of K − 1 independent preferences of variance 1, divided by K − 1, against scores with K/(K−1) · (K−1)/K².
    torch.testing.assert_close(variance, torch.full_like(variance, 1 / (size - 1)), atol=1e-12, rtol=1e-12)


def test_noise_free_preferences_give_the_scores_back():
    truth = torch.tensor([2.0, -1.0, 0.5, 0.0, -1.5], dtype=torch.float64)
    for design in ("all", "circular", "regular"):
        pairs = comparison_pairs(5, design)
        scores = comparison_scores(pairs, truth[pairs[:, 0]] - truth[pairs[:, 1]], 5)
        torch.testing.assert_close(scores.score, truth - truth.mean())


def test_the_variance_is_that_of_repeated_draws():
    pairs, generator = comparison_pairs(6, "circular"), torch.Generator().manual_seed(0)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 1.0], dtype=torch.float64)
    noise = torch.randn(20000, 6, dtype=torch.float64, generator=generator) * (0.3 / weight).sqrt()
    scores = comparison_scores(pairs, noise, 6, weight=weight, noise=0.3)
    torch.testing.assert_close(scores.score.T.cov(), scores.covariance[0], atol=0.02, rtol=0.05)


def test_a_prior_is_ridge_and_takes_what_falls_apart():
    pairs, preference = torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, -2.0], dtype=torch.float64)
    with pytest.raises(InputError, match="comparisons that leave some response apart"):
        comparison_scores(pairs, preference, 4)
    found = comparison_scores(pairs, preference, 4, prior=10.0)
    # Two pairs by themselves: s_0 − s_1 = 1 · 2/(2 + 1/100).
    assert float(found.score[0] - found.score[1]) == pytest.approx(2 / 2.01)
    assert float(found.score.sum()) == pytest.approx(0, abs=1e-12)


def test_a_comparison_that_failed_is_left_out():
    pairs = comparison_pairs(4)
    preference = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    preference[2] = torch.nan
    found = comparison_scores(pairs, preference, 4)
    keep = torch.tensor([0, 1, 3, 4, 5])
    without = comparison_scores(pairs[keep], preference[keep], 4)
    torch.testing.assert_close(found.score, without.score)
    torch.testing.assert_close(found.covariance, without.covariance)
    assert found.variance[0] > found.variance[1]
    with pytest.raises(InputError, match="apart"):
        comparison_scores(pairs, torch.full((6,), torch.nan), 4)


def test_one_response_has_nothing_to_be_compared_with():
    found = comparison_scores(comparison_pairs(1), torch.zeros(2, 0), 1)
    advantages, variance = comparison_advantages(found)
    assert advantages.tolist() == variance.tolist() == [[0.0], [0.0]]


def test_a_swiss_tournament_meets_everybody_once_and_neighbours_first():
    size, met = 6, torch.zeros(6, 6, dtype=torch.bool)
    score = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    first = swiss_round(score, met)
    assert first.tolist() == [[0, 1], [2, 3], [4, 5]]
    seen: set[tuple[int, int]] = set()
    for _ in range(20):
        pairs = swiss_round(score, met)
        assert not seen & {tuple(p) for p in pairs.tolist()}
        assert len(set(pairs.flatten().tolist())) == pairs.numel()
        seen |= {tuple(p) for p in pairs.tolist()}
        met[pairs[:, 0], pairs[:, 1]] = met[pairs[:, 1], pairs[:, 0]] = True
    assert len(seen) == size * (size - 1) // 2
    assert swiss_round(torch.zeros(3), torch.zeros(3, 3, dtype=torch.bool)).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: comparison_pairs(0), "size: got 0"),
        (lambda: comparison_pairs(4, "star"), "design: got 'star'"),
        (lambda: comparison_pairs(9, "regular", degree=3), "degree: got 3"),
        (lambda: swiss_round(torch.zeros(3), torch.zeros(2, 2)), r"met: got \(2, 2\)"),
        (lambda: comparison_scores(torch.tensor([[0, 5]]), torch.zeros(1), 3), "pairs: got 0 to 5"),
        (lambda: comparison_scores(torch.tensor([[0, 1]]), torch.zeros(2), 2), "pairs, preference: got"),
        (lambda: comparison_scores(torch.tensor([[0, 1]]), torch.tensor([INF]), 2), "preference: got an infinite"),
        (lambda: comparison_scores(torch.tensor([[0, 1]]), torch.zeros(1), 2, noise=0.0), "noise: got 0.0"),
        (lambda: comparison_scores(torch.tensor([[0, 1]]), torch.zeros(1), 2, prior=-1.0), "prior: got -1.0"),
        (
            lambda: comparison_scores(torch.tensor([[0, 1]]), torch.zeros(1), 2, weight=torch.tensor([-1.0])),
            "weight: got a negative",
        ),
    ],
)
def test_bad_arguments(call, named):
    with pytest.raises(InputError, match=named):
        call()
