"""What papers print stands beside ours, marked as theirs."""

from __future__ import annotations

import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.published import PUBLISHED, ROUTED, published_budgets, published_note


def test_the_routing_tables_have_the_shares_that_the_paper_prints() -> None:
    assert [round(100 * share, 1) for share in published_budgets("rewardbench")] == [1.9, 9.2, 24.1, 42.5]
    # Of 11,943 pairs 1,285 are 10.76%: printed as 10.7.
    assert [round(100 * share, 1) for share in published_budgets("rm-bench")] == [2.0, 10.8, 26.7, 44.1]
    assert set(PUBLISHED) | set(ROUTED) <= set(BENCHMARKS)
    with pytest.raises(InputError, match="'published' for rmb, expected one of rewardbench, rm-bench"):
        published_budgets("rmb")


def test_they_are_marked_as_theirs_and_other_rows_are_told() -> None:
    told = published_note("rewardbench", 2985)
    assert "| URM, score | 92.9 | published, not measured here: arXiv:2410.00847 |" in told
    assert "58 (1.9%), 274 (9.2%)" in told
    assert "not the same rows" not in told
    assert "not the same rows" in published_note("rewardbench", 419)
    assert published_note("rmb", 10) == ""
