"""Clocks and event loops whose time passes at once, as fixtures: a folder's conftest imports those it uses."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

__all__ = ["FakeClock", "LoopClock", "SetClock", "VirtualLoop", "clock", "settle", "untimed", "virtual"]


def untimed() -> None:
    """Machines differ in speed; how long one example takes says nothing. Time is tested where it matters."""
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


async def settle(times: int = 100) -> None:
    """Let all that is ready on the loop run."""
    for _ in range(times):
        await asyncio.sleep(0)


class FakeClock:
    """Time that passes only by sleeping, and at once."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1_700_000_000.0 + self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


class SetClock:
    """Time that passes only when told to: ``time`` is set, and who sleeps sets it, too."""

    def __init__(self, now: float = 0.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as nobody has anything left to do.

    Timeouts, sleeps and clocks agree, nothing takes real time, and every run is the same. Waiting for what never comes
    raises instead of hanging.
    """

    def __init__(self) -> None:
        selector = selectors.SelectSelector()
        real = selector.select

        def select(timeout: float | None = None) -> Any:
            found = real(0)
            if not found and timeout is None:
                raise RuntimeError("deadlock: every task waits and no timer is set")
            if not found and timeout:
                self.passed += timeout
            return found

        selector.select = select  # type: ignore[method-assign]
        self.passed = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.passed


class LoopClock:
    """The running loop's time."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@pytest.fixture(scope="session")
def virtual() -> Callable[..., Any]:
    """Run ``work(clock)`` to its end in virtual time, and return what it returns."""

    def run(work: Callable[[LoopClock], Any]) -> Any:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(work(LoopClock()))

    return run
