"""The other end of :mod:`heartbeat`, in a process of its own: a judge's endpoint, and a client of the group server."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection

from rmcore.judge.testing import Fault, ReplayServer

__all__ = ["serve", "text_of"]

_JSON = {"Content-Type": "application/json"}
_TEXT = 'Plain words, a line\nand some "quotes", \u00fcml\u00e4ute, <|im_end|> and \u4e2d\u6587. '


def text_of(size: int) -> str:
    """``size`` bytes of UTF-8, about."""
    return _TEXT * (size // len(_TEXT.encode()))


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


def serve(pipe: Connection) -> None:
    """Do what is asked for until told ``None``.

    ``("reply", kind, size)``: answer judges so from now on; the base URL is sent back.
    ``("body", body)``, ``("post", url)``: post it, and send back the status and the beginning of the reply.
    """
    import httpx

    reply, body = Fault(message={"content": "<verdict>$win</verdict>"}), b""
    with ReplayServer({}, faults=lambda number: reply) as server:
        while (asked := pipe.recv()) is not None:
            if asked[0] == "reply":
                reply = _reply(*asked[1:])
                pipe.send(server.base_url)
            elif asked[0] == "body":
                body = asked[1]
            else:
                answer = httpx.post(asked[1], content=body, headers=_JSON, timeout=120, trust_env=False)
                pipe.send((answer.status_code, answer.text[:300]))
