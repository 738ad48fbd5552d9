"""Which entries are alive, as an assembler knows it.

An entry that is killed takes its callers' connections along, but its calls here go on: to the assembly their members
would still be waited for, and when their callers ask again, through another entry, a member known by its text alone
would be taken for a second one with the same text. So entries are heard from twice a second; what one that fell silent
had under way is given up, what it was answered just before counts as lost, and a call that may be such a repetition
waits until its twin's entry is known to live.

So it is with a node that takes one of Serve's proxies along: its callers ask again through others, while the entry that
it had called lives. An entry therefore vouches for the proxies, too, in its signs of life: with one of them in doubt it
is alive, and its texts are not vouched for until Ray knows what has become of that proxy.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rmcore._base.clock import Clock, SystemClock

__all__ = ["BEAT_S", "Presence"]

BEAT_S = 0.5
"""Seconds from one sign of life to the next."""


@dataclass(frozen=True, slots=True)
class _Answer:
    at: float
    text: bytes
    lost: Callable[[], None]
    reached: Callable[[], None]


class Presence:
    """Keeps what each entry has under way, and when it was last heard.

    Args:
        patience_s: an entry that is not heard for so long is dead. One that was only slow sends its requests again.
        clock: a seam for tests.
    """

    def __init__(self, patience_s: float = 6 * BEAT_S, clock: Clock | None = None) -> None:
        self.patience_s = patience_s
        self.given_up = 0
        self._clock: Clock = clock or SystemClock()
        self._heard: dict[str, float] = {}
        self._vouched: dict[str, float] = {}
        self._doubtful: set[str] = set()
        self._calls: defaultdict[str, set[asyncio.Future[Any]]] = defaultdict(set)
        self._texts: defaultdict[bytes, Counter[str]] = defaultdict(Counter)
        self._answered: defaultdict[str, list[_Answer]] = defaultdict(list)
        self._beats: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def heard(self, entry: str, *, vouched: bool = True) -> None:
        """An entry is alive now; what it was answered a while ago has reached its caller.

        Args:
            entry: its name.
            vouched: whether all are alive that it could have had calls from. When they are after a doubt, what it was
                answered last counts as lost: it may have gone to one that is not there any more.
        """
        now = self._heard[entry] = self._clock.now()
        if not vouched:
            self._doubtful.add(entry)
            return
        doubted = entry in self._doubtful
        self._doubtful.discard(entry)
        self._vouched[entry] = now
        answered = self._answered.pop(entry, [])
        for one in answered:
            if doubted:
                one.lost()
            elif one.at <= now - 2 * BEAT_S:
                one.reached()
            else:
                self._answered[entry].append(one)
                continue
            self._release(entry, one.text)
        self._beats.pop(entry, asyncio.Event()).set()

    def called(self, entry: str) -> None:
        """An entry is alive, as it has just sent a call."""
        self._heard[entry] = self._clock.now()

    @contextmanager
    def holding(self, entry: str, call: asyncio.Future[Any], text: bytes = b"") -> Iterator[None]:
        """While the body runs, ``call`` is under way for an entry: cancelled when that dies.

        Args:
            entry: its name.
            call: of its request.
            text: digest of the request, where only its content tells it from others.
        """
        self._calls[entry].add(call)
        self._texts[text][entry] += 1
        try:
            yield
        finally:
            self._calls[entry].discard(call)
            if not self._calls[entry]:
                del self._calls[entry]
            self._release(entry, text)

    def answered(
        self, entry: str, text: bytes, lost: Callable[[], None], reached: Callable[[], None] = lambda: None
    ) -> None:
        """A call has its answer; ``reached`` is called if its entry vouches for two more beats, otherwise ``lost``."""
        self._texts[text][entry] += 1
        self._answered[entry].append(_Answer(self._clock.now(), text, lost, reached))

    async def no_repetition(self, entry: str, text: bytes) -> None:
        """Return when the entries that have a call with this text under way have vouched for it, or are given up."""
        began = self._clock.now()
        others = [name for name in +self._texts.get(text, Counter()) if name != entry or name in self._doubtful]
        for other in others:
            while self._vouched.get(other, 0.0) <= began and self._texts.get(text, Counter())[other]:
                self.give_up_silent()
                await self._beat_of(other)

    def give_up_silent(self) -> None:
        """Give up what entries had under way that were not heard for too long. To be called now and then."""
        latest = self._clock.now() - self.patience_s
        for entry in [name for name, at in self._heard.items() if at < latest]:
            del self._heard[entry]
            self._vouched.pop(entry, None)
            self._doubtful.discard(entry)
            self._beats.pop(entry, asyncio.Event()).set()
            for call in self._calls.pop(entry, ()):
                self.given_up += call.cancel()
            for one in self._answered.pop(entry, ()):
                self.given_up += 1
                one.lost()
                self._release(entry, one.text)

    def _release(self, entry: str, text: bytes) -> None:
        self._texts[text][entry] -= 1
        if not +self._texts[text]:
            del self._texts[text]

    async def _beat_of(self, entry: str) -> None:
        beat = asyncio.ensure_future(self._beats[entry].wait())
        time_up = asyncio.ensure_future(self._clock.sleep(BEAT_S))
        try:
            await asyncio.wait({beat, time_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beat.cancel()
            time_up.cancel()
