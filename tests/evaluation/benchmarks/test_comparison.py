"""Models side by side: what they share cancels in the intervals of their differences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.comparison import compare
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.scoring import Answers, score_lines

JUDGEBENCH = BENCHMARKS["judgebench"]


def answers(margin: np.ndarray) -> Answers:
    items = tuple(Item(str(k), f"p{k}", ("a", "b"), (1.0, 0.0), "livecodebench") for k in range(len(margin)))
    return Answers(CountedPairs(items), margin, np.ones(len(margin)), tuple(np.array([m, 0.0]) for m in margin))


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    better = base.copy()
    better[:10] = np.abs(better[:10]) + 1  # right on ten prompts on which the first may be wrong
    corrected = int((base[:10] < 0).sum())
    assert corrected > 2
    found = compare(JUDGEBENCH, {"a": answers(base), "b": answers(better), "c|d": answers(base)}, replicates=400)
    line = found.lines[0]
    assert line.scores[1] - line.scores[0] == pytest.approx(corrected / 200)
    assert 0 < line.low[1] < corrected / 200 < line.high[1]
    own = score_lines(JUDGEBENCH, answers(base).pairs, base, None, replicates=400)[0]
    assert line.high[1] - line.low[1] < 0.6 * (own.high - own.low), "what they share cancels"
    assert (line.low[2], line.high[2]) == (0.0, 0.0), "a model against itself"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["models"] == ["a", "b", "c|d"]
    table = found.to_markdown()
    assert "| a | b | − a, points | c\\|d | − a, points |" in table
    assert f"+{100 * corrected / 200:.1f} [" in table


def test_without_intervals_and_with_other_items() -> None:
    one = answers(np.array([1.0, -1.0]))
    found = compare(JUDGEBENCH, {"a": one, "b": answers(np.array([1.0, 1.0]))}, replicates=0)
    assert "| +50.0 |" in found.to_markdown()
    with pytest.raises(InputError, match="at least two"):
        compare(JUDGEBENCH, {"a": one})
    with pytest.raises(InputError, match="answers to other items"):
        compare(JUDGEBENCH, {"a": one, "b": answers(np.ones(3))})
