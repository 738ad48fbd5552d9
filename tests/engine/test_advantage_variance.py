"""The variance of an advantage against the explicit covariance of all pairs, and against draws from the posterior."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.engine.advantage import reliability_weights, reliable_advantages, rloo_advantages, rloo_variance
from rmcore.engine.groups import GroupScores, table_of
from rmcore.engine.pair_table import PairTable
from rmcore.head.frozen import PairScores
from rmcore.judge.base import Verdict
from rmcore.ops import reference
from rmcore.ops.functional import Scores
from rmcore.ops.pair_layout import PairLayout


def group(size, seed=0, width=6):
    """Features φ (K, D), β and U of a posterior."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(size, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    factor = reference.triangular_factor(torch.eye(width, dtype=torch.float64) + rows.mT @ rows)
    return phi, torch.randn(width, generator=generator, dtype=torch.float64), factor


def explicit(phi, factor, weight):
    """aᵀΣa with Σ (Q, Q), the covariance of all pairs' logits, pair by pair."""
    size = len(phi)
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    y = torch.stack([factor @ (phi[i] - phi[j]) for i, j in places])
    covariance = y @ y.mT
    found = []
    for one in range(size):
        usable = [k for k in range(size) if k != one and not math.isnan(weight[one, k])]
        a = torch.zeros(len(places), dtype=torch.float64)
        for k, (i, j) in enumerate(places):
            if one in (i, j) and (j if i == one else i) in usable:
                a[k] = (1 if one == i else -1) * weight[i, j] / len(usable)
        found.append(a @ covariance @ a if usable else torch.tensor(math.nan, dtype=torch.float64))
    return torch.stack(found)


@given(st.integers(2, 7), st.integers(0, 1000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_it_is_the_quadratic_form_of_the_pairs_covariance(size, seed, holes):
    phi, beta, factor = group(size, seed)
    _, v = reference.pair_variance(phi, beta, factor)
    weight = 1 / reference.uncertainty(v, 0.4)
    if holes:
        draw = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).triu(1)
        draw = draw + draw.mT
        weight = weight.masked_fill(draw > 0.8, math.nan).masked_fill((draw > 0) & (draw < 0.2), 0.0)
    found = rloo_variance(v, weight)
    torch.testing.assert_close(found, explicit(phi, factor, weight), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_it_is_the_variance_over_draws_of_beta():
    phi, beta, factor = group(5, 7)
    g, v = reference.pair_variance(phi, beta, factor)
    u = reference.uncertainty(v, reference.mean_field_amplitude())
    drawn = beta + torch.randn(40_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ factor
    scores = drawn @ phi.mT
    advantages = rloo_advantages((scores[:, :, None] - scores[:, None, :]) / u)
    torch.testing.assert_close(rloo_variance(v, 1 / u), advantages.var(0), rtol=0.04, atol=0)
    torch.testing.assert_close(rloo_advantages(g / u), advantages.mean(0), rtol=0, atol=0.02)


def test_samples_have_it_too_and_equal_rows_none():
    rewards = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = (rewards[:, None] - rewards[None, :]).var(-1, correction=0)
    centred = (rewards - rewards.mean(0)) * 4 / 3
    torch.testing.assert_close(rloo_variance(v, torch.ones(4, 4).double()), centred.var(1, correction=0))
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert rloo_variance(nothing, nothing + 1).tolist() == [0.0] * 3


def table_of_groups(sizes):
    layout, columns, parts = PairLayout(sizes), [], []
    for k, size in enumerate(sizes):
        phi, beta, factor = group(size, k)
        i, j = torch.triu_indices(size, size, 1)
        g, v = (square[i, j] for square in reference.pair_variance(phi, beta, factor))
        u = reference.uncertainty(v, 0.4)
        columns.append(torch.stack([g, v, u, g / u]))
        parts.append((phi, factor))
    return PairTable.of_difference(PairScores(*torch.cat(columns, 1)), layout), parts


@pytest.mark.parametrize("sizes", [[3, 3], [1, 4, 2, 1, 4]])
def test_a_batch_has_it_in_its_order_and_a_verdict_is_certain(sizes):
    table, parts = table_of_groups(sizes)
    row = int((table.layout.group == 1).nonzero()[0])
    table.decide([row], [Verdict.of("win")], 0.12)
    scores = GroupScores(table)
    expected = []
    for number, (phi, factor) in enumerate(parts):
        own = dict(table.squares())[number]
        weight = 1 / own["uncertainty"]
        if number == 1:
            weight[0, 1] = weight[1, 0] = 0.0
        expected.append(explicit(phi, factor, weight) if len(phi) > 1 else torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(scores.advantage_variance, torch.cat(expected), rtol=1e-9, atol=1e-12)
    for one, wanted in zip(scores, expected, strict=True):
        torch.testing.assert_close(one.advantage_variance, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(table_of(scores.groups).advantage_variance(), torch.cat(expected))
    torch.testing.assert_close(PairTable.joined([table, table]).advantage_variance(), torch.cat(expected * 2))


def test_without_a_covariance_there_is_none_and_a_row_without_preferences_has_nan():
    columns = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 1
    concat = PairTable.of_concat(Scores(*columns), PairLayout([3]), "both")
    assert GroupScores(concat).advantage_variance is None
    assert GroupScores(concat)[0].advantage_variance is None
    table, parts = table_of_groups([4])
    bad = (table.layout.i == 2) | (table.layout.j == 2)
    values = table.values.clone()
    values[:, bad] = math.nan
    found = PairTable.of_difference(PairScores(*values), table.layout).advantage_variance()
    weight = (1 / dict(table.squares())[0]["uncertainty"]).clone()
    weight[2], weight[:, 2] = math.nan, math.nan
    phi, factor = parts[0]
    torch.testing.assert_close(found, explicit(phi, factor, weight), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert found.isnan().tolist() == [False, False, True, False]


def test_reliability_is_half_at_tau():
    v = torch.tensor([0.0, 2.0, math.inf, math.nan])
    assert reliability_weights(v, 2.0).tolist()[:3] == [1.0, 0.5, 0.0]
    assert reliability_weights(v, 2.0).isnan().tolist() == [False, False, False, True]
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="tau"):
            reliability_weights(v, tau)
    with pytest.raises(InputError, match="variance"):
        rloo_variance(torch.zeros(2, 2), torch.zeros(3, 3))


@pytest.mark.parametrize("bad", [False, True], ids=["whole", "a row without preferences"])
def test_a_trainers_baseline_makes_the_weighted_advantages_of_the_rewards_but_for_their_mean(bad):
    """Leave-one-out over those that have a reward, over all K with 0 for the others, and a group mean."""
    table, _ = table_of_groups([5])
    values = table.values.clone()
    if bad:
        values[:, (table.layout.i == 2) | (table.layout.j == 2)] = math.nan
    group = GroupScores(PairTable.of_difference(PairScores(*values), table.layout))[0]
    there = ~group.advantages.isnan()
    assert int(there.sum()) == 5 - bad
    weighted = group.advantages / (1 + group.advantage_variance / 0.3)
    torch.testing.assert_close(group.reliable_advantages(0.3), weighted, equal_nan=True)
    assert float(weighted[there].mean().abs()) > 1e-3, "a sum of 0 would show nothing"
    wanted = weighted - weighted[there].mean()
    torch.testing.assert_close(group.reliable_advantages(0.3, centred=True), wanted, equal_nan=True)

    def leave_one_out(rewards, count):
        return rewards - (rewards.sum() - rewards) / (count - 1)

    rewards = group.rewards_for("leave-one-out", tau=0.3)
    torch.testing.assert_close(leave_one_out(rewards[there], int(there.sum())), wanted[there])
    as_zero = group.rewards_for("leave-one-out", missing_as_zero=True, tau=0.3).nan_to_num(0.0)
    torch.testing.assert_close(leave_one_out(as_zero, 5)[there], wanted[there])
    mean = group.rewards_for("group-mean", tau=0.3)[there]
    torch.testing.assert_close(mean - mean.mean(), wanted[there])
    torch.testing.assert_close(group.rewards_for("leave-one-out", tau=1e12)[there], group.rewards[there])


def test_weighting_needs_a_variance_that_is_known():
    columns = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 1
    concat = GroupScores(PairTable.of_concat(Scores(*columns), PairLayout([3]), "both"))[0]
    with pytest.raises(InputError, match="advantage_variance: got none, of concat mode"):
        concat.rewards_for("leave-one-out", tau=1.0)
    with pytest.raises(InputError, match="variance"):
        reliable_advantages(torch.zeros(3), torch.zeros(2), 1.0)
