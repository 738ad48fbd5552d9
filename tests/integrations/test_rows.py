"""From a trainer's rows to groups: runs, and refusals that say what to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.integrations.rows import GroupingError, group_size_of_runs, split_groups


@given(st.integers(1, 5), st.integers(2, 6))
def test_runs_give_the_group_size(groups, size):
    keys = [g for g in range(groups) for _ in range(size)]
    assert group_size_of_runs(keys) == size
    assert split_groups(keys, size) == [range(g * size, (g + 1) * size) for g in range(groups)]


@given(st.integers(1, 6))
def test_groups_of_one_do_not_follow_from_rows(rows):
    with pytest.raises(GroupingError, match=rf"{rows} rows of as many prompts.*num_generations.*prompt_id"):
        group_size_of_runs(list(range(rows)))


def test_no_rows_are_no_groups():
    assert group_size_of_runs([]) == 0


def test_uneven_runs_are_refused():
    with pytest.raises(GroupingError, match=r"runs of \[2, 1\].*num_generations.*prompt_id"):
        group_size_of_runs(["a", "a", "b"])


@given(st.integers(2, 4), st.integers(1, 3), st.integers(2, 4))
def test_interleaved_rows_are_never_groups_of_their_runs(prompts, run, times):
    keys = [prompt for _ in range(times) for prompt in range(prompts) for _ in range(run)]
    with pytest.raises(GroupingError, match=rf"the prompt of row 0 again in row {prompts * run}, apart"):
        group_size_of_runs(keys)


def test_keys_need_not_be_hashable():
    assert group_size_of_runs([["a"], ["a"], {"b": 1}, {"b": 1}]) == 2
    with pytest.raises(GroupingError, match="again in row 2"):
        group_size_of_runs([["a"], ["b"], ["a"]])


def test_partial_and_mixed_groups_are_refused_with_the_setting():
    with pytest.raises(GroupingError, match=r"got 3 rows, expected a multiple of num_generations = 2. Change x"):
        split_groups(["a", "a", "b"], 2, setting="Change x")
    with pytest.raises(GroupingError, match=r"different prompts in rows 2 and 3.*2 rows of group 1"):
        split_groups(["a", "a", "b", "c"], 2)
    with pytest.raises(InputError, match="num_generations: got 0"):
        split_groups([], 0)
    assert split_groups([], 3) == []
