"""From a trainer's rows to groups: texts, runs, and refusals that say what to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.integrations.rows import GroupingError, completion_text, group_size_of_runs, split_groups


def test_completions_become_text():
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "one"}]) == "one"
    assert (
        completion_text(
            [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        )
        == "ab"
    )
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert completion_text(turns) == "Assistant: \n\nTool: 42\n\nAssistant: It is 42."


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (7, r"c: got int"),
        ([], r"c: got an empty list"),
        (["text"], r"c\[0\]: got str"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], r"c\[0\].content: got list"),
        ([{"role": "assistant", "content": 5}], r"c\[0\].content: got int"),
    ],
)
def test_what_is_no_text_is_refused(completion, message):
    with pytest.raises(InputError, match=message):
        completion_text(completion, "c")


@given(st.integers(1, 5), st.integers(1, 6))
def test_runs_give_the_group_size(groups, size):
    keys = [g for g in range(groups) for _ in range(size)]
    assert group_size_of_runs(keys) == size
    assert split_groups(keys, size) == [range(g * size, (g + 1) * size) for g in range(groups)]


def test_uneven_runs_are_refused():
    with pytest.raises(GroupingError, match=r"runs of \[2, 1\].*num_generations.*prompt_id"):
        group_size_of_runs(["a", "a", "b"])


def test_partial_and_mixed_groups_are_refused_with_the_setting():
    with pytest.raises(GroupingError, match=r"got 3 rows, expected a multiple of num_generations = 2. Change x"):
        split_groups(["a", "a", "b"], 2, setting="Change x")
    with pytest.raises(GroupingError, match=r"different prompts in rows 2 and 3.*2 rows of group 1"):
        split_groups(["a", "a", "b", "c"], 2)
    with pytest.raises(InputError, match="num_generations: got 0"):
        split_groups([], 0)
    assert split_groups([], 3) == []
