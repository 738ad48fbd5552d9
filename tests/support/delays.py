"""A plugin that lets threads, futures and event loops be late at random, so that who depends on coming first is found.

``make test-delays`` runs the suite with it. It changes no result of code that is right: a wait may end later than it
could, a thread may start later, a loop may turn later. RMCORE_DELAYS=SEED repeats a run's draws as far as the system
schedules alike; RMCORE_DELAYS_MAX is the longest delay in seconds.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_SHARE = 0.4  # of the handovers that are late
_TURNS = 0.02  # and of an event loop's turns, of which there are many more
_LONGEST_S = float(os.environ.get("RMCORE_DELAYS_MAX", "0.08"))

_random = random.Random(int(os.environ.get("RMCORE_DELAYS", "0")) + os.getpid())
_sleep = time.sleep  # the tests replace it


def _late(share: float) -> None:
    if _random.random() < share:
        _sleep(_random.random() * _LONGEST_S)


def _delay(owner: type, name: str, *, before: float = 0.0, after: float = 0.0) -> None:
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def late(*args: Any, **kwargs: Any) -> Any:
        _late(before)
        try:
            return method(*args, **kwargs)
        finally:
            _late(after)

    setattr(owner, name, late)


for _owner, _name in (
    (threading.Event, "set"),
    (threading.Thread, "start"),
    (queue.Queue, "put"),
    (concurrent.futures.ThreadPoolExecutor, "submit"),
    (concurrent.futures.Future, "set_result"),
    (asyncio.BaseEventLoop, "call_soon_threadsafe"),
):
    _delay(_owner, _name, before=_SHARE, after=_SHARE)
for _owner, _name in ((threading.Event, "wait"), (queue.Queue, "get"), (concurrent.futures.Future, "result")):
    _delay(_owner, _name, after=_SHARE)
_delay(asyncio.BaseEventLoop, "_run_once", before=_TURNS)
sys.setswitchinterval(0.0005)
