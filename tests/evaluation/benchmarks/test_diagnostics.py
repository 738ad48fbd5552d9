"""Calibration and length, on answers that can be worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rmcore.evaluation.benchmarks.diagnostics import diagnose
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.scoring import Answers


def answers(margin: list[float], responses: list[tuple[str, str]], u: float = 1.0) -> Answers:
    items = tuple(Item(str(k), "p", pair, (1.0, 0.0), "s") for k, pair in enumerate(responses))
    return Answers(CountedPairs(items), np.array(margin), np.full(len(margin), u), ())


def test_calibration_by_hand() -> None:
    log3 = float(np.log(3.0))
    found = diagnose(answers([log3, log3, log3, -log3], [("a", "b")] * 4))
    assert found.ece == pytest.approx(0.0, abs=1e-12), "three quarters sure, right on three of four"
    assert found.brier == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    found = diagnose(answers([2 * log3] * 4, [("a", "b")] * 4, u=2.0))
    assert found.ece == pytest.approx(0.25), "u divides the margin: three quarters sure, always right"
    silent = diagnose(answers([5.0, 5.0], [("a", "b")] * 2, u=np.inf))
    assert silent.brier == pytest.approx(0.25), "nothing is known of these pairs"


def test_length_by_hand() -> None:
    responses = [("aaa", "b"), ("a", "bbbb"), ("aa", "b"), ("a", "b")]
    found = diagnose(answers([2.0, -3.0, -1.0, 5.0], responses))
    assert found.prefers_longer == pytest.approx(2 / 3)
    assert found.longer_is_better == pytest.approx(2 / 3)
    by_length = answers([2.0, -3.0, 1.0], responses[:3])
    turned = answers([-2.0, 3.0, -1.0], [(b, a) for a, b in responses[:3]])
    assert diagnose(by_length).length_correlation == pytest.approx(1.0)
    assert diagnose(turned).length_correlation == pytest.approx(1.0), "whichever response is written first"


def test_equal_lengths_tell_nothing() -> None:
    found = diagnose(answers([1.0, -1.0], [("a", "b")] * 2))
    assert np.isnan([found.length_correlation, found.prefers_longer, found.longer_is_better]).all()
    assert "-%" in found.to_markdown()


def test_position_bias_is_told_in_concat_mode_only() -> None:
    items = tuple(Item(str(k), f"p{k}", ("a", "b"), (1.0, 0.0), "livecodebench") for k in range(4))
    margin, u = np.array([1.0, -1.0, 2.0, 0.5]), np.ones(4)
    scores = tuple(np.array([m, 0.0]) for m in margin)
    one = Answers(CountedPairs(items), margin, u, scores, position_bias=np.array([0.5, 1.5, 0.0, np.nan]))
    found = diagnose(one)
    assert (found.order_conflicts, found.first_bias) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert "contradict each other in 33.3%; being shown first adds +0.667" in found.to_markdown()
    other = diagnose(Answers(one.pairs, margin, u, scores))
    assert np.isnan(other.order_conflicts)
    assert "Position" not in other.to_markdown()
