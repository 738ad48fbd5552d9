"""The encode suite: what it draws, the work it counts, and that every variant computes the same states."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from rmcore.bench import encode as suite
from rmcore.bench.harness import Limits
from rmcore.bench.setup import Setup


def test_lengths_follow_the_quantiles():
    drawn = suite.AUTOJ.groups(4000, 2, random.Random(0))
    for values, quantiles in (
        ([prompt for prompt, _ in drawn], suite.AUTOJ.prompt),
        ([y for _, ys in drawn for y in ys], suite.AUTOJ.response),
    ):
        assert max(values) == quantiles[-1]
        assert statistics.median(values) == pytest.approx(quantiles[10], rel=0.1)
    # Two responses to a prompt go together more than a prompt and a response do.
    ranks = torch.tensor([[prompt, *ys] for prompt, ys in drawn]).argsort(0).argsort(0).double()
    correlation = torch.corrcoef(ranks.mT)
    assert correlation[1, 2] > 0.5
    assert 0.05 < correlation[0, 1] < 0.25


def test_fixed_lengths():
    assert suite.FIXED.groups(2, 3, random.Random(0)) == [(512, [512, 512, 512])] * 2


def test_few_groups_are_spread_evenly():
    (low, _), (high, _) = sorted(suite.AUTOJ.groups(2, 4, random.Random(1)))
    assert (low, high) == (suite.AUTOJ.prompt[5], suite.AUTOJ.prompt[15])


def test_flop_of_rows_and_of_their_tree():
    shape = suite.Shape("tiny", 8, 2, 2, 1, 16, 50)
    assert shape.parameters == 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)
    texts = suite.draw_texts(suite.Lengths("fixed", (10,), (5,)), 3, 1, 50_000)
    assert len(texts) == 6
    per_token = 2 * shape.parameters
    rows = 6 * 20 * per_token + 4 * 2 * 8 * 6 * (20 * 21 // 2)
    # x sees 1 to 10 tokens, three y_i 11 to 15, six y_j 16 to 20.
    seen = sum(range(1, 11)) + 3 * sum(range(11, 16)) + 6 * sum(range(16, 21))
    assert suite.flop(shape, texts, packed=False) == rows
    assert suite.flop(shape, texts, packed=True) == (10 + 3 * 5 + 6 * 5) * per_token + 4 * 2 * 8 * seen


def test_every_variant_computes_the_same_states(monkeypatch):
    monkeypatch.setattr(suite, "SMALL", suite.Shape("tiny", 32, 2, 4, 2, 48, 300))
    monkeypatch.setattr(suite, "AUTOJ", suite.Lengths("autoj", (20,), (12,)))
    limits = Limits(1e9, "made up", {"float32": 1e9})
    setup = Setup(torch.device("cpu"), limits, (), (), (), 0.1, quick=True, groups=(4,))
    rows = list(suite.encode(setup))
    assert [row["variant"].split()[0] for row in rows] == ["padded", "sorted", "sorted", "rmcore"]
    assert all(row["right"] and row["error"] < 1e-5 for row in rows)
    tree, padded = rows[-1], rows[0]
    groups = tree["groups"]
    assert tree["computed_tokens"] == groups * (20 + 4 * 12 + 12 * 12)
    assert padded["computed_tokens"] == padded["flat_tokens"] == groups * 12 * 44
    assert tree["tokens_saved"] == pytest.approx(1 - 212 / 528)
    assert padded["speedup_padded"] == 1
    assert suite.encode_table(rows, {"matrix": {"float32": 1e9}}).row_count == 4
