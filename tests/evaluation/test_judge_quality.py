"""Judges measured without answers: orders, repetitions, Dawid & Skene."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.judge_quality import Vote, dawid_skene, judge_quality


def table(accuracies, items=600, ties=0.0, missing=0.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(items) < 0.5, 1.0, -1.0)
    right = rng.random((items, len(accuracies))) < np.array(accuracies)
    votes = np.where(right, truth[:, None], -truth[:, None])
    votes[rng.random(votes.shape) < ties] = 0.0
    votes[rng.random(votes.shape) < missing] = np.nan
    return votes, truth


@pytest.mark.parametrize(("ties", "missing"), [(0.0, 0.0), (0.2, 0.5)])
def test_accuracies_are_found_from_votes_alone(ties, missing):
    accuracies = (0.9, 0.8, 0.7, 0.6)
    votes, truth = table(accuracies, items=3000, ties=ties, missing=missing)
    found = dawid_skene(votes)
    expected = np.array(accuracies) * (1 - ties) + ties / 2
    assert np.abs(found.accuracy - expected).max() < 0.05
    weighed = ((found.answer > 0.5) == (truth > 0)).mean()
    majority = 0.5 + 0.5 * (np.sign(np.nansum(votes, 1)) * truth).mean()
    assert weighed > majority
    assert np.abs(found.tied - ties).max() < 0.05


def test_a_likelihood_that_does_not_fall_and_a_weight_is_a_repetition():
    votes, _ = table((0.9, 0.7, 0.6), items=80, missing=0.2)
    steps = [dawid_skene(votes, max_iterations=n).log_likelihood for n in (1, 2, 4, 8, 50)]
    assert all(b >= a - 0.05 for a, b in itertools.pairwise(steps))  # EM climbs likelihood times prior
    twice = dawid_skene(np.concatenate([votes, votes[:40]]))
    weighed = dawid_skene(votes, weight=[2] * 40 + [1] * 40)
    assert np.abs(twice.right - weighed.right).max() < 1e-6
    turned = dawid_skene(-votes)
    assert np.allclose(turned.answer, 1 - dawid_skene(votes).answer)
    for wrong in (np.zeros(3), [[0.5]], [[np.nan]]):
        with pytest.raises(InputError, match="votes"):
            dawid_skene(wrong)


def test_orders_repetitions_and_agreement_are_counted_as_they_are():
    votes = []
    for k in range(100):
        better = 1.0 if k % 2 else -1.0
        for judge in ("steady", "third", "fourth"):
            votes += [Vote(str(k), judge, first, better) for first in (True, False)]
        # Prefers whatever is shown first, but for every fourth pair.
        votes += [
            Vote(str(k), "leaning", first, better if k % 4 == 0 else (1.0 if first else -1.0))
            for first in (True, False)
        ]
        votes += [Vote(str(k), "moody", True, better if n < 2 else -better) for n in range(3)]
    report = judge_quality(votes, replicates=50)
    by = {judge.judge: judge for judge in report.judges}
    assert by["steady"].order_consistency.point == 1
    assert by["steady"].first_shown.point == 0
    assert by["leaning"].order_consistency.point == 0.25
    assert by["leaning"].first_shown.point == pytest.approx(0.375)
    assert by["moody"].self_consistency.point == pytest.approx(1 / 3)
    assert by["moody"].order_consistency is None
    assert by["steady"].self_consistency is None
    assert by["steady"].accuracy.point > 0.97 > by["leaning"].accuracy.point > 0.55
    assert report.agreement["steady", "moody"] == (100, 1.0)
    assert report.agreement["steady", "leaning"] == (25, 1.0)
    json.dumps(report.to_dict(), allow_nan=False)
    for word in ("| steady |", "37.5", "votes of three judges or more"):
        assert word in report.to_markdown()


def test_two_judges_tell_no_accuracy_and_nothing_hostile_reaches_the_table():
    votes = [Vote("p", name, True, 1.0) for name in ("one", "two\x1b[31m|x")]
    report = judge_quality(votes)
    assert report.shared == 0
    assert all(judge.accuracy is None for judge in report.judges)
    assert "\x1b" not in report.to_markdown()
    assert "|x" not in report.to_markdown()
    with pytest.raises(InputError, match="none"):
        judge_quality([])
    with pytest.raises(InputError, match=r"votes\[0\]"):
        judge_quality([Vote("p", "j", True, 2.0)])
