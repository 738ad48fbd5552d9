"""The group server as an actor: members that come from anywhere in a cluster meet in its memory, without HTTP.

    handle = start_groups(make_engine, name="rewards")      # the same actor for all that ask for the name
    part = await handle.rendezvous("uid-7", 2, 8, prompt, response)

The engine and what gathers groups are those of ``rmcore serve``; ``fastapi`` must be installed, as Ray's own ``serve``
extra has it. An actor that dies takes its open groups along, and its callers come again: it is started anew, empty.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response
from rmcore.engine.engine import RewardEngine
from rmcore.integrations.client import MemberPart, ServerError, member_part
from rmcore.integrations.ray.cluster import ray_module
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["ActorGroups", "GroupHost", "Groups", "start_groups"]

_CONCURRENT_CALLS = 65_536
_RESTARTS = 3


class Groups(Protocol):
    """Where members of groups meet: a :class:`~rmcore.integrations.client.GroupClient`, or an actor."""

    async def rendezvous(
        self, group_id: int | str, slot: int, k: int, prompt: Prompt, response: Response, *, attempt: int | str = 0
    ) -> MemberPart:
        """Wait for the siblings of a group with a name."""

    async def meet(self, prompt: Prompt, response: Response, k: int) -> MemberPart:
        """Wait for ``k`` responses to one prompt."""


class GroupHost:
    """What the actor is made of; works without Ray, on one event loop.

    Args:
        make: makes the engine, in the actor.
        settings: limits and times; nothing listens, so ``host``, ``port`` and ``token`` mean nothing.
    """

    def __init__(self, make: Callable[[], RewardEngine], settings: ServeSettings) -> None:
        from rmcore.integrations.server.service import RewardService

        # Of whom an actor before this one may have answered siblings, the calls say so.
        self.service = RewardService(make(), replace(settings, first_start=True))

    async def join(self, body: Mapping[str, Any], again: bool = False) -> dict[str, Any]:
        """One member, as the body of ``POST /v1/rendezvous`` has it; its reply when the group is scored.

        ``again``: an actor before this one had the call, and may have answered siblings of its member.
        """
        from rmcore.integrations.server.members import RESENT
        from rmcore.integrations.server.schema import MemberRequest, member_reply

        request = MemberRequest(**body)
        token = RESENT.set(again)
        try:
            return await member_reply(request, await self.service.join(request))
        finally:
            RESENT.reset(token)

    async def metrics(self) -> str:
        """What ``GET /metrics`` of a server says."""
        return self.service.metrics.page()[0].decode()


class ActorGroups:
    """:class:`Groups` in an actor that all who know its name share.

    Args:
        actor: makes its handle, or finds it.
    """

    def __init__(self, actor: Callable[[], Any]) -> None:
        self._find = actor
        self._actor = actor()

    async def rendezvous(
        self, group_id: int | str, slot: int, k: int, prompt: Prompt, response: Response, *, attempt: int | str = 0
    ) -> MemberPart:
        """Wait for the siblings and return this member's part, as :meth:`GroupClient.rendezvous` does.

        Raises:
            InputError, ConflictError, LateError: as of the client.
            ServerError: the actor died again and again.
        """
        return await self._join(prompt, response, k, {"group_id": group_id, "slot": slot, "attempt": attempt})

    async def meet(self, prompt: Prompt, response: Response, k: int) -> MemberPart:
        """Wait for ``k`` responses to the prompt, as :meth:`GroupClient.meet` does."""
        return await self._join(prompt, response, k, {})

    async def metrics(self) -> str:
        """Its figures, in Prometheus' text format."""
        told: str = await self._actor.metrics.remote()
        return told

    async def _join(self, prompt: Prompt, response: Response, k: int, named: Mapping[str, Any]) -> MemberPart:
        body = {"prompt": canonical_prompt(prompt), "response": canonical_response(response), "k": k, **named}
        for left in reversed(range(_RESTARTS)):
            try:
                return member_part(await self._actor.join.remote(body, left < _RESTARTS - 1))
            except Exception as error:
                known = sys.modules.get("ray.exceptions")
                if known is None or not isinstance(error, known.RayActorError):
                    raise
                if not left:
                    raise ServerError(f"the actor of the groups died {_RESTARTS} times: {error}") from error
                self._actor = self._find()
        raise AssertionError("unreachable")


def start_groups(
    make: Callable[[], RewardEngine], settings: ServeSettings | None = None, *, name: str, **options: Any
) -> ActorGroups:
    """The actor of that name, which is started if there is none; whoever comes first makes it, for all.

    Args:
        make: makes the engine, in the actor; pickled.
        settings: limits and times; without them the defaults.
        name: of the actor, in the job's namespace.
        **options: of the actor, such as ``num_gpus``. It takes no CPU by default: where others have reserved them all
            it could never start.

    Raises MissingPackageError without ray.
    """
    ray = ray_module()
    options = {"num_cpus": 0, **options}
    remote = ray.remote(GroupHost).options(name=name, get_if_exists=True, max_concurrency=_CONCURRENT_CALLS, **options)
    return ActorGroups(lambda: remote.remote(make, settings or ServeSettings()))
