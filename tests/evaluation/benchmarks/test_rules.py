"""Scoring rules on numbers worked by hand, and against the benchmark's own package where it can be imported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark, ppe, rewardbench, rewardbench2, rm_bench
from rmcore.evaluation.benchmarks.item import Benchmark, CountedPairs, Item, half_point
from rmcore.evaluation.benchmarks.judgebench import group_of
from rmcore.evaluation.benchmarks.scoring import score_lines


def item(quality: Sequence[float], subset: str, own: str = "1", prompt: str = "p") -> Item:
    return Item(own, prompt, tuple(map(str, range(len(quality)))), tuple(map(float, quality)), subset)


def scored(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[Sequence[float]], **options: Any
) -> dict[str, float]:
    """Score names → scores, from each response's own score."""
    own = [np.array(row, dtype=float) for row in scores]
    margin = np.array([s[i] - s[j] for s, each in zip(own, items, strict=True) for i, j in each.pairs], dtype=float)
    lines = score_lines(benchmark, CountedPairs(tuple(items)), margin, own, replicates=0, **options)
    return {line.name: line.score for line in lines}


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
    assert (found["Accuracy"], found["Knowledge"], found["Coding"]) == (pytest.approx(3.5 / 5), 0.5, 0.5)
    assert found["mmlu-pro-math"] == 0.0


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


# -- against the project's own functions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    """``rewardbench.utils``; it pins old versions of what it imports, so few environments have it."""
    try:
        import rewardbench.utils as utils
    except ImportError as error:
        pytest.skip(f"rewardbench cannot be imported here, its functions are not compared with ours ({error})")
    return utils


def test_sections_as_rewardbench_has_them(package: Any) -> None:
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING

    assert EXAMPLE_COUNTS == rewardbench.COUNTS
    rng = np.random.default_rng(2)
    for names in (list(EXAMPLE_COUNTS), ["math-prm", "hep-js", "donotanswer"]):
        items = [item([1, 0], name) for name in names for _ in range(5)]
        scores = rng.normal(size=(len(items), 2))
        found = scored(rewardbench.BENCHMARK, items, scores.tolist())
        credit = half_point(scores[:, 0] - scores[:, 1]).reshape(-1, 5).mean(axis=1)
        theirs = package.calculate_scores_per_section(
            EXAMPLE_COUNTS, SUBSET_MAPPING, dict(zip(names, credit.tolist(), strict=True))
        )
        for section, value in theirs.items():
            assert found.get(section, 0.0) == pytest.approx(value, abs=1e-9)


def test_best_of_four_as_rewardbench_has_it(package: Any) -> None:
    from datasets import Dataset

    rng = np.random.default_rng(3)
    items = [item([1, 0, 0, 0], "Focus") for _ in range(60)]
    scores = rng.integers(0, 4, (60, 4)).astype(float)
    flat = Dataset.from_dict({"text": ["t"] * 240, "scores": scores.ravel().tolist(), "subset": ["Focus"] * 240})
    theirs = package.reroll_and_score_dataset(flat, [4] * 60)["results"]
    assert scored(rewardbench2.BENCHMARK, items, scores.tolist())["Focus"] == pytest.approx(np.mean(theirs), abs=1e-9)


def test_ties_as_rewardbench_has_them(package: Any) -> None:
    rng = np.random.default_rng(4)
    for trial in range(20):
        items, rows, scores = [], [], []
        for kind, number in [("ref", 1), ("tied", 1), ("tied", 2), ("ref", 3), ("tied", 3), ("ref", 4), ("tied", 4)]:
            right = 1 if kind == "ref" or number == 4 else int(rng.integers(2, 5))
            quality = [1] * right + [0] * int(rng.integers(1, 4))
            own = (rng.normal(size=len(quality)) if trial % 2 else rng.integers(0, 4, len(quality))) + np.array(quality)
            items.append(item(quality, "Ties", f"{kind}:{number}"))
            rows.append({"id": f"{kind}:{number}", "scores": own.tolist(), "num_correct": right})
            scores.append(own)
        assert rewardbench2.ties_score(items, scores)[0] == pytest.approx(
            package.process_single_model(rows)[1], abs=1e-9
        )
