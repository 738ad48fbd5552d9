"""The load of serve_soak and serve_ray: groups of texts, a server, clients that know what must come back."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmcore import RewardEngine
from rmcore.integrations.server.batching import BatchScorer

from .serve_model import BLAME, NEUTRAL, PRAISE

__all__ = [
    "Client",
    "Group",
    "Outcome",
    "Soak",
    "drive",
    "make_pool",
    "measure_batching",
    "score_pool",
    "server",
]

TOLERANCE = 1e-3
"""Of preferences, logits: what is computed together may show in the last bits; groups differ by far more."""

_RETRY_S = {"openrlhf": 1.0}
_ALONE = 5
"""So many times OpenRLHF's client asks for a reward that cannot be, since a response's siblings are not there."""


@dataclass
class Soak:
    """What to run."""

    clients: int = 200
    seconds: float = 60.0
    group: int = 4
    hang_up: float = 0.05
    pool: int = 2000
    time_limit_s: float = 10.0
    ratio_seconds: float = 3.0
    seed: int = 0
    first_number: int = 1
    answer_s: float = 60.0
    ask_again: bool = False
    pause_s: float = 0.0
    """Between an answer and a client's next call; may change while the clients run."""


@dataclass(frozen=True)
class Group:
    """Texts and the engine's own preferences of them, (K, K) as nested lists, and rewards; by version of its head."""

    prompt: str
    responses: list[str]
    versions: dict[int | None, tuple[list[list[float]], list[float]]]


@dataclass
class Outcome:
    """What the clients saw."""

    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    groups_in_time: float = 0.0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    answers: list[tuple[float, float, int | None]] = field(default_factory=list)
    """When each came, in how many seconds, and the head's version."""
    versions: dict[int, set[int | None]] = field(default_factory=dict)
    """Of each group's answers."""


# -- the groups ------------------------------------------------------------------------------------------------------


def make_pool(engine: RewardEngine, soak: Soak) -> list[Group]:
    """Groups with their scores, which hold for any number in place of the 0: they are all the same unknown word."""
    rng = random.Random(soak.seed)
    prompts = [" ".join(rng.choices(NEUTRAL, k=6)) + " #" for _ in range(soak.pool)]
    pool = [Group(prompt, _texts(rng, soak.group), {}) for prompt in prompts]
    score_pool(engine, pool)
    return pool


def score_pool(engine: RewardEngine, pool: Sequence[Group]) -> None:
    """Note what the engine says of all groups, under its head's version."""
    scores = engine.score([f"{group.prompt} 0" for group in pool], [group.responses for group in pool])
    for group, score in zip(pool, scores, strict=True):
        group.versions[score.head_version] = score.preference.tolist(), score.rewards.tolist()


def _texts(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(PRAISE + BLAME + NEUTRAL, k=rng.randrange(6, 16))) for _ in range(count)]


# -- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def server(model: Path, soak: Soak, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``rmcore serve`` on a free port."""
    command = [sys.executable, "-m", "rmcore.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
    command += ["--group-size", str(soak.group), "--time-limit", str(soak.time_limit_s), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield process, _url(process, log)
        finally:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Any) -> str:
    for _ in range(1200):
        log.seek(0)
        told = log.read()
        if found := re.search(r"serving (\S+)", told):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{told}")


# -- clients ---------------------------------------------------------------------------------------------------------


class Client:
    """One keep-alive connection: as little as HTTP/1.1 needs, so that the clients leave the machine to the server."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.host, self.port = host, int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: object) -> None:
        """Write a request."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._streams[1].write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self._streams[1].drain()

    async def receive(self) -> tuple[int, Any]:
        """Read an answer: status and JSON."""
        assert self._streams is not None
        head = await self._streams[0].readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length is not None
        content = await self._streams[0].readexactly(int(length[1]))
        if b"close" in head.lower().partition(b"\r\nconnection:")[2].partition(b"\r\n")[0]:
            self.hang_up()
        try:
            return int(head.split(b" ", 2)[1]), json.loads(content)
        except ValueError:  # a proxy's words
            return int(head.split(b" ", 2)[1]), content.decode("utf-8", "replace")

    def hang_up(self) -> None:
        """Close the socket, whatever is on the way."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


@dataclass(frozen=True)
class Call:
    """One request, and what must come back."""

    kind: str
    path: str
    body: object
    group: Group
    number: int
    slot: int = 0

    def version(self, reply: Any) -> int | None:
        """The head's version that the answer names."""
        found: int | None = (reply["extra_logs"] if self.kind == "openrlhf" else reply).get("head_version")
        return found

    def right(self, reply: Any) -> bool:
        """Whether the answer is this call's own, by the version that it names."""
        expected = self.group.versions.get(self.version(reply))
        if expected is None:
            return False
        preference, rewards = expected
        if self.kind == "groups":
            return bool(reply["id"] == self.number and _near(reply["preference"], preference))
        if self.kind == "rendezvous":
            whole = reply["complete"] and reply["slot"] == self.slot
            return bool(whole and _near(reply["preference"], preference[self.slot]))
        return _near(reply["rewards"], [rewards[self.slot]])


def _near(got: Any, expected: Any) -> bool:
    return np.shape(got) == np.shape(expected) and bool(np.allclose(got, expected, atol=TOLERANCE))


class Work:
    """Calls to be made: whole groups, and members of groups in an order of no group's own."""

    def __init__(self, pool: Sequence[Group], soak: Soak) -> None:
        self._pool, self._rng, self._ready = pool, random.Random(soak.seed), deque[Call]()
        self._numbers = itertools.count(soak.first_number)
        self.groups = 0

    def next(self, *, more: bool) -> Call | None:
        """The next call; None if there is none and no ``more`` are to be made."""
        if not self._ready:
            if not more:
                return None
            calls = [call for _ in range(16) for call in self._make()]
            self._rng.shuffle(calls)
            self._ready.extend(calls)
        return self._ready.popleft()

    def _make(self) -> list[Call]:
        group, number = self._rng.choice(self._pool), next(self._numbers)
        kind = self._rng.choices(("groups", "rendezvous", "openrlhf"), (4, 3, 3))[0]
        self.groups += 1
        prompt, size = f"{group.prompt} {number}", len(group.responses)
        if kind == "groups":
            body = {"prompt": prompt, "responses": group.responses, "id": number}
            return [Call(kind, "/v1/groups", body, group, number)]
        if kind == "openrlhf":
            queries = [[f"{prompt}{text}</s>"] for text in group.responses]
            return [
                Call(kind, "/get_reward", {"query": query, "prompts": [prompt], "labels": [None]}, group, number, slot)
                for slot, query in enumerate(queries)
            ]
        common = {"group_id": number, "k": size, "prompt": prompt}
        return [
            Call(kind, "/v1/rendezvous", {**common, "slot": slot, "response": text}, group, number, slot)
            for slot, text in enumerate(group.responses)
        ]


async def drive(url: str, pool: Sequence[Group], soak: Soak, goes_on: Callable[[], bool] = lambda: False) -> Outcome:
    """All clients, until the time is up, ``goes_on`` says no, and every group they began is answered."""
    load = _Load(url, pool, soak, goes_on)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(soak.clients):
            tasks.create_task(load.client())
    load.outcome.seconds = load.seconds
    load.outcome.groups = load.work.groups
    return load.outcome


class _Load:
    """What the clients of a run share."""

    def __init__(self, url: str, pool: Sequence[Group], soak: Soak, goes_on: Callable[[], bool]) -> None:
        self.url, self.soak, self.goes_on = url, soak, goes_on
        self.outcome, self.work, self.rng = Outcome(), Work(pool, soak), random.Random(soak.seed + 1)
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began

    async def client(self) -> None:
        """One connection, call after call."""
        connection = Client(self.url)
        while (call := self.work.next(more=self.seconds < self.soak.seconds or self.goes_on())) is not None:
            dropped = self.rng.random() < self.soak.hang_up
            try:
                if dropped:
                    await self._hang_up(connection, call)
                started = time.perf_counter()
                status, reply = await self._ask(connection, call)
                seconds = time.perf_counter() - started
            except (OSError, EOFError, TimeoutError) as error:
                self.outcome.counts["lost"] += 1
                self.outcome.errors.append(f"{call.kind}: {type(error).__name__}")
                connection.hang_up()
                continue
            self._note(call, status, reply, started - self.began, seconds)
            if not dropped:
                self.outcome.latencies_s.setdefault(call.kind, []).append(seconds)
            if self.soak.pause_s:
                await asyncio.sleep(self.soak.pause_s)
        connection.hang_up()

    async def _hang_up(self, connection: Client, call: Call) -> None:
        """Send a call and be gone before its answer."""
        await connection.send(call.path, call.body)
        await asyncio.sleep(self.rng.random() * 0.2)
        connection.hang_up()
        self.outcome.counts["hung_up"] += 1
        await asyncio.sleep(_RETRY_S.get(call.kind, 0.0))

    async def _ask(self, connection: Client, call: Call) -> tuple[int, Any]:
        """The answer; asked again, as trainers' clients do, where a proxy says that it has lost its server."""
        alone = 0
        while True:
            try:
                await connection.send(call.path, call.body)
                async with asyncio.timeout(self.soak.answer_s):
                    status, reply = await connection.receive()
            except (OSError, EOFError):
                if not self.soak.ask_again:
                    raise
                connection.hang_up()
                status, reply = 0, ""
            if not self.soak.ask_again or (status not in (0, 429, 502, 503) and not isinstance(reply, str)):
                return status, reply
            alone += isinstance(reply, dict) and reply.get("error", {}).get("type") == "no_preference"
            if alone == _ALONE:
                return status, reply
            self.outcome.counts["asked_again"] += 1
            await asyncio.sleep(1.0)

    def _note(self, call: Call, status: int, reply: Any, at: float, seconds: float) -> None:
        """Count an answer to a call that was sent ``at`` seconds after the beginning and took so many."""
        outcome = self.outcome
        outcome.counts[f"status_{status}"] += 1
        outcome.counts[f"calls_{call.kind}"] += 1
        if status == 200:
            outcome.answers.append((at + seconds, seconds, call.version(reply)))
            outcome.versions.setdefault(call.number, set()).add(call.version(reply))
        if status != 200:
            outcome.errors.append(f"{call.kind}: {status} {reply}"[:300])
        elif not call.right(reply):
            outcome.counts["wrong"] += 1
            outcome.errors.append(f"{call.kind}: {reply}"[:300])
        if self.seconds < self.soak.seconds:
            outcome.groups_in_time += 1.0 if call.kind == "groups" else 1.0 / self.soak.group


# -- batching against one at a time ----------------------------------------------------------------------------------


async def throughput(engine: RewardEngine, soak: Soak, *, together: int) -> float:
    """Groups a second that 64 callers get out of a scorer with batches of ``together`` groups."""
    scorer = BatchScorer(engine, max_groups=together)

    async def one(prompt: str, responses: list[str]) -> None:
        await scorer.score(prompt, responses)

    return await _rate([one] * 64, soak)


async def http_throughput(url: str, soak: Soak, *, clients: int) -> float:
    """Groups a second that so many clients get out of ``/v1/groups``, each waiting for its answer."""
    connections = [Client(url) for _ in range(clients)]

    def caller(connection: Client) -> _Call:
        async def one(prompt: str, responses: list[str]) -> None:
            await connection.send("/v1/groups", {"prompt": prompt, "responses": responses})
            status, _ = await connection.receive()
            if status != 200:
                raise RuntimeError(f"got status {status}, expected 200")

        return one

    try:
        return await _rate([caller(connection) for connection in connections], soak)
    finally:
        for connection in connections:
            connection.hang_up()


_Call = Callable[[str, list[str]], Awaitable[None]]


async def _rate(callers: Sequence[_Call], soak: Soak) -> float:
    """Calls a second. Every group has texts of its own, since equal ones in a batch are encoded once."""
    done = 0
    began = time.perf_counter()

    async def loop(call: _Call, seed: int) -> None:
        nonlocal done
        rng = random.Random(seed)
        while time.perf_counter() - began < soak.ratio_seconds:
            await call(" ".join(rng.choices(NEUTRAL, k=6)), _texts(rng, soak.group))
            done += 1

    await asyncio.gather(*(loop(call, seed) for seed, call in enumerate(callers)))
    return done / (time.perf_counter() - began)


def measure_batching(engine: RewardEngine, url: str, soak: Soak) -> dict[str, Any]:
    """Alternating rounds, so that what else the machine does meets both alike."""
    figures: dict[str, list[float]] = {"one": [], "batched": [], "http_one": [], "http_batched": []}
    for _ in range(3):
        figures["one"].append(asyncio.run(throughput(engine, soak, together=1)))
        figures["batched"].append(asyncio.run(throughput(engine, soak, together=64)))
        figures["http_one"].append(asyncio.run(http_throughput(url, soak, clients=1)))
        figures["http_batched"].append(asyncio.run(http_throughput(url, soak, clients=64)))
    median = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "groups_per_second": {name: [round(value, 1) for value in values] for name, values in figures.items()},
        "ratio": round(median["batched"] / median["one"], 2),
        "http_ratio": round(median["http_batched"] / median["http_one"], 2),
        "what": {
            "one": "64 callers of a BatchScorer with batches of one group, in this process",
            "batched": "the same with batches of up to 64",
            "http_one": "one client of the server, its next request after its last answer",
            "http_batched": "64 such clients at once",
        },
    }
