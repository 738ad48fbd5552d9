"""Scored groups and a scorer for tests of assemblies."""

from __future__ import annotations

import asyncio

import torch

from rmcore.engine.groups import GroupScore

__all__ = ["Scorer", "go", "scored"]


def scored(responses) -> GroupScore:
    """p̃_ij = length of i minus length of j: every member can tell whether its row is its own."""
    lengths = torch.tensor([float(len(r)) for r in responses], dtype=torch.float64)
    p = lengths[:, None] - lengths[None, :]
    return GroupScore(p, torch.ones_like(p), p.clone(), torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool))


class Scorer:
    def __init__(self) -> None:
        self.calls: list[tuple[object, list[str]]] = []
        self.fail = 0

    async def __call__(self, prompt, responses):
        self.calls.append((prompt, list(responses)))
        await asyncio.sleep(0)
        if self.fail:
            self.fail -= 1
            raise ValueError("no score today")
        return scored(responses)


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))
