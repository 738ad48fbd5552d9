"""An endpoint of a few lines, and clients of it."""

from __future__ import annotations

import random

import httpx

from rmcore.judge import ClientOptions
from rmcore.judge.base import Pair
from rmcore.judge.client.chat_client import ChatClient

__all__ = ["PAIR", "REPLY", "WIN", "Endpoint", "client_of", "ok", "status"]


PAIR = Pair("p-win", "a", "b")
WIN = "<verdict>$win</verdict>"
REPLY = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 30, "completion_tokens": 10}}


class Endpoint:
    """Answers after ``latency_s`` with what ``answer(number, time)`` says, and writes down when it was asked."""

    def __init__(self, clock, answer=None, latency_s=1.0):
        self.clock, self.answer, self.latency_s = clock, answer or (lambda n, t: ok()), latency_s
        self.times: list[float] = []
        self.now = self.most = 0

    async def __call__(self, request):
        number = len(self.times)
        self.times.append(self.clock.now())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.clock.sleep(self.latency_s)
        finally:
            self.now -= 1
        answer = self.answer(number, self.times[number])
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok(**headers):
    return httpx.Response(200, json=REPLY, headers={k.replace("_", "-"): v for k, v in headers.items()})


def status(code, **headers):
    return httpx.Response(code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def client_of(endpoint, **kwargs):
    given = {"clock": endpoint.clock, "random_source": random.Random(0)} | kwargs
    options = ClientOptions(transport=httpx.MockTransport(endpoint), **given)
    return ChatClient.over_http("http://127.0.0.1:9/v1", None, options)
