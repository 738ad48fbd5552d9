"""Accuracy by subset and by row: of best-of-n rows, every chosen response must beat every rejected one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import DataError, InputError
from rmcore.evaluation.subsets import accuracy_by_subset, subsets_to_markdown
from rmcore.model.data import read_preference_rows


def test_a_row_is_right_if_all_its_pairs_are() -> None:
    logit, label = np.array([1.0, 2.0, -1.0, 3.0, 0.0, 5.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    parts = accuracy_by_subset(logit, label, [1, 1, 2, 2, 3, 4], ["a", "a", "b", "b", None, "c"])
    assert [(p.name, p.n_pairs, p.accuracy, p.n_rows, p.row_accuracy) for p in parts] == [
        ("a", 2, 1.0, 1, 1.0),
        ("b", 2, 0.5, 1, 0.0),
        ("-", 1, 0.5, 1, 0.5),
        ("all", 5, 0.7, 3, 0.5),
    ]
    assert "| b | 2 | 50.0% | 1 | 0.0% |" in subsets_to_markdown(parts)


pairs = st.tuples(st.floats(-3, 3), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5), st.sampled_from(["a", None]))


@given(st.lists(pairs, min_size=1, max_size=30))
def test_subsets_add_up_to_all(data: list[tuple[float, float, int, str | None]]) -> None:
    logit, label, row, _ = (np.array(column) for column in zip(*data, strict=True))
    subsets = ["a" if number % 2 else None for number in row]  # a row is of one subset
    parts = accuracy_by_subset(logit.astype(float), label.astype(float), row.tolist(), subsets)
    if not parts:
        assert set(label) == {0.5}
        return
    *some, whole = parts
    for count, share in (("n_pairs", "accuracy"), ("n_rows", "row_accuracy")):
        assert sum(getattr(p, count) for p in some) == getattr(whole, count)
        summed = sum(getattr(p, count) * getattr(p, share) for p in some)
        assert summed == pytest.approx(getattr(whole, count) * getattr(whole, share))
    assert all(p.row_accuracy <= 1 for p in parts)


def test_rows_keep_their_subset() -> None:
    row = {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}
    for more, expected in (
        ({"subset": "Ties"}, "Ties"),
        ({"section": "chat"}, "chat"),
        ({"subset": None, "section": 3}, "3"),
        ({"subset": ""}, None),
        ({}, None),
    ):
        (found,) = read_preference_rows([{**row, **more}])
        assert (found.subset, len(found.pairs), found.number) == (expected, 2, 1)
    (found,) = read_preference_rows([{**row, "domain": "math"}], {"subset": "domain"})
    assert found.subset == "math"
    for bad in (True, 1.5, ["a"], {"a": 1}):
        with pytest.raises(DataError, match="subset: got"):
            list(read_preference_rows([{**row, "subset": bad}]))


def test_lengths_are_checked() -> None:
    with pytest.raises(InputError, match="lengths"):
        accuracy_by_subset(np.zeros(2), np.zeros(2), [1], [None, None])
