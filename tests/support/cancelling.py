"""Work cancelled at each of its steps in turn: what it held must be given back, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeAlias

__all__ = ["Scenario", "Start", "cancelled_everywhere"]

Start: TypeAlias = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]
"""Starts a coroutine as the task that is going to be cancelled."""
Scenario: TypeAlias = Callable[[Start], Awaitable[None]]
"""Sets everything up, starts one coroutine to be cancelled, and checks what is left; it runs once for every step."""


class _Counter:
    """Counts the steps of a task and of all that it starts, and cancels it at one of them."""

    def __init__(self, at: int, *, done: bool) -> None:
        self.at, self.done = at, done
        self.steps = 0
        self.reached = False
        self.task: asyncio.Task[Any] | None = None

    def step(self, waits_for: Any) -> None:
        if self.steps == self.at and self.task is not None:
            self.reached = True
            task = self.task
            if self.done and isinstance(waits_for, asyncio.Future):
                # What it waits for is there, and it has not seen that yet: whoever gave it thinks it taken.
                waits_for.add_done_callback(lambda _: task.cancel())
            else:
                task.cancel()
        self.steps += 1


_counter: contextvars.ContextVar[_Counter | None] = contextvars.ContextVar("counter", default=None)


class _Counted(Coroutine[Any, Any, Any]):
    def __init__(self, inner: Coroutine[Any, Any, Any], counter: _Counter) -> None:
        self._inner, self._counter = inner, counter

    def send(self, value: Any) -> Any:
        found = self._inner.send(value)
        self._counter.step(found)
        return found

    def throw(self, *error: Any) -> Any:  # type: ignore[override]
        found = self._inner.throw(*error)
        self._counter.step(found)
        return found

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Iterator[Any]:
        raise NotImplementedError


def _factory(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    context: contextvars.Context | None = None,
    **how: Any,
) -> asyncio.Task[Any]:
    counter = _counter.get() if context is None else context.get(_counter)
    counted = coro if counter is None else _Counted(coro, counter)
    return asyncio.Task(counted, loop=loop, context=context, **how)


def cancelled_everywhere(
    scenario: Scenario, *, most: int = 200, loop: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> int:
    """Run ``scenario`` once for every step of what it starts; how many steps there were.

    Each time the started task is cancelled at another step of its own or of a task that it started: while it waits
    there, and (in a run of its own) when what it waits for has just come. A task that is started in a context of its
    own is not counted. The scenario must not be cancelled itself; it is over when its checks are.

    Args:
        scenario: see :data:`Scenario`. The task it starts ends cancelled or with a result.
        most: more steps than that are a mistake.
        loop: makes the loops; the usual ones by default.
    """
    for at in range(most):
        reached = False
        for done in (False, True):
            counter = _Counter(at, done=done)

            async def run(counter: _Counter = counter) -> None:
                asyncio.get_running_loop().set_task_factory(_factory)

                def start(coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
                    context = contextvars.copy_context()
                    context.run(_counter.set, counter)
                    counter.task = asyncio.get_running_loop().create_task(coro, context=context)
                    return counter.task

                await scenario(start)

            with asyncio.Runner(loop_factory=loop) as runner:
                try:
                    runner.run(run())
                except Exception as error:
                    error.add_note(f"cancelled at step {at}, {'as it went on' if done else 'as it waited'}")
                    raise
            reached |= counter.reached
        if not reached:
            return at
    raise AssertionError(f"more than {most} steps")
