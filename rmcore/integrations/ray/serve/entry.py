"""The entries: they let requests in, and send each to the assembler where its group meets.

An entry keeps nothing but the requests it waits for. An assembler that dies is asked again with all that its entries
hold for it, so its groups come together anew; what an entry holds when it dies, its callers ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.large import is_large
from rmcore.integrations.ray.serve.assembler import RawReply, RawRequest
from rmcore.integrations.ray.serve.keys import BY_CONTENT, request_key
from rmcore.integrations.ray.serve.presence import BEAT_S
from rmcore.integrations.server.guard import Guard
from rmcore.integrations.server.placing import owner
from rmcore.integrations.server.schema import error_response
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["AssemblerCalls", "Entry"]

log = logging.getLogger(__name__)

_DEATHS = 3
"""Assemblers that may die of one request. It may be the request's fault."""
_SETTLED_S = 2.0
"""After a doubt about callers: until then the requests of one that is gone have been given up."""
_DOUBT_S = 60.0
"""What does not answer for longer is no reason to wait any more: Ray takes a dead node for dead well before."""
_REMEMBERED_S = 3.0
"""For so long a text that was answered may come again since its answer was lost."""
_PAGE_S = 5.0
"""An assembler that takes longer to tell about itself is not ready."""
_PATHS = frozenset({"/v1/groups", "/v1/rendezvous", "/get_reward", "/compare", "/verify", "/health", "/ready"})
_HOP = frozenset({b"connection", b"content-length", b"keep-alive", b"transfer-encoding"})


class AssemblerCalls(Protocol):
    """An assembler, from another process."""

    async def request(self, entry: str, request: RawRequest, resent: bool = False, knew: str = "") -> RawReply:
        """Its answer."""
        ...

    async def beat(self, entry: str, vouched: bool = True, knew: str = "") -> str:
        """Take note that the entry is alive, and whether all are that it has calls from; returns its ``life``."""
        ...

    async def metrics(self) -> str:
        """Its page for Prometheus."""
        ...

    async def ready(self) -> bool:
        """Whether it takes new groups."""
        ...


class Entry:
    """One entry. Serve makes deployments of the class; it works without.

    Args:
        assemblers: all of them by name, the same for every entry.
        lost: the exceptions that mean that one died.
        settings: as of ``rmcore serve``: who is let in, and how much they may send.
        clock: a seam for tests.
        callers: tells whether all are alive that pass callers' requests on to entries.
    """

    def __init__(
        self,
        assemblers: Mapping[str, AssemblerCalls],
        lost: tuple[type[Exception], ...],
        settings: ServeSettings,
        clock: Clock | None = None,
        callers: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.name = uuid.uuid4().hex
        self._callers = callers
        self._doubted = -_SETTLED_S
        self._doubting: float | None = None
        self._vouch = True
        self._texts: Counter[bytes] = Counter()
        self.resent = 0
        self._assemblers, self._lost = assemblers, lost
        self._lives: dict[str, str] = {}  # of assemblers, as last heard
        self._clock: Clock = clock or SystemClock()
        seconds = Histogram("rmcore_entry_request_seconds", "Time to answer.", ("path",), registry=CollectorRegistry())
        self._guard = Guard(self._app, settings, _PATHS, seconds, clock)
        self._beats: list[asyncio.Task[None]] = []

    async def __call__(self, request: Request) -> Response:
        """Answer a request of the network."""
        if not self._beats:
            beating = [self._vouching(), *map(self._beat, self._assemblers)]
            # Not this request's: Serve cancels with a request what is called in its context.
            own = contextvars.Context
            self._beats = [asyncio.create_task(one, name="rmcore beat", context=own()) for one in beating]
        reply = Response()
        sent = bytearray()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status_code = message["status"]
                reply.raw_headers = [pair for pair in message["headers"] if pair[0].lower() not in _HOP]
            else:
                sent.extend(message.get("body", b""))

        await self._guard(request.scope, request.receive, send)
        reply.body = bytes(sent)
        reply.raw_headers.append((b"content-length", str(len(sent)).encode()))
        return reply

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, behind the guard: the body comes whole."""
        body = (await receive()).get("body", b"")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == "/metrics":
            await (await self._metrics())(scope, receive, send)
            return
        if path == "/ready" and not await self._all_ready():
            answer = error_response(503, "not_ready", "an assembler takes no new groups, or does not answer")
            await answer(scope, receive, send)
            return
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        raw = RawRequest(scope["method"], path, scope["query_string"], headers, body, uuid.uuid4().hex)
        reply = await self._ask(raw)
        await send({"type": "http.response.start", "status": reply.status, "headers": list(reply.headers)})
        await send({"type": "http.response.body", "body": reply.body})

    async def _ask(self, request: RawRequest) -> RawReply:
        """The answer of the assembler that has the request's group, whatever becomes of that assembler meanwhile."""
        name = await self._owner_of(request)
        with self._remembered(request) as seen:
            if seen and not await self._vouched():
                with contextlib.suppress(Exception):  # it is being started again, and remembers nobody
                    await self._assemblers[name].beat(self.name, False, self._lives.get(name, ""))
            return await self._asked(name, request)

    async def _asked(self, name: str, request: RawRequest) -> RawReply:
        deaths = 0
        while deaths < _DEATHS:
            try:
                knew = self._lives.get(name, "")
                reply = await self._assemblers[name].request(self.name, request, deaths > 0, knew)
            except self._lost as error:
                deaths += 1
                self.resent += 1
                log.warning("an assembler died (%s); its groups come together anew", type(error).__name__)
                await self._clock.sleep(0.1 * deaths)
                continue
            if reply.status:
                return reply
            self.resent += 1  # it took this entry for dead
        refused = error_response(503, "lost", f"{_DEATHS} processes died, one after the other, with this request")
        return RawReply(refused.status_code, refused.raw_headers, bytes(refused.body))

    @contextmanager
    def _remembered(self, request: RawRequest) -> Iterator[bool]:
        """While the body runs, and a while longer, its text is known; whether it was before."""
        if request.path not in BY_CONTENT:
            yield False
            return
        text = hashlib.sha256(request.body).digest()
        seen = text in self._texts
        self._texts[text] += 1
        try:
            yield seen
        finally:
            asyncio.get_running_loop().call_later(_REMEMBERED_S, self._forget, text)

    def _forget(self, text: bytes) -> None:
        self._texts[text] -= 1
        if not self._texts[text]:
            del self._texts[text]

    async def _vouched(self) -> bool:
        """Whether all callers are alive, and have been for a while; or it is not to be found out."""
        if self._callers is None:
            return True
        alive, now = await self._callers(), self._clock.now()
        if alive:
            self._doubting = None
            return now - self._doubted > _SETTLED_S
        self._doubted = now
        self._doubting = now if self._doubting is None else self._doubting
        return now - self._doubting > _DOUBT_S

    async def _owner_of(self, request: RawRequest) -> str:
        names = list(self._assemblers)
        if request.method != "POST":
            return names[0]
        named = next((value for name, value in request.headers if name.lower() == b"idempotency-key"), None)
        arguments = request.path, request.body, None if named is None else named.decode("latin-1")
        key = await asyncio.to_thread(request_key, *arguments) if is_large(request.body) else request_key(*arguments)
        return owner(key, names)

    async def _vouching(self) -> None:
        # One for all assemblers, a moment before their beats: who lost a caller's connection asks again a second later.
        while self._callers is not None:
            self._vouch = await self._vouched()
            await self._clock.sleep(BEAT_S)

    async def _beat(self, name: str) -> None:
        while True:
            try:
                knew = self._lives.get(name, "")
                self._lives[name] = await self._assemblers[name].beat(self.name, self._vouch, knew) or knew
            except Exception as error:  # it is being started again
                log.info("no beat: %s", type(error).__name__)
            await self._clock.sleep(BEAT_S)

    async def _all_ready(self) -> bool:
        return all(await self._of_all("ready", False))

    async def _metrics(self) -> Response:
        pages = await self._of_all("metrics", "")
        return Response(
            merged_pages(dict(zip(self._assemblers, pages, strict=True))), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _of_all(self, method: str, otherwise: Any) -> list[Any]:
        async def one(assembler: AssemblerCalls) -> Any:
            try:
                async with asyncio.timeout(_PAGE_S):
                    return await getattr(assembler, method)()
            except Exception as error:  # a page says what there is
                log.warning("an assembler does not tell its %s: %s", method, type(error).__name__)
                return otherwise

        return await asyncio.gather(*map(one, self._assemblers.values()))


def merged_pages(pages: Mapping[str, str]) -> str:
    """Prometheus pages as one, whose samples have the label ``assembler``, their page's name."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.samples import Sample

    class Merged:
        def collect(self) -> Iterable[Any]:
            families: dict[str, Any] = {}
            for name, page in pages.items():
                for family in text_string_to_metric_families(page):
                    samples = [
                        Sample(one.name, {**one.labels, "assembler": name}, one.value, one.timestamp)
                        for one in family.samples
                    ]
                    if family.name in families:
                        families[family.name].samples.extend(samples)
                    else:
                        family.samples = samples
                        families[family.name] = family
            return families.values()

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry).decode()
