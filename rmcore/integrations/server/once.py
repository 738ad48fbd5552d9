"""What is worked out of a group once, whoever of its members asks first: rewards, advantages, figures.

Members of a group get their answers at the same moment. What is the whole group's (its advantages' variance takes 20 ms
for 64 responses whose pairs a judge decided) was worked out for each of them anew, on the event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["FEW_RESPONSES", "Once"]

T = TypeVar("T")

FEW_RESPONSES = 8
"""Groups up to here are worked on on the event loop: a millisecond at most, and a thread has its price too."""


class Once:
    """Values by name, each made once. On one event loop."""

    def __init__(self) -> None:
        self._made: dict[str, asyncio.Future[object]] = {}

    async def get(self, name: str, make: Callable[[], T], size: int) -> T:
        """``make()``, as the first call with ``name`` had it; what it raised, those who waited for it are told.

        It goes on if its callers go away: it belongs to none of them. A failure is not kept.

        Args:
            name: of the value; whoever uses a name makes the same of it.
            make: makes it, beside the event loop if there are many responses.
            size: responses of the group.
        """
        made = self._made.get(name) or self._begin(name, make, size)
        await asyncio.wait({made})  # unlike awaiting it, this leaves it alone when the caller is cancelled
        # Cancelled by somebody else, not by who waits here: made again for who still wants it.
        return make() if made.cancelled() else cast("T", made.result())

    def _begin(self, name: str, make: Callable[[], T], size: int) -> asyncio.Future[object]:
        made: asyncio.Future[object]
        if size <= FEW_RESPONSES:
            made = asyncio.get_running_loop().create_future()
            made.set_result(make())
        else:
            # In a context of its own: what is called in that of a request may be cancelled with it (Ray Serve does).
            own = contextvars.Context()
            made = asyncio.create_task(asyncio.to_thread(make), name=f"rmcore {name}", context=own)
            made.add_done_callback(lambda done: self._forget_failed(name, done))
        self._made[name] = made
        return made

    def _forget_failed(self, name: str, made: asyncio.Future[object]) -> None:
        if made.cancelled() or made.exception() is not None:
            self._made.pop(name, None)
