"""The row layout of pairs, against loops that write it out."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import ops
from rmcore.ops.pair_layout import PairLayout, squares

SIZES = st.lists(st.integers(0, 6), max_size=7)
EXAMPLES = [[], [0], [1], [2], [0, 0], [1, 1, 1], [2, 2], [3, 3, 3], [0, 2, 0], [1, 3, 1, 5], [5, 2, 0, 1, 2, 5]]


def written_out(sizes: list[int]) -> list[tuple[int, int, int, int, int]]:
    """(group, i, j, first, second) of every pair, in order."""
    pairs, start = [], 0
    for group, k in enumerate(sizes):
        pairs += [(group, i, j, start + i, start + j) for i, j in combinations(range(k), 2)]
        start += k
    return pairs


def check_columns(sizes: list[int]) -> None:
    layout = PairLayout(sizes)
    pairs = written_out(sizes)
    columns = (layout.group, layout.i, layout.j, layout.first, layout.second)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == pairs
    assert all(column.dtype == torch.int64 and column.shape == (len(pairs),) for column in columns)
    assert (len(layout), layout.pairs, layout.responses) == (len(sizes), len(pairs), sum(sizes))
    assert layout.pair_counts.tolist() == [k * (k - 1) // 2 for k in sizes]
    assert layout.starts.tolist() == [sum(sizes[:group]) for group in range(len(sizes))]
    assert [layout.row(group, i, j) for group, i, j, _, _ in pairs] == list(range(len(pairs)))


@pytest.mark.parametrize("sizes", EXAMPLES, ids=str)
def test_columns(sizes):
    check_columns(sizes)


@given(SIZES)
def test_columns_of_any_groups(sizes):
    check_columns(sizes)


def test_sizes_may_be_a_tensor():
    assert PairLayout(torch.tensor([3, 0, 2])).second.tolist() == PairLayout([3, 0, 2]).second.tolist() == [1, 2, 2, 4]


@given(SIZES)
def test_hidden_rows_of_difference_mode_are_the_responses(sizes):
    layout = PairLayout(sizes)
    assert layout.row_counts("difference").tolist() == sizes
    rows = layout.pair_rows("difference")
    assert rows.shape == (layout.pairs, 2)
    assert [tuple(row) for row in rows.tolist()] == [(first, second) for *_, first, second in written_out(sizes)]


@given(SIZES)
def test_hidden_rows_of_concat_mode_are_ordered_pairs_row_major(sizes):
    layout = PairLayout(sizes)
    place = {}
    for group, k in enumerate(sizes):
        for i, j in permutations(range(k), 2):  # in lexicographic order
            place[group, i, j] = len(place)
    assert layout.row_counts("concat").tolist() == [k * (k - 1) for k in sizes]
    found = [tuple(row) for row in layout.pair_rows("concat").tolist()]
    assert found == [(place[group, i, j], place[group, j, i]) for group, i, j, _, _ in written_out(sizes)]
    assert sorted(row for both in found for row in both) == list(range(len(place)))  # every row belongs to one pair


@given(SIZES)
def test_hidden_rows_of_one_order_are_the_pairs_themselves(sizes):
    layout = PairLayout(sizes)
    assert layout.row_counts("concat", one_order=True).tolist() == [k * (k - 1) // 2 for k in sizes]
    assert layout.pair_rows("concat", one_order=True).tolist() == [[row] for row in range(layout.pairs)]


@given(SIZES, st.sampled_from([-1, 1]))
def test_squares_and_back(sizes, sign):
    layout = PairLayout(sizes)
    column = torch.arange(1.0, layout.pairs + 1)
    made: dict[int, torch.Tensor] = {}
    for block in layout.blocks:
        of_block = squares(column, block, sign=sign, diagonal=7.0)
        assert of_block.shape == (len(block.groups), block.size, block.size)
        made |= dict(zip(block.groups.tolist(), of_block, strict=True))
    assert sorted(made) == list(range(len(sizes)))  # each group in exactly one block
    for group, square in made.items():
        assert square.diagonal().tolist() == [7.0] * sizes[group]
        above = square.triu(1)
        assert torch.equal(square.tril(-1), sign * above.T)
    assert torch.equal(layout.flat([made[group] for group in range(len(sizes))]), column)


@given(SIZES)
def test_blocks_say_where_their_responses_and_pairs_are(sizes):
    layout = PairLayout(sizes)
    for block in layout.blocks:
        assert {sizes[group] for group in block.groups.tolist()} == {block.size}
        if block.responses is None or block.pairs is None:
            assert block.responses is block.pairs is None
            assert len(layout.blocks) == 1
            continue
        for group, responses, pairs in zip(block.groups.tolist(), block.responses, block.pairs, strict=True):
            start = sum(sizes[:group])
            assert responses.tolist() == list(range(start, start + block.size))
            assert pairs.tolist() == [row for row, pair in enumerate(written_out(sizes)) if pair[0] == group]


def test_no_preference_is_zero_both_ways_and_never_minus_zero():
    (block,) = PairLayout([2]).blocks
    square = squares(torch.tensor([0.0]), block, sign=-1)
    assert torch.equal(square.signbit(), torch.zeros(1, 2, 2, dtype=torch.bool))


def test_a_column_of_booleans_keeps_its_type():
    (block,) = PairLayout([3]).blocks
    square = squares(torch.tensor([True, False, True]), block, sign=1, diagonal=False)
    assert square.tolist() == [[[False, True, False], [True, False, True], [False, True, False]]]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("sizes", [[2], [1, 3, 0, 5], [4, 4], [7]], ids=str)
def test_the_order_is_that_of_the_kernels(sizes, backend):
    """Row r of pair_variance is the layout's pair r: the differences of responses 1, 4, 16, ... are all different."""
    if ops.explain("pair_variance", "cpu", rows=1).reasons.get(backend):
        pytest.skip("not built here")
    layout = PairLayout(sizes)
    value = 4.0 ** torch.arange(layout.responses)
    one = torch.ones(1, 1)
    weights = ops.prepare(one, torch.zeros(1), torch.ones(1), one, features="linear")
    g, v = ops.pair_variance(value[:, None], layout.sizes, weights, backend=backend)
    expected = value[layout.first] - value[layout.second]
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(v, expected.square(), rtol=1e-5, atol=0)
