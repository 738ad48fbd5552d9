"""The rows of shared limits in PostgreSQL: every statement that :mod:`rmcore.judge.store.shared_limits` makes.

``rmcore.limits`` has a row a name that is limited (until when it is held) and a row a run (what it has used in all);
``rmcore.admissions`` has a row a request that was let through, with the database's clock. A run's name has a prefix, so
that a key and a run may be called the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rmcore.judge.store.postgres_connection import Connection

__all__ = ["Admissions", "agreed_currency"]

_RUN: Final = "run:"

_CURRENCY: Final = """
    INSERT INTO rmcore.limits (name, currency) VALUES (%s, %s) ON CONFLICT (name) DO UPDATE
    SET currency = CASE WHEN rmcore.limits.currency = '' THEN excluded.currency ELSE rmcore.limits.currency END
    RETURNING currency"""
_NAME: Final = "INSERT INTO rmcore.limits (name) VALUES (%s) ON CONFLICT (name) DO NOTHING"
_LOCK: Final = """
    SELECT name, greatest(0, extract(epoch FROM held_until - clock_timestamp()))::float8
    FROM rmcore.limits WHERE name = ANY(%s) ORDER BY name FOR UPDATE"""
_WINDOW: Final = """
    SELECT count(*), coalesce(sum(tokens), 0)::bigint FROM rmcore.admissions
    WHERE name = %s AND at > clock_timestamp() - %s * interval '1 s'"""
# The oldest admission that must leave the window before another one has room.
_READY: Final = """
    SELECT greatest(0, extract(epoch FROM min(at) + %s * interval '1 s' - clock_timestamp()))::float8 FROM (
        SELECT at, count(*) OVER w AS requests, sum(tokens) OVER w AS tokens FROM rmcore.admissions
        WHERE name = %s AND at > clock_timestamp() - %s * interval '1 s'
        WINDOW w AS (ORDER BY at, id)) AS entries
    WHERE requests >= %s AND tokens >= %s"""
_TOTALS: Final = "SELECT requests, tokens, cost FROM rmcore.limits WHERE name = %s"
_ADD: Final = (
    "UPDATE rmcore.limits SET requests = requests + %s, tokens = tokens + %s, cost = cost + %s WHERE name = %s"
)
_ADMIT: Final = "INSERT INTO rmcore.admissions (id, name, at, tokens, cost) VALUES (%s, %s, clock_timestamp(), %s, %s)"
# Those that left every window are of no use; a run's sums are kept apart.
_FORGET: Final = "DELETE FROM rmcore.admissions WHERE name = %s AND at < clock_timestamp() - %s * interval '2 s'"
_HOLD: Final = """
    UPDATE rmcore.limits SET held_until = greatest(held_until, clock_timestamp() + %s * interval '1 s')
    WHERE name = %s"""


def agreed_currency(connection: Connection, run: str, currency: str) -> str:
    """What a run's money is counted in: ``currency``, unless a process said something else before."""
    ((found,),) = connection.execute(_CURRENCY, (_RUN + run, currency)).fetchall()
    return str(found)


@dataclass(frozen=True)
class Admissions:
    """The rows of one name and one run. All but :meth:`make_names` belong into a transaction, after :meth:`lock`.

    Costs are in billionths of the run's currency.
    """

    connection: Connection
    name: str
    run: str
    window_s: float

    def make_names(self) -> None:
        """A row for the name and one for the run, unless there are."""
        for name in self._names():
            self.connection.execute(_NAME, (name,))

    def _names(self) -> list[str]:
        return sorted({self.name, _RUN + self.run})

    def lock(self) -> float:
        """Have both rows to itself until the transaction ends; seconds for which the name is held."""
        return {name: held or 0.0 for name, held in self.connection.execute(_LOCK, (self._names(),))}[self.name]

    def in_window(self) -> tuple[int, int]:
        """(requests, tokens) of the last ``window_s``."""
        ((requests, tokens),) = self.connection.execute(_WINDOW, (self.name, self.window_s)).fetchall()
        return requests, tokens

    def seconds_until(self, requests: int, tokens: int) -> float | None:
        """Until so many requests and so many tokens have left the window; None: they are not in it."""
        values = (self.window_s, self.name, self.window_s, requests, tokens)
        ((seconds,),) = self.connection.execute(_READY, values).fetchall()
        return None if seconds is None else float(seconds)

    def totals(self) -> tuple[int, int, int]:
        """(requests, tokens, cost) of the whole run."""
        ((requests, tokens, cost),) = self.connection.execute(_TOTALS, (_RUN + self.run,)).fetchall()
        return requests, tokens, cost

    def admit(self, admitted: Sequence[tuple[str, int, int]]) -> None:
        """Write admissions, each (id, tokens, cost), and add them to the run's totals."""
        with self.connection.cursor() as cursor:
            cursor.executemany(_ADMIT, [(id, self.name, tokens, cost) for id, tokens, cost in admitted])
        self._add(len(admitted), sum(tokens for _, tokens, _ in admitted), sum(cost for _, _, cost in admitted))
        self.connection.execute(_FORGET, (self.name, max(self.window_s, 600.0)))

    def settle(self, id: str, tokens: int, cost: int) -> None:
        """Count what was used. Done twice it is done once, in case a connection was lost in the middle."""
        found = self.connection.execute("SELECT tokens, cost FROM rmcore.admissions WHERE id = %s", (id,)).fetchone()
        if found is not None:  # else it left the window long ago, and its reservation stays counted
            update = "UPDATE rmcore.admissions SET tokens = %s, cost = %s WHERE id = %s"
            self.connection.execute(update, (tokens, cost, id))
            self._add(0, tokens - found[0], cost - found[1])

    def withdraw(self, id: str) -> None:
        """Count an admission no longer."""
        delete = "DELETE FROM rmcore.admissions WHERE id = %s RETURNING tokens, cost"
        gone = self.connection.execute(delete, (id,)).fetchone()
        if gone is not None:
            self._add(-1, -gone[0], -gone[1])

    def hold(self, seconds: float) -> None:
        """Hold the name for so long from now on, unless it is held for longer."""
        self.connection.execute(_HOLD, (seconds, self.name))

    def _add(self, requests: int, tokens: int, cost: int) -> None:
        self.connection.execute(_ADD, (requests, tokens, cost, _RUN + self.run))
