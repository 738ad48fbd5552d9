"""An engine whose preferences are told by the responses themselves."""

from __future__ import annotations

import asyncio

import torch

from rmcore.engine.groups import GroupScore, GroupScores


class Numbers:
    """p̃_ij = number in response i minus number in response j, so a member can tell whether its row is its own."""

    def __init__(self):
        self.scored: list[list[str]] = []
        self.version: int | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def score_async(self, prompts, responses, *, on_error, progress=None):
        version = self.version
        await self.open.wait()
        self.scored += [list(group) for group in responses]
        return GroupScores([numbers(group, version) for group in responses], head_version=version)


def numbers(group, version):
    values = torch.tensor([float(text.split()[0]) for text in group], dtype=torch.float64)
    p = values[:, None] - values[None, :]
    zero = torch.zeros_like(p)
    return GroupScore(p, zero + 1, p.clone(), zero, zero.bool(), head_version=version)
