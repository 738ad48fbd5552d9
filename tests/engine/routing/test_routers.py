"""Routers by hand: who is chosen, by which score, and how many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import BudgetRouter
from rmcore._base.errors import InputError
from rmcore.engine.routing import AlwaysRoute, Candidates, NeverRoute, RandomRouter, ThresholdRouter, rank_score

SCORES = ("u", "margin", "error_probability", "rank_sum")


def candidates(logit, variance, uncertainty=None) -> Candidates:
    g, v = torch.tensor(logit, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)
    u = torch.sqrt(1 + 3 * v) if uncertainty is None else torch.tensor(uncertainty, dtype=torch.float64)
    return Candidates(g, v, u)


# v = 1, 0, 5, 8/3 → u = 2, 1, 4, 3; p = g/u = 1, -0.5, 3, 0
FOUR = candidates([2.0, -0.5, 12.0, 0.0], [1.0, 0.0, 5.0, 8 / 3])
NONE = candidates([], [])


def chosen(router, pairs=FOUR) -> list[int]:
    mask = router.select(pairs)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(pairs),)
    return mask.nonzero()[:, 0].tolist()


def test_scores_by_hand():
    assert rank_score(FOUR, "u").tolist() == pytest.approx([2, 1, 4, 3])
    assert rank_score(FOUR, "margin").tolist() == pytest.approx([-1, -0.5, -3, 0])
    # |g|/√v = 2, ∞ (no variance), 12/√5, 0
    assert rank_score(FOUR, "error_probability").tolist() == pytest.approx([-2, -math.inf, -12 / math.sqrt(5), 0])
    # ranks by u: 2, 1, 4, 3; by margin: 2, 3, 1, 4
    assert rank_score(FOUR, "rank_sum").tolist() == [4, 4, 5, 7]


def test_no_sign_and_no_variance_is_the_likeliest_error():
    both_zero = candidates([0.0, 0.1], [0.0, 0.0])
    assert rank_score(both_zero, "error_probability").tolist() == [0.0, -math.inf]


def test_equal_values_share_the_average_rank():
    tied = candidates([1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 2.0])
    # u: three at the ranks 1..3, so 2 each, then 4. p = 1, 1, 1, 2.5: margin ranks 3 each (of 2..4), then 1.
    assert rank_score(tied, "rank_sum").tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("by", "order"),
    [("u", [2, 3, 0, 1]), ("margin", [3, 1, 0, 2]), ("error_probability", [3, 0, 2, 1]), ("rank_sum", [3, 2, 0, 1])],
)
def test_budget_takes_the_top(by, order):
    for count in range(5):
        assert chosen(BudgetRouter(count=count, by=by)) == sorted(order[:count])


def test_ties_go_by_the_order_of_the_batch():
    same = candidates([1.0] * 5, [1.0] * 5)
    for by in SCORES:
        assert chosen(BudgetRouter(count=2, by=by), same) == [0, 1]


@pytest.mark.parametrize(
    ("fraction", "pairs", "expected"),
    [
        (0.1, 10, 1),  # 0.1 * 10 must not lose its pair to rounding
        (0.3, 10, 3),
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (0.7, 10, 7),
        (0.19, 10, 1),
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.5, 1, 0),
        (0.5, 0, 0),
    ],
)
def test_fraction_rounds_down_and_only_down(fraction, pairs, expected):
    batch = candidates([float(k) for k in range(pairs)], [1.0] * pairs)
    assert len(chosen(BudgetRouter(fraction=fraction), batch)) == expected
    assert len(chosen(RandomRouter(fraction=fraction), batch)) == expected


@given(percent=st.integers(0, 100), pairs=st.integers(0, 300))
def test_a_whole_percentage_is_exact(percent, pairs):
    batch = Candidates(*(torch.ones(pairs, dtype=torch.float64) for _ in range(3)))
    assert int(BudgetRouter(fraction=percent / 100).select(batch).sum()) == percent * pairs // 100


def test_more_budget_than_pairs_takes_them_all():
    assert chosen(BudgetRouter(count=99)) == [0, 1, 2, 3]
    assert chosen(RandomRouter(count=99)) == [0, 1, 2, 3]


def test_threshold_is_strict_and_reads_its_own_score():
    assert chosen(ThresholdRouter(2.0)) == [2, 3]
    assert chosen(ThresholdRouter(1.0)) == [0, 2, 3]  # u = 1 is certainty
    assert chosen(ThresholdRouter(math.inf)) == []
    assert chosen(ThresholdRouter(-0.75, by="margin")) == [1, 3]
    assert chosen(ThresholdRouter(-2.0, by="error_probability")) == [3]


def test_never_and_always():
    assert chosen(NeverRoute()) == []
    assert chosen(AlwaysRoute()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "router",
    [
        *(BudgetRouter(fraction=0.5, by=by) for by in SCORES),
        BudgetRouter(count=3),
        ThresholdRouter(1.0),
        RandomRouter(fraction=0.5),
        NeverRoute(),
        AlwaysRoute(),
    ],
    ids=lambda router: f"{type(router).__name__}-{getattr(router, 'by', '')}",
)
def test_nothing_to_choose_from(router):
    assert chosen(router, NONE) == []


def test_random_is_reproducible_and_draws_on():
    batch = candidates([0.0] * 50, [1.0] * 50)
    one, two, other = RandomRouter(0.2, seed=7), RandomRouter(0.2, seed=7), RandomRouter(0.2, seed=8)
    first = [chosen(one, batch) for _ in range(3)]
    assert first == [chosen(two, batch) for _ in range(3)]
    assert first != [chosen(other, batch) for _ in range(3)]
    assert first[0] != first[1]
    assert all(len(c) == len(chosen(BudgetRouter(0.2), batch)) == 10 for c in first)


def test_random_ignores_the_scores():
    batch = candidates([0.0] * 200, [0.0] * 100 + [1.0] * 100)
    picked = chosen(RandomRouter(count=100, seed=1), batch)
    assert 25 < sum(k < 100 for k in picked) < 75


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ThresholdRouter(math.nan), "threshold"),
        (lambda: ThresholdRouter(0.0, by="rank_sum"), "rank_sum"),
        (lambda: ThresholdRouter(0.0, by="entropy"), "entropy"),
        (lambda: BudgetRouter(count=1, by="entropy"), "entropy"),
        (lambda: rank_score(FOUR, "entropy"), "entropy"),
        (lambda: BudgetRouter(), "exactly one"),
        (lambda: BudgetRouter(0.5, 3), "exactly one"),
        (lambda: BudgetRouter(-0.1), "fraction"),
        (lambda: BudgetRouter(1.1), "fraction"),
        (lambda: BudgetRouter(math.nan), "fraction"),
        (lambda: BudgetRouter(count=-1), "count"),
        (lambda: RandomRouter(), "exactly one"),
        (lambda: RandomRouter(2.0), "fraction"),
    ],
)
def test_bad_settings(make, named):
    with pytest.raises(InputError, match=named):
        make()


@pytest.mark.parametrize("by", ["u", "margin", "error_probability", "novelty", "rank_sum"])
def test_what_nothing_is_known_of_is_first_by_every_score(by):
    """A silent pair has g = 0 and u = Inf; its novelty, whatever it is, is that of a row put in its place."""
    inf = math.inf
    columns = {"novelty": torch.tensor([0.9, 0.1, 0.8])}
    pairs = Candidates(
        torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, inf, 1.0]), torch.tensor([1.0, inf, 1.2]), columns
    )
    assert rank_score(pairs, by).tolist()[1] == inf
    assert BudgetRouter(count=1, by=by).select(pairs).tolist() == [False, True, False]
    learned = rank_score(pairs, lambda _candidates: torch.tensor([0.5, 0.1, 0.9]))
    assert learned.tolist() == [0.5, inf, pytest.approx(0.9)]
