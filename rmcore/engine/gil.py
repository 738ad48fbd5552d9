"""Sharing the interpreter lock fairly between the backbone's thread and the judge's event loop."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["short_turns"]

_TURN_S = 0.0005

_lock = threading.Lock()
_holders = 0
_usual = 0.0


@contextmanager
def short_turns() -> Iterator[None]:
    """While any thread is inside, threads that want the interpreter lock get it within half a millisecond.

    A forward pass gives the lock up in every kernel and must ask for it again for the next one. Beside a busy thread
    each asking takes the interpreter's switch interval, 5 ms by default, which is far longer than a small kernel. The
    setting is the whole process's; the last one to leave puts back what the first one found.
    """
    global _holders, _usual
    with _lock:
        if _holders == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, _TURN_S))
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                sys.setswitchinterval(_usual)
