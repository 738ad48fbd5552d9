"""The suite that holds the engine against its kernel: what it reports."""

from __future__ import annotations

import pytest
import torch

from rmcore.bench.engine import HIDDEN_SIZE, SHAPES, engine
from rmcore.bench.harness import Limits
from rmcore.bench.setup import Setup


def test_a_row_a_shape_with_both_times_and_their_ratio():
    threads = torch.get_num_threads()
    limits = Limits(1e9, "copy")
    setup = Setup(torch.device("cpu"), limits, ((64, 64),), (1,), (torch.float32,), 0.0)
    rows = list(engine(setup))
    assert [(row["groups"], row["k"]) for row in rows] == list(SHAPES)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["median_s"] / row["kernel_s"])
        assert (row["h"], row["rows"]) == (HIDDEN_SIZE, row["groups"] * row["k"])
        # The bound is 1.3, on a quiet machine; here only what a loop over pairs would bring is excluded.
        assert 0 < row["ratio"] < 4
    assert torch.get_num_threads() == threads
