"""Entries, assemblers and replicas as they run on Ray Serve, in this process and without ray."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request

from rmcore.integrations.ray.serve.assembler import Assembler, RawReply, RawRequest
from rmcore.integrations.ray.serve.entry import Entry
from rmcore.integrations.ray.serve.replica import RemoteEngine
from rmcore.integrations.server import ServeSettings


class LostError(Exception):
    """What stands for Ray's error where the other process has died."""


class Process:
    """An assembler's process, by a handle: calls to it end with its death, and wait until it is started anew."""

    def __init__(self, make: Callable[[], Assembler]) -> None:
        self.make = make
        self.assembler = make()
        self.died = asyncio.Event()
        self.up = asyncio.Event()
        self.up.set()
        self.beats = True
        self.answers_copies = True

    def kill(self) -> None:
        self.die()
        self.start()

    def die(self) -> None:
        died, self.died = self.died, asyncio.Event()
        self.up.clear()
        for group in self.assembler.service.assembly._groups.values():
            group.task.cancel()
        for task in (*(self.assembler._tasks or ()), *(self.assembler.copies._tasks if self.assembler.copies else ())):
            task.cancel()
        died.set()

    def out_of_reach(self) -> None:
        """For a moment: calls end as if it had died, and go on there."""
        died, self.died = self.died, asyncio.Event()
        died.set()

    def start(self) -> None:
        self.assembler = self.make()
        self.up.set()

    async def _call(self, work: Any, died: asyncio.Event) -> Any:
        working, dying = asyncio.ensure_future(work), asyncio.ensure_future(died.wait())
        try:
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            if died.is_set():
                raise LostError
            return working.result()
        finally:
            dying.cancel()
            if not died.is_set():
                working.cancel()
                await asyncio.wait({working})

    async def request(self, entry: str, request: RawRequest, resent: bool = False, knew: str = "") -> RawReply:
        await self.up.wait()
        return await self._call(self.assembler.request(entry, request, resent, knew), self.died)

    async def beat(self, entry: str, vouched: bool = True, knew: str = "") -> str:
        await self.up.wait()
        return await self.assembler.beat(entry, vouched, knew) if self.beats else ""

    async def hold(self, *arguments: Any) -> None:
        await self._copies("hold", *arguments)

    async def held(self, asker: str) -> Any:
        return await self._copies("held", asker)

    async def _copies(self, method: str, *arguments: Any) -> Any:
        await self.up.wait()
        if not self.answers_copies:
            await asyncio.Event().wait()
        sent = pickle.loads(pickle.dumps(arguments))
        return pickle.loads(pickle.dumps(await self._call(getattr(self.assembler, method)(*sent), self.died)))

    async def metrics(self) -> str:
        return await self.assembler.metrics()

    async def ready(self) -> bool:
        return self.assembler.ready()


class _Other:
    def __init__(self, named: dict[str, Process], name: str) -> None:
        self.named, self.name = named, name

    async def hold(self, *arguments: Any) -> None:
        await self.named[self.name].hold(*arguments)

    async def held(self, asker: str) -> Any:
        return await self.named[self.name].held(asker)


class Cluster:
    """So many entries and assemblers around one engine; must be made on a running loop."""

    def __init__(self, engine: Any, entries: int, assemblers: int, settings: ServeSettings, calls: Any = None) -> None:
        async def call(prompts: Any, responses: Any) -> Any:
            return await engine.score_async(prompts, responses, on_error="return")

        names = [f"Assembler{number}" for number in range(assemblers)]
        named: dict[str, Any] = dict.fromkeys(names)

        def make(name: str) -> Assembler:
            # Each finds the others' processes by name, as there are none of them yet.
            others = {other: _Other(named, other) for other in names}
            engine = functools.partial(RemoteEngine, calls or call, (LostError,))
            return Assembler(engine, settings, "tiny", name=name, assemblers=others)

        for name in names:
            named[name] = Process(functools.partial(make, name))
        self.assemblers = list(named.values())
        self.proxies = True
        self.entries = [Entry(named, (LostError,), settings, callers=self._answer) for _ in range(entries)]

    async def _answer(self) -> bool:
        """Whether all proxies do."""
        return self.proxies

    async def post(self, entry: int, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a request that comes to an entry."""
        status, content = await self.send(entry, "POST", path, json.dumps(body).encode(), **headers)
        return status, json.loads(content)

    async def send(self, entry: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        left = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if left:
                return left.pop()
            await never.wait()
            return {"type": "http.disconnect"}

        sent = {"host": "localhost", "content-type": "application/json", **headers}
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": named}
        reply = await self.entries[entry](Request(scope, receive))
        return reply.status_code, bytes(reply.body)

    def place(self, number: int) -> Process:
        return self.assemblers[number]


@pytest.fixture
def cluster_of() -> Callable[..., Cluster]:
    def make(engine: Any, *, entries: int = 2, assemblers: int = 2, calls: Any = None, **settings: Any) -> Cluster:
        given = ServeSettings(**{"time_limit_s": 20.0, "batch_wait_s": 0.0, "group_size": 3, **settings})
        return Cluster(engine, entries, assemblers, given, calls)

    return make


@pytest.fixture
def lost() -> type[Exception]:
    return LostError
