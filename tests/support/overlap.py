"""A backbone and a judge that go on when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from rmcore import RewardEngine
from rmcore.engine.routing import Reservation
from rmcore.judge.base import JudgeUsage, Pair, Verdict

__all__ = [
    "PATIENCE",
    "PROMPTS",
    "RESPONSES",
    "SCORE",
    "TEXTS",
    "WIN",
    "Backbone",
    "Books",
    "Gated",
    "HandClock",
    "engine_threads",
    "run_async",
    "wait",
]


WIN = Verdict(1.0, usage=JudgeUsage(calls=1, attempts=1, prompt_tokens=10))
PATIENCE = 20.0  # seconds until a test that hangs fails

PROMPTS = [f"p{k}" for k in range(6)]
RESPONSES = [[f"{k} 0", f"{k} 1"] for k in range(6)]
TEXTS = [text for group in RESPONSES for text in group]
"""Each group is 4 tokens of the table model (two rows of prompt and response), so 4 makes it a micro-batch."""


class Backbone:
    """The table of a table model: counts what it encodes, and calls ``before`` with the number of texts so far."""

    def __init__(self, before: Callable[[int], None] = lambda _n: None) -> None:
        self.before = before
        self.encoded: list[str] = []

    def __call__(self, _prompt: str, text: str) -> list[float]:
        self.before(len(self.encoded))
        self.encoded.append(text)
        return [float(x) for x in text.split()]


class Gated:
    """A judge whose first call says that it came, and whose calls end only when they are let go."""

    def __init__(self) -> None:
        self.came, self.ended = threading.Event(), threading.Event()
        self.let_go = threading.Event()
        self.calls: list[list[Pair]] = []
        self.cancelled = 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls.append(list(pairs))
        self.came.set()
        try:
            while not self.let_go.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended.set()
        return [WIN] * len(pairs)


class HandClock:
    """Time that stands still until it is turned; whoever sleeps wakes when his time has come."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        end = self.time + seconds
        while self.time < end:
            await asyncio.sleep(0.001)


def run_async(engine: RewardEngine, *args):
    return asyncio.run(asyncio.wait_for(engine.score_async(*args), PATIENCE))


SCORE = pytest.mark.parametrize("score", [RewardEngine.score, run_async], ids=["sync", "async"])


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "what the test waits for did not come"


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "rmcore-score"}


class Books:
    """A budgeted router that takes every pair up to a limit, and remembers all it was told."""

    whole_batch = False

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.steps = limit, 0
        self.reserved: list[Reservation] = []
        self.settled: list[tuple[Reservation, JudgeUsage | None]] = []

    def select(self, candidates):
        raise AssertionError("a router that can reserve is asked to")

    def begin_step(self) -> None:
        self.steps += 1

    def reserve(self, candidates):
        left = self.limit - sum(reservation.pairs for reservation in self.reserved)
        mask = torch.zeros(len(candidates), dtype=torch.bool)
        mask[torch.argsort(candidates.uncertainty, descending=True, stable=True)[: max(left, 0)]] = True
        self.reserved.append(Reservation(len(self.reserved), int(mask.sum())))
        return mask, self.reserved[-1]

    def settle(self, reservation, usage) -> None:
        self.settled.append((reservation, usage))
