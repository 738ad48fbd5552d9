"""Requests to entries in one process."""

from __future__ import annotations

import asyncio

__all__ = ["by_content", "go", "member", "reward", "rollout"]


def member(group, slot, size=3):
    return {"group_id": group, "slot": slot, "k": size, "prompt": f"p {group}", "response": f"{slot} of {group}"}


def reward(prompt, number):
    return {"query": [f"{prompt}{number} x"], "prompts": [prompt]}


def rollout(text, **more):
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    return {"responses_create_params": {"input": "red"}, "response": {"output": output}, **more}


def by_content(number):
    return "/v1/rendezvous", {"k": 3, "prompt": "p", "response": f"{number} x"}


def go(main, seconds=30):
    asyncio.run(asyncio.wait_for(main(), seconds))
