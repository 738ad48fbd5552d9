"""Which pairs are worth a label: formulas against quadrature and determinants, batches against refitted posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import HeadConfig, SNGPHead
from rmcore._base.errors import InputError
from rmcore.engine.acquisition import bald, d_optimality, pair_pool, select_pairs
from rmcore.head.fit import fit

_ALL = ("bald", "d_optimality", "margin", "coreset", "delta_ucb", "thompson", "random")


@pytest.fixture(scope="module")
def head():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 6, generator=generator)
    pairs = torch.arange(60).view(30, 2)
    labels = (hidden[pairs[:, 0], 0] > hidden[pairs[:, 1], 0]).double()
    return fit(SNGPHead(HeadConfig(6, num_features=24, mode="difference", seed=1)), hidden, labels, pairs=pairs)[0]


@pytest.fixture(scope="module")
def pool(head):
    hidden = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) * 1.5
    return pair_pool(head, hidden, torch.tensor([2, 3, 1, 4, 30]))


def by_quadrature(mean: float, variance: float) -> float:
    x, weight = np.polynomial.hermite_e.hermegauss(120)
    p = 1 / (1 + np.exp(-(mean + math.sqrt(variance) * x)))
    weight = weight / weight.sum()

    def entropy(q):
        q = np.clip(q, 1e-300, 1 - 1e-16)
        return -(q * np.log2(q) + (1 - q) * np.log2(1 - q))

    return float(entropy(weight @ p) - weight @ entropy(p))


@given(st.floats(-10, 10), st.floats(1e-3, 100))
def test_bald_is_the_mutual_information(mean, variance):
    found = float(bald(torch.tensor([mean]), torch.tensor([variance]))[0])
    assert found == pytest.approx(by_quadrature(mean, variance), abs=0.036)
    assert 0 <= found <= 1


def test_bald_of_a_known_logit_is_nothing():
    assert bald(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 0.0])).tolist() == [0, 0]


def test_the_pool_is_what_the_head_serves(head, pool):
    hidden = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) * 1.5
    scores = head.score_pairs(hidden, torch.tensor([2, 3, 1, 4, 30]), dtype=torch.float64)
    torch.testing.assert_close(pool.logit, scores.logit, atol=2e-3, rtol=0)
    torch.testing.assert_close(pool.variance, scores.variance, atol=0, rtol=0.02)
    assert len(pool) == 1 + 3 + 0 + 6 + 435


def test_a_batch_by_d_optimality_adds_up_to_the_determinant(head, pool):
    """Each worth is what its label adds to log |P|, given the labels before it: so they sum to the whole."""
    rows, worth = select_pairs(pool, 12, "d_optimality")
    p = torch.sigmoid(pool.logit[rows])
    delta = pool.difference[rows]
    before = head.posterior.precision
    after = before + delta.mT @ ((p * (1 - p))[:, None] * delta)
    assert float(worth.sum()) == pytest.approx(float(torch.logdet(after) - torch.logdet(before)), rel=1e-9)
    assert float(worth[0]) == pytest.approx(float(d_optimality(pool.logit, pool.variance).max()), rel=1e-12)


def test_a_batch_by_bald_uses_the_variance_that_is_left(head, pool):
    rows, worth = select_pairs(pool, 5, "bald")
    earlier = rows[:4]
    p = torch.sigmoid(pool.logit[earlier])
    precision = head.posterior.precision + pool.difference[earlier].mT @ (
        (p * (1 - p))[:, None] * pool.difference[earlier]
    )
    left = (pool.difference @ torch.linalg.solve(precision, pool.difference.mT)).diagonal()
    values = bald(pool.logit, pool.scale * left)
    values[earlier] = -1
    assert int(values.argmax()) == int(rows[4])
    assert float(worth[4]) == pytest.approx(float(values.max()), rel=1e-6)


def test_copies_of_a_pair_are_worth_less_each_time(head):
    hidden = torch.randn(2, 6, generator=torch.Generator().manual_seed(5)) * 2
    pool = pair_pool(head, torch.cat([hidden] * 20), torch.tensor([2] * 20))
    _, worth = select_pairs(pool, 20, "d_optimality")
    p = torch.sigmoid(pool.logit[0])
    gain = float(p * (1 - p) * pool.variance[0])
    expected = [math.log1p(gain / (1 + k * gain)) for k in range(20)]  # v after k labels is v / (1 + k w v)
    assert worth.tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("by", _ALL)
def test_every_choice_is_of_different_pairs_and_repeatable(pool, by):
    rows, worth = select_pairs(pool, 9, by, seed=4)
    again, _ = select_pairs(pool, 9, by, seed=4)
    assert torch.equal(rows, again)
    assert len(rows) == len(worth) == (4 if by in ("delta_ucb", "thompson") else 9)
    assert len(set(rows.tolist())) == len(rows)
    everything, _ = select_pairs(pool, 10_000, by)
    assert len(everything) == (4 if by in ("delta_ucb", "thompson") else len(pool))


def test_one_pair_a_prompt(pool):
    for by in ("delta_ucb", "thompson"):
        rows, _ = select_pairs(pool, 4, by)
        assert sorted(pool.group[rows].tolist()) == [0, 1, 3, 4]
    rows, worth = select_pairs(pool, 4, "delta_ucb", beta=2.0)
    upper = pool.logit.abs() + 2 * (pool.scale * pool.variance).sqrt()
    for row, value in zip(rows.tolist(), worth.tolist(), strict=True):
        assert value == pytest.approx(float(upper[pool.group == pool.group[row]].max()))


def test_thompson_chooses_the_best_more_often_than_chance(pool):
    """Over draws the pair of a large group holds the head's best response far more often than 2 in 30."""
    of_last = pool.group == 4
    strength = torch.zeros(30, dtype=torch.float64)
    strength.index_add_(0, pool.i[of_last], pool.logit[of_last]).index_add_(0, pool.j[of_last], -pool.logit[of_last])
    best, hits = int(strength.argmax()), 0
    for seed in range(60):
        rows, _ = select_pairs(pool, 4, "thompson", seed=seed)
        row = int(rows[pool.group[rows] == 4][0])
        hits += best in (int(pool.i[row]), int(pool.j[row]))
    assert hits > 12


def test_coreset_covers_both_signs_of_a_difference(pool):
    rows, worth = select_pairs(pool, 30, "coreset")
    chosen = pool.difference[rows]
    for k in (1, 7, 29):
        apart = torch.minimum((chosen[:k] - chosen[k]).norm(dim=1).min(), (chosen[:k] + chosen[k]).norm(dim=1).min())
        assert float(apart) == pytest.approx(float(worth[k]), abs=1e-6)
    assert (worth[1:].diff() <= 1e-9).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"by": "luck"}, "by: got 'luck'"),
        ({"count": 0}, "count: got 0"),
        ({"beta": math.nan}, "beta: got nan"),
        ({"beta": -1.0}, "beta: got -1.0"),
    ],
)
def test_bad_arguments(pool, arguments, named):
    with pytest.raises(InputError, match=named):
        select_pairs(pool, **{"count": 3} | arguments)


def test_heads_without_a_posterior_over_responses(head):
    with pytest.raises(InputError, match="group_sizes: got a sum of 3"):
        pair_pool(head, torch.zeros(2, 6), torch.tensor([3]))
