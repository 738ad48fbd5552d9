"""How long the event loop is kept from its other tasks while something of ten megabytes goes through it.

A task that sleeps five milliseconds at a time notes the longest delay of its turns: what a trainer's or a server's
other requests would have waited. The judge's endpoint and the group server's client are a process of their own
(:mod:`heartbeat_peer`); the group server runs on the loop that is watched. Prints a line a case and the same for a loop
that has nothing else to do; exits 1 if a case delays the loop by more than ``--most`` milliseconds.

Two delays are told: by the clock, and the CPU time that this process used meanwhile, which does not count what others
on a busy machine took. Garbage is collected before each case, or a collection that was due anyway (100 ms over torch's
and transformers' objects) would count as the case's; one that the case itself brings about does count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rmcore import RewardEngine
from rmcore._base.arguments import real, whole
from rmcore.judge import ChatJudge, ClientOptions, Pair
from rmcore.model import RewardModel

from .heartbeat_peer import serve, text_of
from .serve_model import tiny_model

__all__ = ["Delay", "cases", "largest_delay", "main"]

_EVERY_S = 0.005


class Delay(NamedTuple):
    """Seconds by which a turn was late: by the clock, and what this process used of the CPU in the meantime."""

    wall: float
    cpu: float


@dataclass
class _Longest:
    wall: float = 0.0
    cpu: float = 0.0

    def delay(self) -> Delay:
        return Delay(self.wall, self.cpu)


@contextlib.asynccontextmanager
async def largest_delay() -> AsyncIterator[_Longest]:
    """The longest times by which the loop was late; final when the block is left."""
    longest = _Longest()

    async def beat() -> None:
        while True:
            began, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(_EVERY_S)
            late = time.perf_counter() - began - _EVERY_S
            longest.wall = max(longest.wall, late)
            longest.cpu = max(longest.cpu, min(late, time.process_time() - used))

    gc.collect()
    task = asyncio.create_task(beat())
    await asyncio.sleep(4 * _EVERY_S)
    try:
        yield longest
        await asyncio.sleep(4 * _EVERY_S)
    finally:
        task.cancel()


@contextlib.contextmanager
def _peer() -> Iterator[Connection]:
    """The other process."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there,), daemon=True)
    process.start()
    try:
        yield here
        here.send(None)
    finally:
        process.join(10)
        process.kill()


# -- the judge -------------------------------------------------------------------------------------------------------


async def judge_case(
    peer: Connection, size: int, *, prompt: int = 0, response: int = 0, reply: str = "text", **how: Any
) -> Delay:
    """The delay by a judge with a store, over one pair in both orders."""
    pair = Pair(text_of(prompt) or "p", text_of(response) or "a", "b")
    options = ClientOptions(max_reply_bytes=64 << 20)
    peer.send(("reply", reply, size))
    url = await asyncio.to_thread(peer.recv)
    with tempfile.TemporaryDirectory() as folder:
        async with ChatJudge(url, "m", None, client=options, store=Path(folder) / "verdicts.db", **how) as judge:
            await judge.judge([Pair("warm", "a", "c")])
            async with largest_delay() as longest:
                verdict = (await judge.judge([pair]))[0]
    if verdict.failed and reply not in ("log-probabilities", "brackets"):
        raise SystemExit(f"no verdict: {verdict.reason}")
    return longest.delay()


# -- the group server ------------------------------------------------------------------------------------------------


def _engine(chat: bool) -> RewardEngine:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(0, chat=chat).save_pretrained(folder, backbone="embed")
        return RewardEngine(RewardModel.from_pretrained(folder, overlong="truncate-right"))


async def server_case(
    peer: Connection, body: bytes, path: str = "/v1/groups", *, chat: bool = False, **settings: Any
) -> Delay:
    """The delay by the group server over one request; ``chat``: its model's tokenizer has a chat template."""
    import uvicorn

    from rmcore.integrations.server import ServeSettings, create_app

    app = create_app(_engine(chat), ServeSettings(max_body=64 << 20, max_chars=64 << 20, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    peer.send(("body", body))
    async with largest_delay() as longest:
        peer.send(("post", f"http://127.0.0.1:{port}{path}"))
        status, told = await asyncio.to_thread(peer.recv)
    server.should_exit = True
    await serving
    if status != 200:
        raise SystemExit(f"{path}: got status {status}, expected 200: {told}")
    return longest.delay()


def cases(peer: Connection, size: int) -> dict[str, Callable[[], Coroutine[Any, Any, Delay]]]:
    """By name, what gives the delay of the loop."""
    group = {"prompt": "p", "responses": [text_of(size // 8) + str(k) for k in range(8)]}
    few = [{"prompt": f"p {k}", "responses": [text_of(size // 512) + str(i) for i in range(8)]} for k in range(64)]
    turn = {"role": "user", "content": text_of(size // 64)}
    turns = {"prompt": [turn] * 64, "responses": ["a", "b"]}
    query = {"query": ["p" + one for one in group["responses"]], "prompts": ["p"] * 8}
    made: dict[str, Callable[[], Coroutine[Any, Any, Delay]]] = {
        "judge: prompt": partial(judge_case, peer, size, prompt=size, reply=""),
        "judge: response": partial(judge_case, peer, size, response=size, reply=""),
        "judge: prompt, JSON schema": partial(judge_case, peer, size, prompt=size, reply="", output="json_schema"),
        "judge: reply": partial(judge_case, peer, size),
        "judge: critique, JSON schema": partial(judge_case, peer, size, reply="critique", output="json_schema"),
        "judge: reasoning": partial(judge_case, peer, size, reply="reasoning"),
        "judge: log-probabilities": partial(judge_case, peer, size, reply="log-probabilities", soft=True),
        "judge: brackets": partial(judge_case, peer, size, reply="brackets"),
    }
    for name, path, value in (
        ("group of 8 texts", "/v1/groups", group),
        ("64 groups of 8", "/v1/groups", few),
        ("conversation of 64 messages", "/v1/groups", turns),
        ("OpenRLHF's call", "/get_reward", query),
    ):
        made[f"server: {name}"] = partial(server_case, peer, json.dumps(value).encode(), path)
    few_turns = {"prompt": [{"role": "user", "content": text_of(size // 16)}] * 16, "responses": ["a", "b"]}
    for name, value in (("16 messages", few_turns), ("8 texts", group)):
        made[f"server: {name}, chat template"] = partial(server_case, peer, json.dumps(value).encode(), chat=True)
    return made


async def _idle() -> Delay:
    async with largest_delay() as longest:
        await asyncio.sleep(1.0)
    return longest.delay()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=whole(), default=10_000_000, help="bytes")
    parser.add_argument(
        "--rounds", type=whole(), default=3, help="at most; the least delay counts, and one in time is enough"
    )
    parser.add_argument("--most", type=real(above=0), default=50.0, help="milliseconds")
    parser.add_argument("--cpu", action="store_true", help="judge by CPU time, on a machine that others use")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    a = parser.parse_args(argv)
    failed = 0

    def least(case: Callable[[], Coroutine[Any, Any, Delay]], name: str) -> bool:
        found: list[Delay] = []
        while len(found) < a.rounds and not (found and min(found, key=counted)[a.cpu] <= a.most / 1e3):
            found.append(asyncio.run(case()))
        best = min(found, key=counted)
        late = counted(best) > a.most / 1e3
        print(f"{name:32} {1e3 * best.wall:7.1f} ms {1e3 * best.cpu:7.1f} ms{'  TOO LONG' if late else ''}", flush=True)
        return late

    def counted(delay: Delay) -> float:
        return delay[a.cpu]

    print(f"{'':32} {'clock':>10} {'CPU':>10}")
    least(_idle, "idle")
    with _peer() as peer:
        for name, case in cases(peer, a.size).items():
            if a.only in name:
                failed += least(case, name)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
