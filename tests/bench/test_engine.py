"""The suite that holds the engine against its kernel: what it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmcore.bench import engine as suite
from rmcore.bench.harness import Limits
from rmcore.bench.setup import Setup
from rmcore.engine import RewardEngine
from rmcore.head import FrozenHead


@pytest.fixture
def setup() -> Setup:
    return Setup(torch.device("cpu"), Limits(1e9, "copy"), ((64, 64),), (1,), (torch.float32,), 0.0)


class Clock:
    """A clock that only what is measured moves: 1 s a kernel, and ``around`` more for the call it is part of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, around: float) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(suite.time, "perf_counter", lambda: self.now)
        self._charge(monkeypatch, FrozenHead, "score_pairs", 1.0)
        self._charge(monkeypatch, RewardEngine, "score_hidden", around)

    def _charge(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, seconds: float) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def charged(*arguments: Any, **more: Any) -> Any:
            self.calls.append(name)
            self.now += seconds
            return inner(*arguments, **more)

        monkeypatch.setattr(owner, name, charged)


@pytest.mark.parametrize(("around", "within"), [(0.25, True), (0.5, False)])
def test_a_row_a_shape_with_both_times_of_one_run_and_their_ratio(
    around: float, within: bool, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    clock = Clock(monkeypatch, around)
    rows = []
    for row in suite.engine(setup):
        rows.append(row)
        # The call contains one kernel, and takes turns with the kernel alone.
        assert clock.calls == ["score_pairs", "score_hidden", "score_pairs"] * (len(clock.calls) // 3)
        assert len(clock.calls) // 3 >= 1 + 7
        clock.calls.clear()
    assert [(row["groups"], row["k"]) for row in rows] == list(suite.SHAPES)
    for row in rows:
        assert row["kernel_s"] == 1.0
        assert row["median_s"] == 1.0 + around
        assert row["ratio"] == row["median_s"] / row["kernel_s"]
        assert row["within_bound"] == within == (row["ratio"] <= suite.MOST)
        assert (row["h"], row["rows"]) == (suite.HIDDEN_SIZE, row["groups"] * row["k"])
    assert torch.get_num_threads() == threads
