"""Groups that may be the rest of what a process before this one has answered: scored whole, or not at all.

A server that is killed takes along what it has answered. A member whose answer was lost asks again and finds no
siblings, which have theirs: scored without them at the time limit, its reward would contradict what they were told.
Nothing says so but the circumstances:

- the process began less than a time limit ago, and may have had one before it;
- the call says that it was made before, and lost (:data:`AGAIN`);
- the group was refused for this before, and its members ask again.

In each of them a group whose members do not all come is refused, with the reason.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from rmcore._base.clock import Clock
from rmcore.integrations.server.members import RESENT, LateError, OpenGroup

__all__ = ["AGAIN", "Doubts"]

AGAIN = "x-rmcore-again"
"""On a request that was made before and whose answer was lost: a server may have answered siblings of its member."""


class Doubts:
    """Which groups may be the rest of another's.

    Args:
        first_s: seconds from now in which every new group may be.
        keep_s: seconds for which a refusal is remembered.
        most: refusals remembered, the latest ones.
        clock: of both.
    """

    def __init__(self, first_s: float, keep_s: float, most: int, clock: Clock) -> None:
        self.first_s, self.keep_s, self.most = first_s, keep_s, most
        self._clock, self._born = clock, clock.now()
        self._refused: OrderedDict[Hashable, float] = OrderedDict()

    def look_at(self, group: OpenGroup) -> None:
        """At a group that has opened, or that a member has joined."""
        now = self._clock.now()
        until = self._refused.get(_name(group), now)
        group.resent |= RESENT.get() or now < self._born + self.first_s or now < until

    def refuse(self, group: OpenGroup, time_limit_s: float) -> LateError:
        """The error of a group that is not whole at its limit; its members may come again, all of them."""
        now = self._clock.now()
        self._refused.pop(_name(group), None)
        self._refused[_name(group)] = now + self.keep_s
        while self._refused and (len(self._refused) > self.most or next(iter(self._refused.values())) <= now):
            self._refused.popitem(last=False)
        return LateError(
            f"members: got {len(group.slots)} of {group.size} within {time_limit_s:g} s, expected all: a server that "
            "has ended may have answered the others, and this one does not know what (it began "
            f"{now - self._born:.0f} s ago, or calls were sent again)"
        )


def _name(group: OpenGroup) -> Hashable:
    return (group.digest, group.size) if group.by_content else group.key
