"""Copies of scored groups, at other assemblers: what an assembler has answered, the one after it knows.

An assembler that dies takes along what its groups' members were answered. One whose answer was lost with it, or with
the node both were on, asks again, and its siblings have theirs: to a successor that knows nothing its group would never
be whole. So every scored group is copied to two other assemblers (:func:`holders`) before its answers go out, all
groups of a moment in one call. An assembler that is started asks them for the copies of its name before it serves.

Copies are a help, and never a reason not to answer: who does not take them within :data:`LIMIT_S` is not waited for
any more until it takes some. They are kept for :data:`KEEP_S`, and of each assembler up to :data:`MAX_BYTES`.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rmcore._base.clock import Clock, SystemClock
from rmcore.engine.group_score import GroupScore
from rmcore.integrations.server.assembly import GroupAssembly
from rmcore.integrations.server.members import OpenGroup, Outcome, Slot

__all__ = ["KEEP_S", "LIMIT_S", "MAX_BYTES", "Copies", "CopyCalls", "GroupCopy", "holders"]

log = logging.getLogger(__name__)

KEEP_S = 180.0
"""Seconds for which a copy is kept. On a busy machine a node's successors took 74 s to be there."""
MAX_BYTES = 32 * 2**20
"""Of the copies of one assembler at each holder, about; the oldest go first."""
LIMIT_S = 0.5
"""Seconds for which answers wait for their group's copies to be taken, at most."""
_HOLDERS = 2
_RESTORE_S = 3.0
"""Seconds for which an assembler that is started waits for what the others hold."""
_REPAIR_S = 10.0
_OVERHEAD = 1500
"""Bytes of a copy beside its tensors, and of a verdict: what Python's objects take, about."""


@dataclass(frozen=True)
class GroupCopy:
    """A scored group in plain values, for another process.

    Attributes:
        name: of the copy; no other has it.
        key, digest, size, principle, by_content: the group's.
        members: digest of each slot's text.
        score: the :class:`~rmcore.engine.group_score.GroupScore` by field, tensors as bytes.
        slots, rows, notes: of its :class:`~rmcore.integrations.server.members.Outcome`.
        reached: slots whose results are known to have arrived.
        nbytes: what it takes, about.
    """

    name: str
    key: Hashable
    digest: str
    size: int
    principle: str
    by_content: bool
    members: dict[int, bytes]
    score: dict[str, Any]
    slots: tuple[int, ...]
    rows: dict[int, int]
    notes: tuple[object, ...]
    nbytes: int
    reached: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, group: OpenGroup, name: str) -> GroupCopy:
        """The copy of a scored group."""
        assert group.outcome is not None
        outcome, members = group.outcome, {slot: member.digest for slot, member in group.slots.items()}
        score = {one.name: _packed(getattr(outcome.score, one.name)) for one in fields(GroupScore)}
        return cls(
            name,
            group.key,
            group.digest,
            group.size,
            group.principle,
            group.by_content,
            members,
            score,
            outcome.slots,
            outcome.rows,
            outcome.notes,
            _OVERHEAD + 100 * len(members) + sum(map(_nbytes, score.values())),
        )

    def opened(self) -> OpenGroup:
        """The group, as an assembly remembers one; to be made on a running loop."""
        score = GroupScore(**{name: _unpacked(value) for name, value in self.score.items()})
        outcome = Outcome(score, self.slots, self.rows, self.notes)
        group = OpenGroup(self.key, None, self.digest, self.size, 0.0, self.principle, self.by_content)
        for slot, digest in self.members.items():
            known = slot in self.reached
            group.slots[slot] = Slot(digest, None, delivered=known, reached=known)
        group.closed, group.outcome = True, outcome
        group.task = asyncio.get_running_loop().create_future()
        group.task.set_result(outcome)
        return group


Aged: TypeAlias = tuple[float, GroupCopy]
"""A copy, and the seconds since its group was scored."""


class CopyCalls(Protocol):
    """Another assembler, for copies."""

    async def hold(self, origin: str, copies: Sequence[Aged], reached: Mapping[str, Sequence[int]]) -> None:
        """Keep copies of ``origin``'s groups; of some that it has, take note which slots' results have arrived."""
        ...

    async def held(self, asker: str) -> list[Aged]:
        """The copies that it has of the groups of ``asker``, which has just been started."""
        ...


def holders(name: str, names: Sequence[str]) -> list[str]:
    """Who holds the copies of an assembler: the next two of all, the first coming after the last."""
    at = names.index(name)
    return [*names[at + 1 :], *names[:at]][:_HOLDERS]


class Copies:
    """The copies of one assembler's groups, and those that it holds of others'.

    Args:
        name: of this assembler.
        assemblers: all of them by name, in the same order everywhere; this one is not called.
        clock: of the copies' age; a seam for tests.
    """

    def __init__(self, name: str, assemblers: Mapping[str, CopyCalls], clock: Clock | None = None) -> None:
        names = list(assemblers)
        self.name = name
        self._clock: Clock = clock or SystemClock()
        self._holders = {other: assemblers[other] for other in holders(name, names)}
        held = [other for other in names if other != name and name in holders(other, names)]
        self._neighbours = self._holders | {other: assemblers[other] for other in held}
        self._names = (f"{uuid.uuid4().hex}-{number}" for number in itertools.count())
        self._shelves: defaultdict[str, _Shelf] = defaultdict(_Shelf)
        self._unsettled: dict[str, OpenGroup] = {}
        self._moment: list[Aged] = []
        self._sending: asyncio.Future[None] | None = None
        self._away: set[str] = set()
        self._under_way: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- of this one's groups ----------------------------------------------------------------------------------------

    async def hand_on(self, group: OpenGroup) -> None:
        """Have a scored group copied; returns when others have it, or do not take it in time."""
        copy = GroupCopy.of(group, next(self._names))
        now = self._clock.now()
        self._shelves[self.name].put(copy, now, now)
        if group.by_content:
            self._unsettled[copy.name] = group
        self._moment.append((0.0, copy))
        if self._sending is None:
            self._sending = self._begin(self._send_moment())
        await asyncio.shield(self._sending)

    def beat(self) -> None:
        """Tell the holders which results have arrived since, and forget what is too old. To be called now and then."""
        for shelf in self._shelves.values():
            shelf.forget(self._clock.now())
        news: dict[str, list[int]] = {}
        for name, group in list(self._unsettled.items()):
            kept = self._shelves[self.name].copies.get(name)
            reached = {number for number, slot in group.slots.items() if slot.reached}
            if kept is None or len(reached) == len(group.slots):
                del self._unsettled[name]
            if kept is not None and (fresh := reached - kept[1].reached):
                kept[1].reached.update(fresh)
                news[name] = sorted(fresh)
        if news:
            self._send([], news)

    async def restore(self, assembly: GroupAssembly) -> int:
        """Have an assembly remember what others hold of this name's groups; returns how many. Errors are logged.

        Groups by name are remembered for as long as they would have been, those by content for as long as their copies
        are kept: a text may come again as another group's, and nobody knows whether its last result has arrived.
        """
        calls = {name: self._begin(other.held(self.name)) for name, other in self._neighbours.items()}
        if not calls:
            return 0
        await asyncio.wait(calls.values(), timeout=_RESTORE_S)
        found: dict[str, Aged] = {}
        for name, call in calls.items():
            if not call.done() or call.cancelled() or call.exception() is not None:
                call.cancel()
                log.warning("%s does not tell what it holds of %s's groups", name, self.name)
                continue
            for age, copy in call.result():
                known = found.setdefault(copy.name, (age, copy))[1]
                known.reached.update(copy.reached)
        left = {name: (KEEP_S if copy.by_content else assembly.keep_s) - age for name, (age, copy) in found.items()}
        now = self._clock.now()
        for name in sorted(found, key=left.__getitem__):
            age, copy = found[name]
            group = copy.opened()
            assembly.restore(group, left[name])
            self._shelves[self.name].put(copy, now - age, now)
            if copy.by_content:
                self._unsettled[name] = group
        if found:
            log.warning("%s knows %d groups that the one before it scored", self.name, len(found))
        return len(found)

    async def _send_moment(self) -> None:
        copies, self._moment, self._sending = self._moment, [], None
        if calls := self._send(copies, {}):
            await asyncio.wait(calls)

    def _send(self, copies: Sequence[Aged], reached: Mapping[str, Sequence[int]]) -> list[asyncio.Task[Any]]:
        """Call the holders; returns the calls to be waited for. Who is away is tried by one call at a time."""
        waited = []
        for holder in self._holders:
            away = holder in self._away
            if not away or not self._under_way[holder]:
                call = self._begin(self._give(holder, copies, reached))
                waited += [] if away else [call]
        return waited

    async def _give(
        self, holder: str, copies: Sequence[Aged], reached: Mapping[str, Sequence[int]], within_s: float | None = None
    ) -> None:
        self._under_way[holder] += 1
        try:
            async with asyncio.timeout(within_s or LIMIT_S):
                await self._holders[holder].hold(self.name, copies, reached)
        except Exception as error:
            if holder not in self._away:
                log.warning("%s takes no copies of %s's groups (%s)", holder, self.name, type(error).__name__)
            self._away.add(holder)
        else:
            self._is_back(holder)
        finally:
            self._under_way[holder] -= 1

    def _is_back(self, holder: str) -> None:
        if holder in self._away:
            self._away.discard(holder)
            log.warning("%s takes copies of %s's groups again", holder, self.name)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        # Not a request's: Serve cancels with a request what is called in its context.
        task = asyncio.create_task(work, name="rmcore copies", context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- of others' --------------------------------------------------------------------------------------------------

    def hold(self, origin: str, copies: Iterable[Aged], reached: Mapping[str, Sequence[int]]) -> None:
        """As :meth:`CopyCalls.hold`."""
        shelf, now = self._shelves[origin], self._clock.now()
        for age, copy in copies:
            shelf.put(copy, now - age, now)
        for name, slots in reached.items():
            if name in shelf.copies:
                shelf.copies[name][1].reached.update(slots)

    def held(self, asker: str) -> list[Aged]:
        """As :meth:`CopyCalls.held`. What the asker's predecessor held of this one's groups is given to it anew."""
        if asker in self._holders:
            self._is_back(asker)
            mine = self._shelves[self.name].aged(self._clock.now())
            self._begin(self._give(asker, mine, {}, _REPAIR_S))
        return self._shelves[asker].aged(self._clock.now())


class _Shelf:
    """The copies of one assembler's groups, with the times when those were scored."""

    def __init__(self) -> None:
        self.copies: OrderedDict[str, tuple[float, GroupCopy]] = OrderedDict()
        self.nbytes = 0

    def put(self, copy: GroupCopy, scored: float, now: float) -> None:
        if copy.name not in self.copies:
            self.copies[copy.name] = (scored, copy)
            self.nbytes += copy.nbytes
            self.forget(now)

    def forget(self, now: float) -> None:
        while self.copies:
            scored, copy = next(iter(self.copies.values()))
            if now - scored < KEEP_S and self.nbytes <= MAX_BYTES:
                return
            del self.copies[copy.name]
            self.nbytes -= copy.nbytes

    def aged(self, now: float) -> list[Aged]:
        return [(now - scored, copy) for scored, copy in self.copies.values() if now - scored < KEEP_S]


# -- tensors as plain values -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Array:
    """A tensor of its own: pickled as it is, one that is a view of its batch would take all of that along."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        return _Array(array.dtype.str, array.shape, array.tobytes())
    return {name: _packed(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Array):
        return torch.from_numpy(np.frombuffer(value.data, value.dtype).reshape(value.shape).copy())
    return {name: _unpacked(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def _nbytes(value: Any) -> int:
    if isinstance(value, _Array):
        return len(value.data)
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    decisions = value if isinstance(value, tuple) else ()
    return sum(100 + (_OVERHEAD + len(one.verdict.critique) if one.verdict else 0) for one in decisions)
