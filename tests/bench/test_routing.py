"""The arithmetic of the routing bench: points over random, the lead of the default, what a learning router is told."""

import numpy as np
import pytest
import torch

from rmcore.bench.routing import DEFAULT, FRACTIONS, Tally, beaten, figures_of, summary, walk
from rmcore.engine.routing import Candidates, LearnedRouter


def a_tally():
    """Four prompts of two pairs; the default finds the two pairs that a judge mends, the other router none of them."""
    tally = Tally()
    owner = tally.count([f"p{k // 2}" for k in range(8)])
    gain = np.array([1.0, 0, 0, 0, 0, 0, 0, 1.0])
    for q in FRACTIONS:
        tally.add(DEFAULT, q, owner, gain, np.array([1.0, 0, 0, 0, 0, 0, 0, 1.0]))
        for name in ("u", "margin"):
            tally.add(name, q, owner, gain, np.array([0, 1.0, 1.0, 0, 0, 0, 0, 0]))
    return tally


def test_points_over_random_and_the_lead_of_the_default():
    found = figures_of(a_tally(), replicates=50)
    # A quarter judged: the default gains 2 of 8 where random gains half a pair; the other gains none.
    assert [step["points"] for step in found[DEFAULT]["uplift"]] == [pytest.approx(100 * 1.5 / 8)] * 3
    assert found["u"]["uplift"][0]["points"] == pytest.approx(-100 * 0.5 / 8)
    assert found["u"]["lead_of_default"][0]["points"] == pytest.approx(25.0)
    streams = {"a": found, "b": found}
    total = summary(streams)
    assert total["hindsight"]["mean"] == [pytest.approx(-6.25)] * 3
    assert total[DEFAULT]["worst"] == [pytest.approx(18.75)] * 3
    always = [found["u"]["lead_of_default"][k]["low"] > 0 for k in range(3)]
    assert beaten(streams, ["u"]) == [["a", "b"] if above else [] for above in always]


def test_a_router_that_learns_is_told_after_each_chunk():
    ones = torch.ones(150, dtype=torch.float64)
    stream = Candidates(torch.randn(150, dtype=torch.float64), ones, 1.2 * ones, {})
    router = LearnedRouter(0.25)
    seconds: list[float] = []
    judged = walk(router, stream, ones, seconds)
    assert judged[:64].sum() == 16
    assert router.explain()["verdicts"] == int(judged.sum()) == 37
    assert len(seconds) == 2  # full chunks
