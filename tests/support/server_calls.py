"""Bodies of requests to a group server, and waiting for what it comes to."""

from __future__ import annotations

import asyncio
import time

__all__ = ["GROUP", "member", "single", "until"]


GROUP = {"prompt": "red tree", "responses": ["good right", "bad vague", "kind odd"]}


def member(slot, response, *, k=2, group="g", **more):
    return {"group_id": group, "slot": slot, "k": k, "prompt": "p", "response": response, **more}


def single(response, prompt="<s>ask</s>", end="<|im_end|>"):
    """One of OpenRLHF's calls."""
    return {"query": [prompt + response + end], "prompts": [prompt], "labels": [None]}


async def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        await asyncio.sleep(0.001)
