"""Hard limits on what judging may cost: reserve before the call, settle after it.

    budget = Budget(500_000, "tokens", "step", max_per_pair=6_000)
    reservation = budget.reserve(40)   # as many of 40 pairs as still fit: reservation.pairs
    ...                                # ask the judge about so many pairs
    budget.settle(reservation, usage)  # what it did cost; the rest of the reservation is free again

**What is guaranteed.** ``reserved + spent ≤ limit`` at every moment and under every interleaving of threads and tasks,
as long as no pair costs more than was reserved for it. So the limit is

- exact for ``pairs``: one pair is one pair;
- exact for ``calls``, ``tokens`` and ``cost`` if ``max_per_pair`` is a true upper bound of what one pair can cost;
- otherwise an estimate from recent pairs is reserved, and the limit can be overshot by at most the sum of the excess
  (cost over estimate) of the pairs that are in flight at that moment. An excess is recorded, logged as a warning when
  it breaks the limit, and taken off what is left.

For limits per minute, hour or day the window slides: what is in flight counts now, what was settled counts until one
window after it was settled. Whenever between reserving and settling the money was really spent, no window of that
length then holds more than the limit.

The tighter the bound, the fuller the use: pairs that are in flight together, such as those of one score call, hold what
they *may* cost. With a ``max_per_pair`` of four times the mean, one call spends a quarter of a budget per step; the
estimate from recent pairs lies closer to the mean.

What is unknown counts as reserved, never as nothing: cancelled calls, calls that report no tokens, calls without a
price. Amounts are kept as integers (currency in billionths), so no rounding error adds up over a run.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import Within
from rmcore.engine.routing.pair_cost import FIRST_ESTIMATE, PairCost
from rmcore.engine.routing.recent import SlidingSum
from rmcore.engine.routing.routers import Reservation
from rmcore.judge.base import JudgeUsage

__all__ = ["Budget", "BudgetStats", "Period", "Unit"]

log = logging.getLogger(__name__)

Unit: TypeAlias = Literal["pairs", "calls", "tokens", "cost"]
"""``pairs`` sent to the judge, answered from a store or not; ``calls`` put to an endpoint, retries not counted;
``tokens`` of prompts and completions; ``cost`` in the currency of the judge's price table."""

Period: TypeAlias = Literal["run", "step", "minute", "hour", "day"]
"""The whole run, one step (between two ``begin_step``), or any stretch of that length, wherever it begins."""

WINDOWS = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}
_UNITS = ("pairs", "calls", "tokens", "cost")
_PERIODS = ("run", "step", *WINDOWS)
_BILLION = 10**9


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """A budget at a moment, in its unit.

    Attributes:
        limit: the hard limit of the period.
        spent: in the period (the run, this step, the last minute).
        reserved: in flight.
        left: what can still be reserved in the period; never negative.
        total: spent since the budget was made, all periods.
        settled_pairs: pairs settled since then.
        denied_pairs: pairs that were asked for and did not fit.
        excess: the sum of what pairs cost beyond their reservation.
        overshoot: the most by which a period's spend was ever above its limit; 0 unless reservations were too small.
        per_pair: what is reserved for a pair at the moment.
        mean_per_pair: what a pair costs on average, lately.
    """

    limit: float
    spent: float
    reserved: float
    left: float
    total: float
    settled_pairs: int
    denied_pairs: int
    excess: float
    overshoot: float
    per_pair: float
    mean_per_pair: float

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return asdict(self)


class _Account:
    """What one period has spent and holds."""

    def __init__(self, window: float | None) -> None:
        self.reserved = 0
        self.pairs = 0
        self.fixed = 0
        self.window = None if window is None else SlidingSum(window)

    def spent(self, now: float) -> int:
        return self.fixed if self.window is None else self.window.total(now)

    def spend(self, now: float, amount: int) -> None:
        if self.window is None:
            self.fixed += amount
        else:
            self.window.add(now, amount)


class Budget:
    """A hard limit on pairs, calls, tokens or cost, per run, per step or per stretch of time. See the module's text.

    Safe to use from any number of threads and tasks. A budget per step belongs to one router, since a step is what
    lies between two ``begin_step``; the others may be shared.

    Args:
        limit: how much, in ``unit``; a whole number except for ``cost``.
        unit: what is limited.
        per: over which period.
        max_per_pair: the most that one pair can ever cost. With it the limit is exact: that much is reserved for every
            pair. Default for ``pairs`` 1, for ``calls`` 2 (both orders; a cascade of T judges needs 2T).
        first_estimate: without ``max_per_pair``, what to reserve for a pair until 16 pairs have been settled; from
            then on the highest cost a pair of the last 64 settlements, times 1.25. Default for ``tokens`` 8192. For
            ``cost`` there is no sensible default: give one of the two.
        clock: source of time for periods of a fixed length.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> budget = Budget(10, "calls", "run")
        >>> reservation = budget.reserve(8)
        >>> reservation.pairs, budget.stats().left
        (5, 0.0)
        >>> spent = budget.settle(reservation, JudgeUsage(calls=7))
        >>> budget.stats().left
        3.0
    """

    def __init__(
        self,
        limit: float,
        unit: Unit = "calls",
        per: Period = "run",
        *,
        max_per_pair: float | None = None,
        first_estimate: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        if unit not in _UNITS:
            reject("unit", repr(unit), f"one of {', '.join(_UNITS)}")
        if per not in _PERIODS:
            reject("per", repr(per), f"one of {', '.join(_PERIODS)}")
        self.unit: Unit = unit
        self.per: Period = per
        self._scale = _BILLION if unit == "cost" else 1
        self._limit = self._grains("limit", limit, 0)
        if unit == "pairs" and (max_per_pair, first_estimate) != (None, None):
            reject("max_per_pair, first_estimate", (max_per_pair, first_estimate), "neither: a pair is one pair")
        if max_per_pair is not None and first_estimate is not None:
            reject("max_per_pair, first_estimate", "both", "at most one")
        if unit == "cost" and max_per_pair is None and first_estimate is None:
            reject("max_per_pair, first_estimate", "neither", "one of them, since nothing is known about prices")
        if max_per_pair is None and first_estimate is None and unit in ("pairs", "calls"):
            max_per_pair = FIRST_ESTIMATE[unit]
        bound = None if max_per_pair is None else self._grains("max_per_pair", max_per_pair, 1)
        first = FIRST_ESTIMATE.get(unit, 0) if first_estimate is None else first_estimate
        self._pair = PairCost(bound, 0 if bound is not None else self._grains("first_estimate", first, 1))
        self.clock: Clock = SystemClock() if clock is None else clock
        self._lock = threading.Lock()
        self._now = -math.inf
        self._account = _Account(WINDOWS.get(per))
        self._open: dict[int, tuple[Reservation, int, _Account]] = {}
        self._next_id = 1
        self._total = self._settled = self._denied = self._excess = self._overshoot = 0

    @property
    def name(self) -> str:
        """Unit and period, such as ``tokens per step``."""
        return f"{self.unit} per {self.per}"

    @property
    def limit(self) -> float:
        """The limit, in ``unit``."""
        return self._units(self._limit)

    def begin_step(self) -> None:
        """A new step: a budget per step is full again. What is still in flight stays on its own step's account."""
        with self._lock:
            if self.per == "step":
                self._account = _Account(None)

    def reserve(self, pairs: int) -> Reservation:
        """Set aside what ``pairs`` pairs may cost, or as many of them as fit; its ``pairs`` says how many did.

        Raises InputError unless ``pairs`` is a non-negative integer.
        """
        if not isinstance(pairs, int) or isinstance(pairs, bool) or pairs < 0:
            reject("pairs", repr(pairs), "a non-negative integer")
        with self._lock:
            rate = self._pair.highest(self._settled)
            room = self._limit - self._account.spent(self._time()) - self._account.reserved
            granted = min(pairs, max(room, 0) // rate)
            self._denied += pairs - granted
            return self._set_aside(granted, granted * rate, self._account)

    def shrink(self, reservation: Reservation, pairs: int) -> Reservation:
        """Give part of one back before anything was asked: a reservation for ``pairs`` of its pairs takes its place.

        Raises InputError for more pairs than it has, and for a reservation that is not open.
        """
        with self._lock:
            amount, account = self._close(reservation)
            if not isinstance(pairs, int) or not 0 <= pairs <= reservation.pairs:
                self._open[reservation.id] = (reservation, amount, account)
                account.reserved += amount
                account.pairs += reservation.pairs
                reject("pairs", repr(pairs), f"an integer from 0 to the reservation's {reservation.pairs}")
            return self._set_aside(pairs, amount // reservation.pairs * pairs if reservation.pairs else 0, account)

    def settle(self, reservation: Reservation, usage: JudgeUsage | None) -> float:
        """Book what a reservation's pairs cost; to be called exactly once a reservation.

        Args:
            reservation: what ``reserve`` or ``shrink`` returned.
            usage: of those pairs together; ``None`` if nobody knows: everything reserved then counts as spent.

        Returns:
            What was booked, in ``unit``.

        Raises:
            InputError: the reservation is not this budget's, or was settled before.
        """
        if usage is not None and not isinstance(usage, JudgeUsage):
            reject("usage", type(usage).__name__, "a JudgeUsage or None")
        with self._lock:
            charge = self._charge(reservation, usage)  # before anything is changed: a judge's usage may be anybody's
            reserved, account = self._close(reservation)
            known = charge is not None
            charge = self._cautious(charge, reserved, usage)
            now = self._time()
            account.spend(now, charge)
            self._total += charge
            self._settled += reservation.pairs
            if known and usage is not None and reservation.pairs:
                self._pair.learn(reservation.pairs, charge, usage)
            self._excess += max(charge - reserved, 0)
            over = account.spent(now) - self._limit
            if over > 0 and charge:
                # Not only where this charge is the one too high: an earlier one may have used up its room.
                self._overshoot = max(self._overshoot, over)
                log.warning(
                    "budget of %g %s: %d pairs cost %g where %g was reserved; %g over the limit",
                    *(self.limit, self.name, reservation.pairs),
                    *(self._units(charge), self._units(reserved), self._units(over)),
                )
            return self._units(charge)

    def stats(self) -> BudgetStats:
        """Where the budget stands."""
        with self._lock:
            spent, reserved = self._account.spent(self._time()), self._account.reserved
            return BudgetStats(
                limit=self.limit,
                spent=self._units(spent),
                reserved=self._units(reserved),
                left=self._units(max(self._limit - spent - reserved, 0)),
                total=self._units(self._total),
                settled_pairs=self._settled,
                denied_pairs=self._denied,
                excess=self._units(self._excess),
                overshoot=self._units(self._overshoot),
                per_pair=self._units(self._pair.highest(self._settled)),
                mean_per_pair=self._units(self._pair.average(self._settled)),
            )

    def expected_pairs(self, *, whole_period: bool = False) -> float:
        """How many pairs what is left will pay for; for planning. At what pairs cost on average, once something has
        been settled in the period; until then at what is reserved for them, since they may all be in flight together.

        ``whole_period``: how many the whole limit pays for.
        """
        with self._lock:
            spent = self._account.spent(self._time())
            each = self._pair.average(self._settled) if spent else float(self._pair.highest(self._settled))
            used = 0.0 if whole_period else spent + self._account.pairs * each
            return max(self._limit - used, 0.0) / each

    def state_dict(self) -> dict[str, Any]:
        """JSON values. What is in flight counts as spent: whoever reads the state cannot settle it."""
        with self._lock:
            now = self._time()
            window = [] if self._account.window is None else self._account.window.state_dict(now)
            in_flight = sum(amount for _, amount, _ in self._open.values())
            if self._account.window is not None and self._account.reserved:
                window.append([0.0, 0.0, self._account.reserved])
            return {
                "unit": self.unit,
                "per": self.per,
                "spent": 0 if self._account.window is not None else self._account.fixed + self._account.reserved,
                "window": window,
                "total": self._total + in_flight,
                "settled_pairs": self._settled,
                "denied_pairs": self._denied,
                "excess": self._excess,
                "overshoot": self._overshoot,
                "recent": list(self._pair.recent),
                "mean": self._pair.mean,
                "next_id": self._next_id,
            }

    def load_state_dict(self, state: object, where: str = "budget") -> None:
        """Continue from a state. Unit and period must be the same; the limit may be a new one.

        Raises:
            CheckpointError: the state is damaged or of another kind of budget. The budget is then as before.
            InputError: something is in flight.
        """
        parsed = self._parse(state, where)
        with self._lock:
            self._check_idle()
            self.__dict__.update(parsed)

    def check_state(self, state: object, where: str = "budget") -> None:
        """Raise what :meth:`load_state_dict` would raise, and change nothing."""
        self._parse(state, where)
        with self._lock:
            self._check_idle()

    # -- inside the lock ---------------------------------------------------------------------------------------------

    def _time(self) -> float:
        self._now = max(self._now, self.clock.now())
        return self._now

    def _set_aside(self, pairs: int, amount: int, account: _Account) -> Reservation:
        reservation = Reservation(self._next_id, pairs, (self._units(amount),))
        self._next_id += 1
        self._open[reservation.id] = (reservation, amount, account)
        account.reserved += amount
        account.pairs += pairs
        return reservation

    def _close(self, reservation: Reservation) -> tuple[int, _Account]:
        known = self._open.get(reservation.id) if isinstance(reservation, Reservation) else None
        if known is None or known[0] != reservation:
            reject("reservation", reservation, "a reservation of this budget that was not settled before")
        _, amount, account = self._open.pop(reservation.id)
        account.reserved -= amount
        account.pairs -= reservation.pairs
        return amount, account

    def _charge(self, reservation: Reservation, usage: JudgeUsage | None) -> int | None:
        """What the judge says it cost; None where it does not say all."""
        if self.unit == "pairs":
            return reservation.pairs
        if usage is None:
            return None
        tokens = usage.prompt_tokens + usage.completion_tokens
        amount = {"calls": usage.calls, "tokens": tokens, "cost": usage.cost}[self.unit]
        if not math.isfinite(amount) or min(amount, usage.calls, usage.prompt_tokens, usage.completion_tokens) < 0:
            log.warning("a judge reports %r %s; %d pairs count as reserved", amount, self.unit, reservation.pairs)
            return None
        if usage.calls and (usage.unpriced_calls if self.unit == "cost" else self.unit == "tokens" and not tokens):
            return None
        return round(amount * self._scale)

    def _cautious(self, charge: int | None, reserved: int, usage: JudgeUsage | None) -> int:
        if charge is not None:
            return charge
        if self.unit == "cost" and usage is not None and 0 < usage.cost < math.inf:
            return max(reserved, round(usage.cost * self._scale))  # the priced calls alone may have cost more
        return reserved

    def _parse(self, state: object, where: str) -> dict[str, Any]:
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import BudgetState

        found = checked(BudgetState, state, where)
        for name, own in (("unit", self.unit), ("per", self.per)):
            if getattr(found, name) != own:
                refuse(f"{where}.{name}", getattr(found, name), f"{own!r}, as this object was made with")
        account = _Account(WINDOWS.get(self.per))
        account.fixed = found.spent
        with self._lock:
            now = self._time()
        if account.window is not None:
            account.window.load_state(found.window, now)
        elif found.window:
            refuse(f"{where}.window", found.window, "an empty list")
        return {
            "_account": account,
            "_pair": PairCost(self._pair.bound, self._pair.first, found.recent, found.mean),
            "_next_id": found.next_id,
            "_settled": found.settled_pairs,
            "_denied": found.denied_pairs,
            **{f"_{name}": getattr(found, name) for name in ("total", "excess", "overshoot")},
        }

    def _check_idle(self) -> None:
        if self._open:
            reject("state", f"{len(self._open)} reservations in flight", "none: settle them before loading a state")

    def _units(self, grains: float) -> float:
        return float(grains / self._scale)

    def _grains(self, name: str, value: object, low: int) -> int:
        kind = "number" if self.unit == "cost" else "whole number"
        number = value in Within()
        grains = round(value * self._scale) if number else -1  # type: ignore[operator]
        if grains < low or (self.unit != "cost" and grains != value):
            reject(name, repr(value), f"a finite {kind}, {'positive' if low else 'not negative'}")
        return grains
