"""How long the event loop is kept from its other tasks while something of ten megabytes goes through it.

A task that sleeps five milliseconds at a time notes the longest delay of its turns: what a trainer's or a server's
other requests would have waited. The judge's endpoint is a process of its own; the group server runs on the loop that
is watched, its client in another process. Prints a line a case and the same for a loop that has nothing else to do;
exits 1 if a case delays the loop by more than ``--most`` milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rmcore import RewardEngine
from rmcore.judge import ChatJudge, ClientOptions, Pair
from rmcore.judge.testing import Fault, ReplayServer
from rmcore.model import RewardModel

from .serve_load import tiny_model

__all__ = ["cases", "largest_delay", "main"]

_EVERY_S = 0.005
_JSON = {"Content-Type": "application/json"}
_TEXT = 'Plain words, a line\nand some "quotes", \u00fcml\u00e4ute, <|im_end|> and \u4e2d\u6587. '


@contextlib.asynccontextmanager
async def largest_delay() -> AsyncIterator[list[float]]:
    """One number, the longest time in seconds by which the loop was late; final when the block is left."""
    longest = [0.0]

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_EVERY_S)
            now = time.perf_counter()
            longest[0] = max(longest[0], now - last - _EVERY_S)
            last = now

    task = asyncio.create_task(beat())
    await asyncio.sleep(4 * _EVERY_S)
    try:
        yield longest
        await asyncio.sleep(4 * _EVERY_S)
    finally:
        task.cancel()


def text_of(size: int) -> str:
    """``size`` bytes of UTF-8, about."""
    return _TEXT * (size // len(_TEXT.encode()))


# -- the judge -------------------------------------------------------------------------------------------------------


def _reply(kind: str, size: int) -> Fault:
    """What the endpoint answers: one of about ``size`` bytes, or a short verdict."""
    if kind == "text":
        return Fault(message={"content": text_of(size) + "\n<verdict>$win</verdict>"})
    if kind == "critique":
        content = json.dumps({"critique": text_of(size), "verdict": "$win"})
        return Fault(message={"content": content})
    if kind == "reasoning":
        return Fault(message={"reasoning_content": text_of(size), "content": "<verdict>$win</verdict>"})
    if kind == "log-probabilities":
        token = {"token": " a", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": [{"token": " a", "logprob": -0.5}]}
        message = {"role": "assistant", "content": "a"}
        logprobs = {"content": [token] * (size // len(json.dumps(token)))}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
        return Fault(body=json.dumps({"choices": [choice]}).encode())
    if kind == "brackets":
        return Fault(body=b'{"choices": [' + b"[]," * (size // 3) + b"[]]}")
    return Fault(message={"content": "<verdict>$win</verdict>"})


def _serve_replies(kind: str, size: int, pipe: Connection) -> None:
    reply = _reply(kind, size)
    with ReplayServer({}, faults=lambda number: reply) as server:
        pipe.send(server.base_url)
        pipe.recv()


@contextlib.contextmanager
def _process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """``target(*args, pipe)`` in a process of its own; the other end of the pipe. It ends when told anything."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(*args, there), daemon=True)
    process.start()
    try:
        yield here
        here.send(None)
    finally:
        process.join(10)
        process.kill()


async def judge_case(size: int, *, prompt: int = 0, response: int = 0, reply: str = "text", **how: Any) -> float:
    """Seconds by which a judge with a store keeps its loop, over one pair in both orders."""
    pair = Pair(text_of(prompt) or "p", text_of(response) or "a", "b")
    options = ClientOptions(max_reply_bytes=64 << 20)
    with tempfile.TemporaryDirectory() as folder, _process(_serve_replies, reply, size) as pipe:
        url = await asyncio.to_thread(pipe.recv)
        judge = ChatJudge(url, "m", None, client=options, store=Path(folder) / "verdicts.db", **how)
        async with judge:
            await judge.judge([Pair("warm", "a", "c")])
            async with largest_delay() as longest:
                verdict = (await judge.judge([pair]))[0]
    if verdict.failed and reply not in ("log-probabilities", "brackets"):
        raise SystemExit(f"no verdict: {verdict.reason}")
    return longest[0]


# -- the group server ------------------------------------------------------------------------------------------------


def _post(body: bytes, pipe: Connection) -> None:
    import httpx

    url = pipe.recv()
    reply = httpx.post(url, content=body, headers=_JSON, timeout=120, trust_env=False)
    pipe.send((reply.status_code, reply.text[:300]))
    pipe.recv()


async def server_case(body: bytes, path: str = "/v1/groups", **settings: Any) -> float:
    """Seconds by which the group server keeps its loop over one request."""
    import uvicorn

    from rmcore.integrations.server import ServeSettings, create_app

    with tempfile.TemporaryDirectory() as folder:
        tiny_model(0).save_pretrained(folder, backbone="embed")
        engine = RewardEngine(RewardModel.from_pretrained(folder, overlong="truncate-right"))
    app = create_app(engine, ServeSettings(max_body=64 << 20, max_chars=64 << 20, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with _process(_post, body) as pipe:
        async with largest_delay() as longest:
            pipe.send(f"http://127.0.0.1:{port}{path}")
            status, told = await asyncio.to_thread(pipe.recv)
    server.should_exit = True
    await serving
    if status != 200:
        raise SystemExit(f"{path}: got status {status}, expected 200: {told}")
    return longest[0]


def cases(size: int) -> dict[str, Callable[[], Coroutine[Any, Any, float]]]:
    """By name, what gives the seconds by which the loop was late."""
    group = {"prompt": "p", "responses": [text_of(size // 8) + str(k) for k in range(8)]}
    few = [{"prompt": f"p {k}", "responses": [text_of(size // 512) + str(i) for i in range(8)]} for k in range(64)]
    turn = {"role": "user", "content": text_of(size // 64)}
    turns = {"prompt": [turn] * 64, "responses": ["a", "b"]}
    query = {"query": ["p" + one for one in group["responses"]], "prompts": ["p"] * 8}
    made: dict[str, Callable[[], Coroutine[Any, Any, float]]] = {
        "judge: prompt": partial(judge_case, size, prompt=size, reply=""),
        "judge: response": partial(judge_case, size, response=size, reply=""),
        "judge: prompt, JSON schema": partial(judge_case, size, prompt=size, reply="", output="json_schema"),
        "judge: reply": partial(judge_case, size),
        "judge: critique, JSON schema": partial(judge_case, size, reply="critique", output="json_schema"),
        "judge: reasoning": partial(judge_case, size, reply="reasoning"),
        "judge: log-probabilities": partial(judge_case, size, reply="log-probabilities", soft=True),
        "judge: brackets": partial(judge_case, size, reply="brackets"),
    }
    for name, path, value in (
        ("group of 8 texts", "/v1/groups", group),
        ("64 groups of 8", "/v1/groups", few),
        ("conversation of 64 messages", "/v1/groups", turns),
        ("OpenRLHF's call", "/get_reward", query),
    ):
        made[f"server: {name}"] = partial(server_case, json.dumps(value).encode(), path)
    return made


async def _idle() -> float:
    async with largest_delay() as longest:
        await asyncio.sleep(1.0)
    return longest[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="bytes")
    parser.add_argument("--rounds", type=int, default=3, help="of which the least delay counts")
    parser.add_argument("--most", type=float, default=50.0, help="milliseconds")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    a = parser.parse_args(argv)
    failed = 0
    print(f"{'idle':32} {1e3 * asyncio.run(_idle()):7.1f} ms")
    for name, case in cases(a.size).items():
        if a.only in name:
            delay = 1e3 * min(asyncio.run(case()) for _ in range(a.rounds))
            failed += delay > a.most
            print(f"{name:32} {delay:7.1f} ms{'' if delay <= a.most else '  TOO LONG'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
