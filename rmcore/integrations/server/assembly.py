"""Whole groups out of members that arrive one at a time: what trainers that score single samples need.

OpenRLHF and verl send each response of a group by itself, from anywhere, and a pairwise model needs all of them. Here
every member waits until its group is whole, the group is scored once, and each gets its own part:

    slot by slot   :meth:`GroupAssembly.join`: the caller knows the group's id, its size and the member's slot.
    by content     :meth:`GroupAssembly.join_by_content`: the caller knows the prompt and the response only.

Rules, the same for both. A member that fails to arrive must not stall its siblings: ``time_limit_s`` after the first
one came, those present are scored, and a later one is refused (:class:`LateError`), never scored as 0. A caller that
goes away does not take the group along, and one that asks again gets what the first call got. Of a scored group only
digests of the texts are kept. What may be the rest of a group that a process before this one has answered is scored
whole or not at all (:mod:`rmcore.integrations.server.doubts`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_response
from rmcore.engine.group_score import GroupScore
from rmcore.integrations.server.doubts import Doubts
from rmcore.integrations.server.members import (
    AssemblyStats,
    BusyError,
    ConflictError,
    LateError,
    MemberResult,
    OpenGroup,
    Outcome,
    Slot,
    group_digest,
    text_digest,
)

__all__ = ["AssemblyStats", "BusyError", "ConflictError", "GroupAssembly", "LateError", "MemberResult", "Score"]

log = logging.getLogger(__name__)

_STALLED_S = 1.0
"""Seconds by which a timer may be late on a loop that is only busy."""
_CATCH_UP_S = 5.0

Score: TypeAlias = Callable[..., Awaitable[GroupScore]]
"""Scores one group: ``score(prompt, responses)``, with ``principle=`` where it has one of its own; batching across
groups is its business."""


class GroupAssembly:
    """Puts groups together on one event loop.

    Args:
        score: scores a whole group.
        time_limit_s: seconds from a group's first member to its scoring, whoever is missing by then. It must be below
            the trainer's own timeout of a call (OpenRLHF: 180 s).
        keep_s: seconds a finished group is remembered for callers that ask again.
        abandon_s: seconds after which a member by content whose caller has gone away is taken out of a group that still
            waits for others: a trainer that was killed and started again must not meet what it left behind.
        max_members: members waiting at most; more are refused with :class:`BusyError`.
        max_kept: finished groups remembered at most, the latest ones.
        doubt_s: seconds from now in which groups that open are scored whole or not at all: a process before this one
            may have answered some of their members. 0 where there was none.
        finished: called with each scored group before its results go out: to have it remembered elsewhere, too
            (:meth:`restore`). They wait for it, so it must be quick; what it raises is logged.
        clock: a seam for tests.
    """

    def __init__(
        self,
        score: Score,
        *,
        time_limit_s: float = 120.0,
        keep_s: float = 600.0,
        abandon_s: float = 15.0,
        max_members: int = 65_536,
        max_kept: int = 16_384,
        doubt_s: float = 0.0,
        finished: Callable[[OpenGroup], Awaitable[None]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_number("time_limit_s", time_limit_s, Within(above=0), "seconds above 0")
        check_number("keep_s", keep_s, Within(least=0), "seconds, at least 0")
        check_number("abandon_s", abandon_s, Within(least=0), "seconds, at least 0")
        check_number("doubt_s", doubt_s, Within(least=0), "seconds, at least 0")
        check_number("max_members", max_members, COUNT, "at least 1")
        check_number("max_kept", max_kept, Within(whole=True, least=0), "at least 0")
        self.score = score
        self.time_limit_s = time_limit_s
        self.keep_s = keep_s
        self.abandon_s = abandon_s
        self.max_members = max_members
        self.max_kept = max_kept
        self.finished = finished
        self.stats = AssemblyStats()
        self.clock: Clock = clock or SystemClock()
        self.doubts = Doubts(doubt_s, keep_s, max_kept, self.clock)
        self._groups: dict[Hashable, OpenGroup] = {}
        self._by_prompt: dict[str, list[OpenGroup]] = {}
        self._finished: OrderedDict[Hashable, tuple[float, OpenGroup]] = OrderedDict()
        self._waiting = 0
        self._serial = 0
        self._draining = False
        self._cut_short = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Members waiting for their group now."""
        return self._waiting

    @property
    def open_groups(self) -> int:
        """Groups not scored yet."""
        return sum(not group.closed for group in self._groups.values())

    async def join(
        self,
        group_id: Hashable,
        slot: int,
        size: int,
        prompt: Prompt,
        response: Response,
        *,
        attempt: Hashable = 0,
        principle: str = "",
        note: object = None,
    ) -> MemberResult:
        """Wait for the group ``(group_id, attempt)`` and return this member's part.

        Args:
            group_id: what the trainer calls the group.
            slot: which of its members this is, from 0.
            size: how many members it has.
            prompt: the same for all members.
            response: this member's text.
            attempt: a new value makes a new group of the same id (a later epoch, a resampled prompt).
            principle: what its judge is to judge the group by, the same for all members; empty for the judge's own.
            note: of this member; each of its siblings is told all of them.

        Raises:
            ConflictError: size, prompt, principle or the slot's response contradict what came before.
            InputError: a bad slot, or the group cannot be scored.
            LateError: the group was scored without this slot.
            BusyError: too many members wait, or the assembly is draining and the group is new.
        """
        if size < 1:
            reject("size", size, "at least 1")
        if not 0 <= slot < size:
            reject("slot", slot, f"0 to {size - 1}")
        response = canonical_response(response)
        self._forget_old()
        key = ("id", group_id, attempt)
        group = self._groups.get(key)
        digest = group_digest(prompt, principle)
        if group is None:
            group = self._open(key, prompt, digest, size, principle)
        elif group.size != size:
            raise ConflictError(f"size: got {size}, expected {group.size}, as its siblings of group {group_id!r} said")
        elif group.digest != digest:
            what = "principle" if group.digest == group_digest(prompt, group.principle) else "prompt"
            raise ConflictError(f"{what}: got another {what}, expected that of its siblings of group {group_id!r}")
        known = group.slots.get(slot)
        if known is not None:
            if known.digest != text_digest(response):
                raise ConflictError(
                    f"response: got another text, expected that of the first call for slot {slot} of group {group_id!r}"
                )
            self.stats.retries += 1
        else:
            self._add(group, slot, response, note)
        return await self._wait(group, slot)

    async def join_by_content(
        self,
        prompt: Prompt,
        response: Response,
        size: int,
        *,
        kin: str | int | None = None,
        principle: str = "",
        note: object = None,
    ) -> MemberResult:
        """Wait for a group of ``size`` responses to ``prompt`` and return this one's part.

        Equal responses are members of their own. A call is taken for the repetition of an earlier one, and shares its
        result, only if that one's caller has gone away without an answer (or :meth:`MemberResult.lost` says so): ask
        again only after the first call is known to be over here, a second later, say. Where an answer was lost and
        nobody noticed, its repetition finds no siblings; at the time limit it gets the result of the earlier group that
        its text was in, rather than that of a group of its own.

        Args:
            prompt: the same for all members.
            response: this member's text.
            size: how many members the group has.
            kin: what else they have in common, a task's name, say.
            principle: as in :meth:`join`, as is ``note``; members of another one are of another group.
            note: of this member.

        Raises:
            InputError: a bad size, or the group cannot be scored.
            BusyError: as :meth:`join`.
        """
        if size < 1:
            reject("size", size, "at least 1")
        response = canonical_response(response)
        self._forget_old()
        name, digest = group_digest(prompt, principle, kin), text_digest(response)
        self._forget_abandoned(name)
        groups = self._by_prompt.get(name, [])
        for group in groups:
            for slot, known in group.slots.items():
                if known.digest == digest and not known.waiters and not known.delivered and group.size == size:
                    self.stats.retries += 1
                    return await self._wait(group, slot)
        filling = next((g for g in groups if not g.closed and len(g.slots) < g.size and g.size == size), None)
        if filling is None:
            self._serial += 1
            filling = self._open(("content", name, self._serial), prompt, name, size, principle, by_content=True)
            self._by_prompt.setdefault(name, []).append(filling)
        slot = next(k for k in range(size) if k not in filling.slots)
        self._add(filling, slot, response, note)
        return await self._wait(filling, slot)

    def restore(self, group: OpenGroup, keep_s: float) -> None:
        """Remember for ``keep_s`` a group that an assembly before this one scored, as one of its own.

        Groups are to come in the order of their ``keep_s``, before any member; one of a name in use is left out.
        """
        if group.by_content:
            self._serial += 1
            group.key = ("content", group.digest, self._serial)
            self._by_prompt.setdefault(group.digest, []).append(group)
        elif group.key in self._groups:
            return
        self._groups[group.key] = group
        self._finished[group.key] = (self.clock.now() + keep_s, group)

    async def drain(self, within_s: float | None = None) -> None:
        """Take no new groups, let the open ones fill until their time limit, and return when all are scored.

        Args:
            within_s: seconds after which open groups are scored with the members they have, if that is sooner.
        """
        self._draining = True
        cut = None if within_s is None else asyncio.create_task(self._cut_after(within_s))
        try:
            while tasks := [group.task for group in self._groups.values() if group.task and not group.task.done()]:
                await asyncio.wait(tasks)
        finally:
            if cut is not None:
                cut.cancel()
        while self._waiting:  # let the waiters take their results
            await asyncio.sleep(0)

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _cut_after(self, seconds: float) -> None:
        await self.clock.sleep(seconds)
        self._cut_short.set()

    def _open(
        self, key: Hashable, prompt: Prompt, digest: str, size: int, principle: str, by_content: bool = False
    ) -> OpenGroup:
        if self._draining:
            self.stats.refused += 1
            raise BusyError("draining: no new groups are taken", 1.0)
        group = OpenGroup(key, prompt, digest, size, self.clock.now() + self.time_limit_s, principle, by_content)
        self._groups[key] = group
        group.task = asyncio.create_task(self._run(group), name="rmcore group")
        group.task.add_done_callback(partial(self._ended, group))
        return group

    def _ended(self, group: OpenGroup, task: asyncio.Task[Outcome]) -> None:
        if task.cancelled():  # by somebody else, and maybe before it began: not a group that others may wait for
            group.closed = True
            self._forget(group)
        else:
            task.exception()  # looked at: there may be nobody left who does

    def _add(self, group: OpenGroup, slot: int, response: Canonical, note: object) -> None:
        if group.closed:
            self.stats.late_members += 1
            raise LateError(
                f"slot: got {slot} of a group of {group.size} after its time limit of {self.time_limit_s:g} s, "
                f"expected it before; the group was scored with the members {sorted(group.slots)}"
            )
        if self._waiting >= self.max_members:
            self.stats.refused += 1
            self._close_if_empty(group)
            raise BusyError(f"{self._waiting} members wait already", min(self.time_limit_s, 5.0))
        group.slots[slot] = Slot(text_digest(response), response, note)
        self.doubts.look_at(group)
        self.stats.members += 1
        if len(group.slots) == group.size:
            group.whole.set()

    def _forget(self, group: OpenGroup) -> None:
        self._groups.pop(group.key, None)
        self._finished.pop(group.key, None)
        siblings = self._by_prompt.get(group.digest, [])
        if group in siblings:
            siblings.remove(group)
        if not siblings:
            self._by_prompt.pop(group.digest, None)

    async def _run(self, group: OpenGroup) -> Outcome:
        """Wait for the members, then score those present."""
        try:
            await self._until_whole(group)
            group.closed = True
            group.outcome = self._answered_before(group) or await self._scored(group)
            self._finished[group.key] = (self.clock.now() + self.keep_s, group)
            group.prompt = None
            for slot in group.slots.values():
                slot.text = None
            await self._tell(group)
            return group.outcome
        except Exception:
            # Its members are told, and may come again as a new group: an error is not a result to remember.
            self.stats.failed_groups += 1
            self._forget(group)
            raise
        finally:
            group.closed = True

    async def _tell(self, group: OpenGroup) -> None:
        if self.finished is None:
            return
        try:
            await self.finished(group)
        except Exception:  # the group has its result, whoever else knows
            log.exception("a scored group is remembered here alone")

    async def _scored(self, group: OpenGroup) -> Outcome:
        slots = tuple(sorted(group.slots))
        if len(slots) < group.size and group.resent:
            raise self.doubts.refuse(group, self.time_limit_s)
        if len(slots) < group.size:
            self.stats.partial_groups += 1
            log.warning("scored %d of %d members: the time limit passed", len(slots), group.size)
        assert group.prompt is not None
        own = {"principle": group.principle} if group.principle else {}
        result = await self.score(group.prompt, [group.slots[slot].text or "" for slot in slots], **own)
        self.stats.groups += 1
        notes = tuple(group.slots[slot].note for slot in slots)
        return Outcome(result, slots, {slot: row for row, slot in enumerate(slots)}, notes)

    def _answered_before(self, group: OpenGroup) -> Outcome | None:
        """For members by content whose siblings did not come: the latest outcome of a whole group with their texts."""
        if not group.by_content or len(group.slots) == group.size:
            return None
        for earlier in reversed(self._by_prompt.get(group.digest, [])):
            if earlier.outcome is None or earlier.size != group.size or len(earlier.slots) < earlier.size:
                continue
            free = list(earlier.slots.items())
            rows: dict[int, int] = {}
            for slot, member in group.slots.items():
                match = next((k for k, (_, known) in enumerate(free) if known.digest == member.digest), None)
                if match is None:
                    break
                rows[slot] = earlier.outcome.rows[free.pop(match)[0]]
            else:
                self.stats.recovered += len(rows)
                log.warning("%d members came a second time without their siblings; they share the result", len(rows))
                return replace(earlier.outcome, rows=rows)
        return None

    async def _until_whole(self, group: OpenGroup) -> None:
        """Until all have come, or the time limit; where this process stood still over it, until it has caught up."""
        await self._whole_within(group)
        late_s = self.clock.now() - group.deadline
        if late_s > _STALLED_S and not group.whole.is_set() and not self._cut_short.is_set():
            # Nobody was let in meanwhile (a suspended machine, a paused container); who came waits at the door.
            log.warning("stood still for %.1f s over a group's time limit; its members get as long to come in", late_s)
            group.deadline = self.clock.now() + min(late_s, _CATCH_UP_S)
            await self._whole_within(group)

    async def _whole_within(self, group: OpenGroup) -> None:
        whole = asyncio.ensure_future(group.whole.wait())
        limit = asyncio.ensure_future(self.clock.sleep(max(0.0, group.deadline - self.clock.now())))
        cut = asyncio.ensure_future(self._cut_short.wait())
        try:
            await asyncio.wait({whole, limit, cut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in (whole, limit, cut):
                waiting.cancel()

    async def _wait(self, group: OpenGroup, slot: int) -> MemberResult:
        member = group.slots[slot]
        member.waiters += 1
        self._waiting += 1
        try:
            assert group.task is not None
            await asyncio.wait({group.task})  # unlike awaiting it, this leaves it alone when the caller is cancelled
            if group.task.cancelled():
                raise BusyError("the group was cancelled", 1.0)
            outcome = group.task.result()
            member.delivered = True
            return MemberResult(
                outcome.score,
                outcome.rows[slot],
                outcome.slots,
                group.size,
                member,
                outcome.notes,
                outcome.worked_out,
            )
        finally:
            member.waiters -= 1
            member.left_at = self.clock.now()
            self._waiting -= 1

    def _forget_abandoned(self, digest: str) -> None:
        latest = self.clock.now() - self.abandon_s
        for group in list(self._by_prompt.get(digest, [])):
            gone = [k for k, slot in group.slots.items() if not slot.waiters and slot.left_at <= latest]
            if group.closed or not gone or group.whole.is_set():
                continue
            for slot in gone:
                del group.slots[slot]
            self.stats.abandoned += len(gone)
            self._close_if_empty(group)

    def _close_if_empty(self, group: OpenGroup) -> None:
        if not group.slots and group.task is not None:
            self._forget(group)
            group.task.cancel()

    def _forget_old(self) -> None:
        now = self.clock.now()
        while self._finished:
            until, group = next(iter(self._finished.values()))
            if until > now and len(self._finished) <= self.max_kept:
                return
            self._forget(group)
