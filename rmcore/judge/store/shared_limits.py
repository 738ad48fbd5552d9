"""Limits that hold over all machines: requests and tokens per minute, and what a whole run may ask, in PostgreSQL.

    limits = SharedLimits("postgresql://db/rm", "judge", requests_per_minute=600, run="ppo-7", max_requests=50_000)
    ChatJudge(url, model, client=ClientOptions(limits=limits), store="postgresql://db/rm")

**What is guaranteed**, for all processes that give the same database and ``name`` together: what
:mod:`rmcore._base.client.limits` says for one. Every admission is a row, written in a transaction that holds the name's
lock, with the database's clock, so in every window of a minute there are never more than ``requests_per_minute`` of
them, and at each admission the tokens of the last minute, each taken as the reply told or else as reserved, are at most
``tokens_per_minute``. A server's ``retry-after`` and ``x-ratelimit-*`` hold everybody.

For all processes that give the same ``run`` together: never more than ``max_requests`` are sent (those that fail and
those that are tried again included), and tokens reserved and used are at most ``max_tokens`` as long as no reply
reports more than was reserved. Likewise money: with a ``price`` each request reserves the most its tokens can cost, the
reply's own counts replace that, one that the endpoint refused with a status costs nothing, and what is reserved and
spent is at most ``max_cost``. Every process of the run must give the price of the model it asks, in one currency. What
is then refused has the reason ``over_budget``, also where open reservations might yet turn out smaller. A process that
dies leaves its reservations counted: what is unknown counts as reserved, never as nothing.

Within a process admission is first come, first served; between processes the database's lock decides. While the
database cannot be reached nobody is admitted; calls end with ``deadline``, or with ``limits`` if they have none.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from rmcore._base.client.limits import LimitsState, Used, held_by
from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.judge.base import JudgeUsage
from rmcore.judge.store.admissions import Admissions, agreed_currency
from rmcore.judge.store.postgres_url import PostgresUrl
from rmcore.judge.store.prices import Price, PriceTable
from rmcore.judge.store.protocol import StoreError

__all__ = ["SharedAdmission", "SharedLimits"]

_logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0  # longest sleep: others may give tokens back
_PATIENCE_S: Final = 30.0
_CLOSE_S: Final = 6.0
_BILLION: Final = 10**9  # money is counted in billionths
_MOST_MONEY: Final = 9e9  # of which 64 bits hold so many


@dataclass(slots=True)
class _Asked:
    """Somebody waits to be admitted, until ``until`` on the process's monotonic clock."""

    tokens: int
    cost: int
    until: float
    future: Future[Any] = field(default_factory=Future)


class SharedAdmission:
    """One admitted request; see :class:`~rmcore._base.client.limits.Admission`."""

    __slots__ = ("_owner", "cost", "id", "tokens")

    def __init__(self, owner: SharedLimits, id: str, tokens: int, cost: int = 0) -> None:
        self._owner, self.id, self.tokens, self.cost = owner, id, tokens, cost

    def settle(self, tokens: int, used: Used | None = None) -> None:
        """Count what the reply says was used, from now on."""
        self._settle(tokens, self._owner._cost_of(used, self.cost))

    def unpaid(self) -> None:
        """Count no money for it: the endpoint refused it with a status."""
        self._settle(self.tokens, 0)

    def _settle(self, tokens: int, cost: int) -> None:
        if (tokens, cost) != (self.tokens, self.cost):
            self.tokens, self.cost = tokens, cost
            self._owner._later(lambda rows: rows.settle(self.id, tokens, cost))

    def withdraw(self) -> None:
        """Count it no longer."""
        self._owner._later(lambda rows: rows.withdraw(self.id))


class SharedLimits:
    """Give it to :class:`~rmcore._base.client.options.ClientOptions` as ``limits``, on every machine; see the module.

    Args:
        url: of the database, as for a store.
        name: of what is limited: mostly an endpoint's key.
        requests_per_minute, tokens_per_minute: ``None``: no limit.
        run: of the budget; without it, that of ``name``.
        max_requests, max_tokens: in the whole run, over all processes; ``None``: no limit.
        max_cost: likewise, in the currency of ``price``.
        price: of the model that is asked: a :class:`~rmcore.judge.store.prices.Price` or a mapping with its fields.
        currency: of ``price``.
        max_hold_s: longest pause that a server's header can bring about.
        window_s: the window's length.
        clock: the one that deadlines are on.

    Raises:
        InputError: an argument is unusable, or the run's money is counted in another currency.
        StoreError: the database cannot be used.
        MissingPackageError: psycopg is not installed.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        run: str = "",
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price: Price | Mapping[str, float] | None = None,
        currency: str = "USD",
        max_hold_s: float = 60.0,
        window_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        numbers = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        for argument, value in (numbers | {"max_requests": max_requests, "max_tokens": max_tokens}).items():
            if value is not None:
                check_number(argument, value, COUNT, "a positive integer, or None")
        for argument, word in (("name", name), ("run", run)):
            if not isinstance(word, str) or "\0" in word or (argument == "name" and not word):
                reject(argument, repr(word)[:80], "a name")
        check_number("window_s", window_s, Within(above=0), "seconds above 0")
        check_number("max_hold_s", max_hold_s, Within(least=0), "seconds, at least 0")
        if max_cost is not None:
            check_number("max_cost", max_cost, Within(above=0, most=_MOST_MONEY), "a positive amount")
            if price is None:
                reject("max_cost", repr(max_cost), "a positive amount, together with price")
        self.location = PostgresUrl.of(url)
        self.name, self.run = name, run or name
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.max_requests, self.max_tokens, self.max_cost = max_requests, max_tokens, max_cost
        self.price = None if price is None else PriceTable({name: price}, currency=currency)[name]
        self.currency = currency
        self.max_hold_s, self.window_s = max_hold_s, window_s
        self.clock: Clock = clock or SystemClock()
        self.location.check(30.0)
        if self.price is not None:
            self._agree_on_currency()
        self._start_anew()

    def __repr__(self) -> str:
        return f"SharedLimits({str(self.location)!r}, {self.name!r}, run={self.run!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy in another process has a connection of its own, to the same limits."""
        own = ("_lock", "_asked", "_orders", "_wake", "_thread", "_rows", "_seen", "_process", "_closing")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    @property
    def state(self) -> LimitsState:
        """As this process saw it last."""
        requests, tokens, held = self._seen
        return LimitsState(requests, tokens, len(self._asked), max(0.0, held - time.monotonic()), None, None)

    async def acquire(self, tokens: int = 0, *, until: float | None = None) -> SharedAdmission | str:
        """Leave to send one request now, or ``deadline``, ``over_token_limit``, ``over_budget``, ``limits``."""
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            reject("tokens", repr(tokens), "a non-negative integer")
        if self.tokens_per_minute is not None and tokens > self.tokens_per_minute:
            return "over_token_limit"
        left = math.inf if until is None else until - self.clock.now()
        if left < 0:
            return "deadline"
        cost = 0 if self.price is None else math.ceil(_BILLION * self.price.most(tokens))
        asked = _Asked(tokens, cost, time.monotonic() + left)
        self._begin(lambda: self._asked.append(asked))
        try:
            async with asyncio.timeout(None if until is None else left):
                admitted: SharedAdmission | str = await asyncio.shield(asyncio.wrap_future(asked.future))
                return admitted
        except BaseException as error:
            asked.until = -math.inf
            asked.future.add_done_callback(_give_back)  # it may be admitted at this very moment
            if isinstance(error, TimeoutError):
                return "deadline"
            raise

    def observe(self, headers: Mapping[str, str]) -> None:
        """Read the ``x-ratelimit-*`` headers of a reply: where nothing remains, everybody is held until the reset."""
        seconds = held_by(headers, self.clock.wall())
        if seconds is not None:
            self.hold(seconds)

    def hold(self, seconds: float) -> None:
        """Admit nobody anywhere for ``seconds``, at most ``max_hold_s``."""
        seconds = min(seconds, self.max_hold_s)
        self._later(lambda rows: rows.hold(seconds))

    def close(self) -> None:
        """Write what is waiting and close the connection. The limits can be used again."""
        with self._lock:
            thread, self._closing = self._thread, True
            self._wake.notify()
        if thread is not None and thread is not threading.current_thread() and self._process == os.getpid():
            thread.join(_CLOSE_S)

    def _cost_of(self, used: Used | None, reserved: int) -> int:
        """Billionths; what is reserved where the reply tells no counts, or counts that contradict each other."""
        if self.price is None or used is None:
            return reserved
        usage = JudgeUsage(
            calls=1, prompt_tokens=used.prompt, completion_tokens=used.completion, cached_tokens=used.cached,
            reasoning_tokens=used.reasoning,
        )  # fmt: skip
        cost = self.price.cost(usage) if used.prompt else None
        return reserved if cost is None else math.ceil(_BILLION * cost)

    def _agree_on_currency(self) -> None:
        """The first process of a run says what its money is; sums of two currencies would be no limit."""
        import psycopg

        from rmcore.judge.store.postgres_connection import connect, meaning

        try:
            with connect(str(self.location)) as connection:
                found = agreed_currency(connection, self.run, self.currency)
        except psycopg.Error as error:
            raise StoreError(str(meaning(error, str(self.location)))) from None
        if found != self.currency:
            reject("currency", repr(self.currency), f"{found!r}, in which the money of the run {self.run!r} is counted")

    # -- the thread that talks to the database -----------------------------------------------------------------------

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._asked: deque[_Asked] = deque()
        self._orders: deque[Callable[[Admissions], None]] = deque()
        self._seen: tuple[int, int, float] = (0, 0, -math.inf)
        self._rows: Admissions | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def _later(self, order: Callable[[Admissions], None]) -> None:
        self._begin(lambda: self._orders.append(order))

    def _begin(self, add: Callable[[], None]) -> None:
        if self._process != os.getpid():  # forked: the thread stayed behind
            self._start_anew()
        with self._lock:
            if self._thread is None:
                self._closing = False
                thread = threading.Thread(target=self._work, name="rmcore-limits", daemon=True)
                thread.start()
                self._thread = thread
                _running.add(self)
            add()
            self._wake.notify()

    def _work(self) -> None:
        try:
            self._admit_all()
        except BaseException:  # nobody may wait for ever, whatever happened
            _logger.exception("%r: ended; whoever asks next starts it again", self)
            with self._lock:
                self._orders.clear()  # one of them may be the cause. What they would settle stays counted as reserved
        finally:
            self._end()

    def _admit_all(self) -> None:
        pause, down_since = 0.0, math.inf
        while True:
            with self._lock:
                if pause or not (self._asked or self._orders):
                    if self._closing and not self._orders:
                        break
                    self._wake.wait(pause or None)
                self._drop_late()
                asked, orders = list(self._asked), list(self._orders)
                if self._closing and not orders and not asked:
                    break
            try:
                done, pause = self._step(asked, orders)
            except StoreError as error:
                down_since = min(down_since, time.monotonic())
                pause = 0.2
                if time.monotonic() - down_since > _PATIENCE_S or self._closing:
                    _logger.error("%s", error)
                    self._refuse_patient()
                    if self._closing:
                        break
                continue
            down_since = math.inf
            with self._lock:
                for _ in orders:
                    self._orders.popleft()
                for one, _ in done:
                    self._asked.remove(one)
            for one, answer in done:  # without the lock: whoever gave up meanwhile gives it back at once
                one.future.set_result(answer)

    def _end(self) -> None:
        with self._lock:
            self._thread = None
            rows, self._rows = self._rows, None
            left, self._asked = self._asked, deque()
        for one in left:
            one.future.set_result("limits")
        if rows is not None:
            rows.connection.close()

    def _drop_late(self) -> None:
        now = time.monotonic()
        for one in [one for one in self._asked if one.until < now]:
            self._asked.remove(one)
            one.future.set_result("deadline")

    def _refuse_patient(self) -> None:
        """Who has no deadline waits no longer for a database that is gone."""
        with self._lock:
            for one in [one for one in self._asked if one.until == math.inf]:
                self._asked.remove(one)
                one.future.set_result("limits")

    def _step(
        self, asked: list[_Asked], orders: list[Callable[[Admissions], None]]
    ) -> tuple[list[tuple[_Asked, SharedAdmission | str]], float]:
        """One transaction: the orders, then as many admissions as there is room for.

        Returns:
            Who got what, and after how many seconds to look again (0: as soon as somebody asks).
        """
        import psycopg

        from rmcore.judge.store.postgres_connection import connect, in_transaction, meaning

        try:
            if self._rows is None:
                self._rows = Admissions(connect(str(self.location)), self.name, self.run, self.window_s)
                self._rows.make_names()
            with in_transaction(self._rows.connection):
                held = self._rows.lock()
                for order in orders:
                    order(self._rows)
                return self._admit(self._rows, asked, held)
        except psycopg.Error as error:
            broken, self._rows = self._rows, None
            if broken is not None:
                broken.connection.close()
            raise meaning(error, str(self.location)) from None

    def _admit(
        self, rows: Admissions, asked: list[_Asked], held: float
    ) -> tuple[list[tuple[_Asked, SharedAdmission | str]], float]:
        if not asked:
            return [], 0.0
        total_requests, total_tokens, total_cost = rows.totals()
        most_cost = None if self.max_cost is None else math.floor(_BILLION * self.max_cost)
        requests, tokens = rows.in_window()
        self._seen = (requests, tokens, time.monotonic() + held)
        done: list[tuple[_Asked, SharedAdmission | str]] = []
        admitted: list[SharedAdmission] = []
        pause = 0.0
        for one in asked:
            over = _over(total_requests + 1, self.max_requests) or _over(total_tokens + one.tokens, self.max_tokens)
            if over or _over(total_cost + one.cost, most_cost):
                done.append((one, "over_budget"))
                continue
            if held:
                pause = held
                break
            if _over(requests + 1, self.requests_per_minute) or _over(tokens + one.tokens, self.tokens_per_minute):
                pause = self._ready(rows, requests, tokens, one.tokens) if not admitted else 0.001
                break
            admission = SharedAdmission(self, str(uuid.uuid4()), one.tokens, one.cost)
            admitted.append(admission)
            done.append((one, admission))
            requests, tokens = requests + 1, tokens + one.tokens
            total_requests, total_tokens = total_requests + 1, total_tokens + one.tokens
            total_cost += one.cost
        if admitted:
            rows.admit([(one.id, one.tokens, one.cost) for one in admitted])
        return done, min(pause, _POLL_S)

    def _ready(self, rows: Admissions, requests: int, tokens: int, more: int) -> float:
        """Seconds until there is room for a request of ``more`` tokens, unless others give some back."""
        too_many = 0 if self.requests_per_minute is None else requests + 1 - self.requests_per_minute
        too_much = 0 if self.tokens_per_minute is None else tokens + more - self.tokens_per_minute
        seconds = rows.seconds_until(too_many, too_much)
        return _POLL_S if seconds is None else max(seconds, 0.001)


_running: weakref.WeakSet[SharedLimits] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """What calls used, and is not written yet, is: or their reservations would stay counted."""
    for limits in list(_running):
        limits.close()


def _over(value: int, limit: int | None) -> bool:
    return limit is not None and value > limit


def _give_back(future: Future[Any]) -> None:
    if not future.cancelled() and isinstance(future.result(), SharedAdmission):
        future.result().withdraw()
