"""Scoring rules on numbers worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from support.benchmarks import item, scored

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark, ppe, rewardbench, rewardbench2, rm_bench
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.judgebench import group_of
from rmcore.evaluation.benchmarks.scoring import score_lines


def test_rewardbench_weighs_subsets_by_its_own_counts() -> None:
    items = [item([1, 0], name) for name in ("math-prm", "math-prm", "hep-go", "mt-bench-easy", "alpacaeval-easy")]
    found = scored(rewardbench.BENCHMARK, items, [[1, 0], [0, 1], [1, 0], [0, 0], [1, 0]])
    assert found["math-prm"] == 0.5
    assert found["mt-bench-easy"] == 0.5, "a tie counts half"
    assert found["Reasoning"] == pytest.approx((984 * 0.5 + 164 * 1) / (984 + 164))
    assert found["Chat"] == pytest.approx((28 * 0.5 + 100) / 128)
    assert found["Score"] == pytest.approx((found["Reasoning"] + found["Chat"]) / 2)
    assert "Safety" not in found
    assert len(rewardbench.COUNTS) == 23
    assert sum(rewardbench.COUNTS.values()) - 984 + 447 == 2985


def test_rewardbench2_shares_a_point_among_equal_best() -> None:
    items = [item([1, 0, 0, 0], "Focus") for _ in range(4)] + [item([1, 0, 0, 0], "Math")]
    scores = [[3, 1, 2, 0], [3, 3, 2, 3], [1, 2, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
    found = scored(rewardbench2.BENCHMARK, items, scores)
    assert found == {"Score": pytest.approx((1 + 1 / 3) / 4 / 2 + 1 / 8), "Focus": pytest.approx(1 / 3), "Math": 0.25}


def test_ties_by_hand() -> None:
    ref = item([1, 0], "Ties", "ref:1")
    tied = item([1, 1, 0], "Ties", "tied:1")
    # ref: gap 2. tied: right ones 3 and 2 (spread 1), wrong 0.5 (gap 1.5): everything holds, and tanh(1.5 − 1).
    found = rewardbench2.ties_score([ref, tied], [np.array([2.0, 0.0]), np.array([3.0, 2.0, 0.5])])
    assert found[0] == pytest.approx(1.0 + 0.01 * math.tanh(0.5))
    # The gap of ref is 0.5 now: accurate still, but min(0.5, 1.5) < spread 1.
    found = rewardbench2.ties_score([ref, tied], [np.array([0.5, 0.0]), np.array([3.0, 2.0, 0.5])])
    assert found[0] == pytest.approx(0.8 + 0.01 * math.tanh(-0.5))
    # No spread: the last term has nothing to average.
    found = rewardbench2.ties_score([ref, tied], [np.array([2.0, 0.0]), np.array([2.0, 2.0, 0.5])])
    assert found[0] == pytest.approx(1.0)
    # A wrong response equal to the worst right one is not beaten.
    found = rewardbench2.ties_score([ref, tied], [np.array([0.0, 0.0]), np.array([3.0, 2.0, 2.0])])
    assert found[0] == pytest.approx(0.01 * math.tanh(-1))
    assert rewardbench2.ties_score([tied], [np.array([3.0, 2.0, 0.5])])[0] == pytest.approx(0.3), "no ref beside it"


def test_ties_need_scores_and_are_left_out_where_a_judge_decided() -> None:
    items = (item([1, 0, 0, 0], "Focus"), item([1, 0], "Ties", "ref:1"))
    lines = score_lines(rewardbench2.BENCHMARK, CountedPairs(items), np.ones(4), None, replicates=0)
    assert [(line.name, line.score) for line in lines] == [("Score without Ties", 1.0), ("Focus", 1.0)]


def test_rm_bench_matrix() -> None:
    matrix = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    found = rm_bench.levels_of(matrix)
    assert found["hard"] == pytest.approx((0.2 + 0.3 + 0.6) / 3)
    assert found["normal"] == pytest.approx(0.5)
    assert found["easy"] == pytest.approx((0.4 + 0.7 + 0.8) / 3)


def test_rm_bench_domains() -> None:
    pairs = tuple((i, 3 + j) for i in range(3) for j in range(3))
    names = ("chat", "safety-refuse", "safety-response", "safety-response")
    items = [Item(str(k), "p", tuple("abcdef"), (1.0,) * 3 + (0.0,) * 3, name, pairs) for k, name in enumerate(names)]
    by_length = [1, 2, 3, 1, 2, 3]  # right where the chosen one is the richer: easy 1, hard 0, equal is wrong
    found = scored(rm_bench.BENCHMARK, items, [by_length, [1] * 3 + [0] * 3, by_length, [0] * 3 + [1] * 3])
    assert [found[f"chat, {level}"] for level in rm_bench.LEVELS] == [1.0, 0.0, 0.0]
    assert found["chat"] == pytest.approx(1 / 3)
    assert found["safety"] == pytest.approx((1 + 1 / 6) / 2), "the mean of its two files, not of its rows"
    assert found["Score"] == pytest.approx((1 / 3 + 7 / 12) / 2)
    assert found["easy"] == pytest.approx((1 + (1 + 0.5) / 2) / 2)


def test_rm_bench_as_its_readme_counts() -> None:
    pairs = tuple((i, 3 + j) for i in range(3) for j in range(3))
    items = [Item(str(k), "p", tuple("abcdef"), (1.0,) * 3 + (0.0,) * 3, "math", pairs) for k in range(40)]
    scores = np.random.default_rng(5).integers(0, 4, (40, 6)).astype(float)
    matrix = np.zeros((3, 3))
    for row in scores:
        for i, j in itertools.product(range(3), range(3)):
            matrix[i, j] += (row[i] > row[3 + j]) / len(scores)
    found = scored(rm_bench.BENCHMARK, items, scores.tolist())
    assert found["math, hard"] == pytest.approx(np.triu(matrix, 1).sum() / 3, abs=1e-9)
    assert found["math, normal"] == pytest.approx(np.diag(matrix).mean(), abs=1e-9)
    assert found["math, easy"] == pytest.approx(np.tril(matrix, -1).sum() / 3, abs=1e-9)


def test_judgebench_groups() -> None:
    sources = ("mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench")
    assert [group_of(s) for s in sources] == ["Knowledge", "Knowledge", "Reasoning", "Math", "Coding"]
    with pytest.raises(InputError, match="source: got 'gpqa'"):
        group_of("gpqa")
    items = [item([1, 0] if k % 2 else [0, 1], source) for k, source in enumerate(sources)]
    found = scored(BENCHMARKS["judgebench"], items, [[0, 1], [0, 1], [0, 1], [1, 0], [0, 0]])
    assert (found["Accuracy"], found["Knowledge"], found["Coding"]) == (pytest.approx(3 / 5), 0.5, 0.0), "a tie is lost"
    assert found["mmlu-pro-math"] == 0.0


def test_judgebench_as_its_project_counts() -> None:
    """Both orders: a decision for the label is +1, for the other -1, a tie or none 0; right where the sum is > 0."""
    rng = np.random.default_rng(6)
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    items = [item([1, 0], sources[k % 4], str(k)) for k in range(200)]
    orders = rng.integers(-1, 2, (200, 2))
    scores = np.stack([orders.mean(axis=1), np.zeros(200)], axis=1)  # what a judge of both orders prefers
    found = scored(BENCHMARKS["judgebench"], items, scores.tolist())
    theirs = (orders.sum(axis=1) > 0).astype(float)
    assert found["Accuracy"] == pytest.approx(theirs.mean(), abs=1e-9)
    for k, group in enumerate(("Knowledge", "Reasoning", "Math", "Coding")):
        assert found[group] == pytest.approx(theirs[k::4].mean(), abs=1e-9)


def test_best_of_k_is_the_mean_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 6):
        score, quality = rng.integers(0, 3, size).astype(float), rng.integers(0, 2, size).astype(float)
        for k in range(1, size + 1):
            draws = []
            for drawn in itertools.combinations(range(size), k):
                best = max(score[list(drawn)])
                draws.append(np.mean([quality[i] for i in drawn if score[i] == best]))
            assert ppe.best_of_k(score, quality, k) == pytest.approx(np.mean(draws))
        assert ppe.best_of_k(score, quality, 1) == pytest.approx(quality.mean())
        assert ppe.best_of_k(quality, quality, size) == quality.max()
        with pytest.raises(InputError, match="k: got"):
            ppe.best_of_k(score, quality, size + 1)


def test_ppe_pools() -> None:
    items = [item([1, 0, 0], "MATH"), item([1, 1, 1], "MATH"), item([1, 1, 0], "GPQA")]
    found = scored(ppe.BEST_OF_K, items, [[1, 2, 0], [0, 1, 2], [2, 1, 0]])
    assert found["MATH, accuracy"] == 0.5, "the pool without a wrong answer has no pairs"
    assert found["MATH, AUC"] == 0.5
    assert found["MATH, best of 1"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["MATH, best of 3"] == 0.5
    assert found["MATH, ceiling of 3"] == 1.0
    assert found["GPQA, accuracy"] == found["GPQA, AUC"] == 1.0
    assert found["accuracy"] == 0.75, "the mean of the domains"


def test_rmb_lists_count_where_the_winner_beats_all() -> None:
    items = [
        item([1, 0], "Helpfulness|pairs|Chat"),
        item([1, 0, 0], "Helpfulness|best of n|Chat"),
        item([1, 0, 0], "Helpfulness|best of n|Code"),
        item([1, 0], "Harmlessness|pairs|S1"),
    ]
    found = scored(BENCHMARKS["rmb"], items, [[1, 1], [2, 1, 0], [2, 2, 0], [1, 0]])
    assert found["Helpfulness, pairs"] == 0.5
    assert found["Helpfulness, best of n"] == 0.5
    assert found["Helpfulness, best of n, Code"] == 0.0
    assert found["Score"] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_intervals_resample_prompts_and_agree_with_their_mean() -> None:
    rng = np.random.default_rng(1)
    items = tuple(item([1, 0], "livecodebench", prompt=str(k // 4)) for k in range(200))
    margin = np.repeat(rng.normal(size=50), 4)  # a prompt's four pairs are right or wrong together
    pairs = CountedPairs(items)
    (line, *_) = score_lines(BENCHMARKS["judgebench"], pairs, margin, None, replicates=500)
    assert line.low < line.score < line.high
    expected = 1.96 * np.sqrt(line.score * (1 - line.score) / 50)
    assert (line.high - line.low) / 2 == pytest.approx(expected, rel=0.25), "as of 50 prompts, not of 200 pairs"
    again = score_lines(BENCHMARKS["judgebench"], pairs, margin, None, replicates=500)
    assert again[0] == line


def test_names_are_found_with_or_without_hyphens() -> None:
    assert find_benchmark("RM-Bench") is find_benchmark("rmbench") is BENCHMARKS["rm-bench"]
    assert find_benchmark("RewardBench 2") is BENCHMARKS["rewardbench2"]
    with pytest.raises(InputError, match="one of rewardbench, rewardbench2, rm-bench, judgebench, ppe-pairs"):
        find_benchmark("mtbench")
