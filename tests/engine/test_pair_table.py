"""The pair table by itself: what goes in from the kernels, who decides, and the squares that come out."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore.engine.advantage import group_rewards, rloo_advantages
from rmcore.engine.pair_table import PairState, PairTable
from rmcore.head.frozen import PairScores
from rmcore.judge.base import Verdict
from rmcore.ops.functional import Scores
from rmcore.ops.pair_layout import PairLayout

SIZES = st.lists(st.integers(1, 5), max_size=6)  # the engine refuses groups of none
EXAMPLES = [[], [1], [2], [1, 1], [3, 3], [1, 2, 4, 2]]


def columns(rows: int, seed: int = 0) -> torch.Tensor:
    """(4, rows) float32: g, v, u and p = g / u that belong together."""
    generator = torch.Generator().manual_seed(seed)
    g, v = torch.randn(rows, generator=generator), torch.rand(rows, generator=generator)
    u = (1 + v).sqrt()
    return torch.stack((g, v, u, g / u))


def difference_table(sizes: list[int]) -> PairTable:
    layout = PairLayout(sizes)
    return PairTable.of_difference(PairScores(*columns(layout.pairs)), layout)


def by_group(table: PairTable) -> list[dict[str, torch.Tensor]]:
    found = dict(table.squares())
    return [found[number] for number in range(len(table.layout))]


# -- from the kernels ------------------------------------------------------------------------------------------------


@given(SIZES)
def test_difference_mode_is_taken_over_as_it_is(sizes):
    table = difference_table(sizes)
    given_values = columns(len(table))
    assert table.values.dtype == torch.float64
    assert torch.equal(table.values, given_values.double())
    assert torch.equal(table.logit, table.values[0])
    assert torch.equal(table.variance, table.values[1])
    assert torch.equal(table.uncertainty, table.values[2])
    assert torch.equal(table.preference, table.values[3])
    assert not table.one_order
    assert table.state.tolist() == [PairState.HEAD] * len(table)


@given(SIZES)
def test_concat_mode_averages_both_orders(sizes):
    layout = PairLayout(sizes)
    order = [(group, i, j) for group, k in enumerate(sizes) for i, j in permutations(range(k), 2)]
    given_values = columns(len(order))
    row = {key: n for n, key in enumerate(order)}
    table = PairTable.of_concat(Scores(*given_values), layout, "both")
    expected = []
    for group, k in enumerate(sizes):
        for i, j in combinations(range(k), 2):
            g, v, u, p = given_values[:, row[group, i, j]].double().tolist()
            g2, v2, u2, p2 = given_values[:, row[group, j, i]].double().tolist()
            expected.append([(g - g2) / 2, (v + v2) / 2, (u + u2) / 2, (p - p2) / 2])
    assert table.values.T.tolist() == expected
    assert not table.one_order


@given(SIZES)
def test_concat_mode_with_one_order_is_flagged(sizes):
    layout = PairLayout(sizes)
    table = PairTable.of_concat(Scores(*columns(layout.pairs)), layout, "one")
    assert table.one_order
    assert torch.equal(table.values, columns(layout.pairs).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_no_answer_of_the_head_is_nan_and_infinitely_unsure(mode, bad):
    layout = PairLayout([3])
    values = columns(3 if mode == "difference" else 6)
    values[2:, 1] = bad
    if mode == "difference":
        table = PairTable.of_difference(PairScores(*values), layout)
    else:
        table = PairTable.of_concat(Scores(*values), layout, "both")  # the row of (0, 2)
    spoilt = 1
    assert math.isnan(table.preference[spoilt])
    assert table.uncertainty[spoilt] == math.inf
    others = [row for row in range(3) if row != spoilt]
    assert bool(table.values[:, others].isfinite().all())


# -- several as one, and some left out -------------------------------------------------------------------------------


@given(SIZES, st.integers(0, 6))
def test_joined_tables_are_the_table_of_all_groups(sizes, cut):
    whole = difference_table(sizes)
    head, tail = PairLayout(sizes[:cut]), PairLayout(sizes[cut:])
    parts = [PairTable(head, whole.values[:, : head.pairs]), PairTable(tail, whole.values[:, head.pairs :])]
    if head.pairs:
        parts[0].decide([0], [Verdict.none("timeout")], 0.12)
    if tail.pairs:
        parts[1].decide([tail.pairs - 1], [Verdict(-1.0)], 0.12)
        whole.decide([len(whole) - 1], [Verdict(-1.0)], 0.12)
    if head.pairs:
        whole.decide([0], [Verdict.none("timeout")], 0.12)
    joined = PairTable.joined(parts)
    assert joined.layout.sizes.tolist() == sizes
    assert torch.equal(joined.values, whole.values)
    assert torch.equal(joined.state, whole.state)
    assert joined.verdicts == whole.verdicts


def test_no_tables_are_an_empty_one():
    table = PairTable.joined([])
    assert (len(table), len(table.layout), table.values.shape) == (0, 0, (4, 0))
    assert list(table.squares()) == []


@given(SIZES, st.data())
def test_without_some_groups_the_others_are_as_before(sizes, data):
    out = data.draw(st.sets(st.integers(0, max(len(sizes) - 1, 0)))) if sizes else set()
    table = difference_table(sizes)
    left = table.without(torch.tensor(sorted(out), dtype=torch.int64))
    kept = [group for group in range(len(sizes)) if group not in out]
    assert left.layout.sizes.tolist() == [sizes[group] for group in kept]
    before = by_group(table)
    for group, squares in zip(kept, by_group(left), strict=True):
        assert all(torch.equal(before[group][name], squares[name]) for name in squares)


# -- decisions -------------------------------------------------------------------------------------------------------


def test_equal_responses_are_decided_within_their_group_only():
    table = difference_table([3, 2])
    table.decide_identical([["a", "b", "a"], ["a", "b"]])
    assert [PairState(code).name for code in table.state.tolist()] == ["HEAD", "IDENTICAL", "HEAD", "HEAD"]
    assert table.values[:, 1].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert torch.equal(table.values[:, [0, 2, 3]], columns(4)[:, [0, 2, 3]].double())
    assert table.undecided().tolist() == [0, 2, 3]


def test_text_and_messages_of_the_same_words_are_different_responses():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    other = {"type": "function", "function": {"name": "f", "arguments": '{"n": 2}'}}
    group = [[{"role": "assistant", "content": "", "tool_calls": [c]}] for c in (call, other, call)]
    table = difference_table([3])
    table.decide_identical([group])
    assert (table.state == PairState.IDENTICAL).tolist() == [False, True, False]


def test_a_verdict_replaces_the_preference_and_no_verdict_leaves_it():
    table = difference_table([3, 2])
    head = table.preference.clone()
    verdicts = [Verdict(1.0), Verdict.none("timeout"), Verdict(0.0)]
    table.decide([0, 2, 3], verdicts, 0.12)
    assert [PairState(code).name for code in table.state.tolist()] == ["JUDGE", "HEAD", "JUDGE_FAILED", "JUDGE"]
    assert float(table.preference[0]) == pytest.approx(math.log(0.88 / 0.12))
    assert float(table.preference[3]) == 0.0
    assert torch.equal(table.preference[[1, 2]], head[[1, 2]])
    assert table.verdicts == {0: verdicts[0], 2: verdicts[1], 3: verdicts[2]}
    assert table.routed.tolist() == [True, False, True, True]
    assert table.undecided().tolist() == [1]
    assert torch.equal(table.uncertainty, columns(4)[2].double())  # the head's own, whoever decided


def test_deciding_nothing_changes_nothing():
    table = difference_table([2])
    before = table.values.clone()
    table.decide([], [], 0.12)
    assert torch.equal(table.values, before)
    assert table.state.tolist() == [PairState.HEAD]


# -- by group --------------------------------------------------------------------------------------------------------


@given(SIZES)
def test_squares_are_antisymmetric_or_symmetric_views_of_the_rows(sizes):
    table = difference_table(sizes)
    for group, squares in enumerate(by_group(table)):
        k = sizes[group]
        assert {name: tuple(square.shape) for name, square in squares.items()} == dict.fromkeys(squares, (k, k))
        assert torch.equal(squares["preference"], -squares["preference"].T)
        assert torch.equal(squares["logit"], -squares["logit"].T)
        assert torch.equal(squares["uncertainty"], squares["uncertainty"].T)
        assert torch.equal(squares["variance"], squares["variance"].T)
        assert squares["uncertainty"].diagonal().tolist() == [1.0] * k
        assert not squares["routed"].any()
        for i, j in combinations(range(k), 2):
            row = table.layout.row(group, i, j)
            values = [float(squares[name][i, j]) for name in ("logit", "variance", "uncertainty", "preference")]
            assert values == table.values[:, row].tolist()


@given(SIZES, st.sampled_from([rloo_advantages, group_rewards]))
def test_what_is_asked_of_all_groups_at_once_is_what_each_says(sizes, of_squares):
    table = difference_table(sizes)
    found = table.per_response(of_squares)
    assert found.shape == (sum(sizes),)
    alone = [of_squares(squares["preference"]) for squares in by_group(table)]
    torch.testing.assert_close(found, torch.cat([torch.empty(0, dtype=torch.float64), *alone]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sizes", EXAMPLES, ids=str)
def test_every_kind_of_group(sizes):
    table = difference_table(sizes)
    assert len(by_group(table)) == len(sizes)
    assert table.per_response(rloo_advantages).shape == (sum(sizes),)
