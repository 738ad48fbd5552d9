"""The assemblers: the group server's application, whose groups are scored by replicas, behind entries.

An assembler is one process with a name of its own, so that every entry knows where a group's members meet: what scales
holds no group, and what holds groups does not scale while it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import Message, Scope

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.loop import cancelled_here
from rmcore.integrations.ray.serve.copies import Aged, Copies, CopyCalls
from rmcore.integrations.ray.serve.keys import BY_CONTENT
from rmcore.integrations.ray.serve.presence import BEAT_S, Presence
from rmcore.integrations.ray.serve.replica import RemoteEngine
from rmcore.integrations.server.app import create_app
from rmcore.integrations.server.guard import lost, reached
from rmcore.integrations.server.members import RESENT
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["GIVEN_UP", "Assembler", "RawReply", "RawRequest"]

log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as it came to an entry; ``call`` names it, so that one that is sent again is known for the same."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    call: str = ""


@dataclass(frozen=True, slots=True)
class RawReply:
    """Its answer; status 0 is :data:`GIVEN_UP`."""

    status: int
    headers: Headers = ()
    body: bytes = b""


GIVEN_UP = RawReply(0)
"""The assembler took the entry for dead. What is not dead asks again."""


@dataclass(eq=False)
class _Call:
    scope: Scope = field(default_factory=dict)
    answering: asyncio.Future[RawReply] | None = None


class Assembler:
    """The application in one process. Serve makes deployments of the class; it works without.

    Args:
        make: makes the engine.
        settings: as of ``rmcore serve``.
        model: a name for ``/health``.
        presence: of the entries; a seam for tests.
        name: its own.
        assemblers: all of them by name, to keep copies of each other's scored groups; none for no copies.
        clock: of its age, and that of copies; a seam for tests.
    """

    def __init__(
        self,
        make: Callable[[], RemoteEngine],
        settings: ServeSettings,
        model: str = "",
        presence: Presence | None = None,
        name: str = "",
        assemblers: Mapping[str, CopyCalls] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.engine = make()
        settings = replace(settings, first_start=True)  # entries know whether there was an assembler before
        self.app = create_app(self.engine, settings, model=model)  # type: ignore[arg-type]
        self.service = self.app.state.service
        self.presence = presence or Presence()
        self.life = uuid.uuid4().hex
        self.copies = Copies(name, assemblers, clock) if assemblers and len(assemblers) > 1 else None
        if self.copies is not None:
            self.service.assembly.finished = self.copies.hand_on
        self._clock: Clock = clock or SystemClock()
        self._born = self._clock.now()
        self._succeeds = False
        self._calls: dict[str, _Call] = {}
        self._tasks: tuple[asyncio.Task[None], asyncio.Task[None]] | None = None

    async def beat(self, entry: str, vouched: bool = True, knew: str = "") -> str:
        """An entry's sign of life; returns this process's ``life``.

        Args:
            entry: its name.
            vouched: as of :meth:`~rmcore.integrations.ray.serve.presence.Presence.heard`.
            knew: as of :meth:`request`.
        """
        self.presence.heard(entry, vouched=vouched)
        self._begin(knew)
        return self.life

    def _begin(self, knew: str) -> asyncio.Task[None]:
        """What goes on while it serves, from the first sign of an entry; returns what is to be done before."""
        self._succeeds |= bool(knew) and knew != self.life
        if self._tasks is None:
            own = contextvars.Context  # not the caller's, with whose request Serve would cancel it
            restoring = asyncio.create_task(self._restore(), name="rmcore restored", context=own())
            self._tasks = restoring, asyncio.create_task(self._watching(), name="rmcore entries", context=own())
        return self._tasks[0]

    async def request(self, entry: str, request: RawRequest, resent: bool = False, knew: str = "") -> RawReply:
        """Answer a request of an entry, or :data:`GIVEN_UP`.

        Args:
            entry: its name.
            request: as it came.
            resent: the process that had it died, and may have answered siblings of it.
            knew: the ``life`` of the assembler of this name that the entry heard of last. Where it is another one, this
                assembler is a successor, and for the first ``time_limit_s`` all it is sent counts as ``resent``: a call
                may have waited for its start without anybody's seeing a death, or its caller may have asked again.
        """
        await asyncio.shield(self._begin(knew))
        self.presence.called(entry)
        text, call = b"", _Call()
        if request.path in BY_CONTENT:
            text = hashlib.sha256(request.body).digest()
            await self._instead(request.call, call)
            await self.presence.no_repetition(entry, text)
            if self._calls.get(request.call, call) is not call:
                return GIVEN_UP  # it was sent again meanwhile
        young = self._clock.now() - self._born < self.service.settings.time_limit_s
        token = RESENT.set(resent or (self._succeeds and young))
        try:
            scope = call.scope = _scope(request)
            answering = call.answering = asyncio.ensure_future(self._answer(scope, request.body))
        finally:
            RESENT.reset(token)
        with self.presence.holding(entry, answering, text):
            try:
                await asyncio.wait({answering})
            finally:  # the caller went away
                answering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({answering})
                if answering.cancelled():
                    self._over(request.call, call)
        if answering.cancelled():
            return GIVEN_UP
        if text:
            over = functools.partial(self._over, request.call, call)
            self.presence.answered(entry, text, functools.partial(over, lost), functools.partial(over, reached))
        return answering.result()

    async def _instead(self, name: str, call: _Call) -> None:
        """Have a call take the place of an earlier one of its name, whose answer its entry will not get: it took this
        process for dead, which was only out of reach. Otherwise its member would be there twice.
        """
        if not name:
            return
        earlier, self._calls[name] = self._calls.get(name), call
        if earlier is None or earlier.answering is None:
            return
        earlier.answering.cancel()
        await asyncio.wait({earlier.answering})
        lost(earlier.scope)

    def _over(self, name: str, call: _Call, tell: Callable[[Scope], None] | None = None) -> None:
        if tell is not None and self._calls.get(name, call) is call:
            tell(call.scope)
        if self._calls.get(name) is call:
            del self._calls[name]

    async def hold(self, origin: str, copies: Sequence[Aged], reached: Mapping[str, Sequence[int]]) -> None:
        """Keep copies, as :class:`~rmcore.integrations.ray.serve.copies.CopyCalls` says."""
        if self.copies is not None:
            self.copies.hold(origin, copies, reached)

    async def held(self, asker: str) -> list[Aged]:
        """The copies of another's groups, likewise."""
        return [] if self.copies is None else self.copies.held(asker)

    async def drain(self) -> None:
        """Take nothing new; return when everything accepted has its answer."""
        await self.service.drain()

    async def metrics(self) -> str:
        """The page for Prometheus, in text format 0.0.4."""
        return bytes(self.service.metrics.page()[0]).decode()

    def ready(self) -> bool:
        """Whether new groups are taken."""
        return not self.service.draining

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self.presence.give_up_silent()
            if self.copies is not None:
                self.copies.beat()

    async def _restore(self) -> None:
        if self.copies is not None:
            try:
                await self.copies.restore(self.service.assembly)
            except (Exception, asyncio.CancelledError) as error:  # it serves without
                if isinstance(error, asyncio.CancelledError) and cancelled_here():
                    raise
                log.exception("copies of the groups of the assembler before could not be had")

    async def _answer(self, scope: Scope, body_sent: bytes) -> RawReply:
        status, headers, body = 0, tuple[tuple[bytes, bytes], ...](), bytearray()
        left = [{"type": "http.request", "body": body_sent, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> Message:
            if left:
                return left.pop()
            await never.wait()  # who goes away has the call cancelled
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], tuple(_pairs(message.get("headers", ())))
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))

        await self.app(scope, receive, send)
        return RawReply(status, headers, bytes(body))


def _scope(request: RawRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
    }


def _pairs(headers: Iterable[Iterable[bytes]]) -> Iterable[tuple[bytes, bytes]]:
    for name, value in headers:
        yield bytes(name), bytes(value)
