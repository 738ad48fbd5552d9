"""Samples as verl's reward loop hands them over, of two groups of four."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rmcore.engine import RewardEngine

GROUPS = [
    ([{"role": "user", "content": "red tree house"}], ["good clear", "bad rude", "odd right red", "red"]),
    ([{"role": "user", "content": "blue river"}], ["wrong", "exact kind helpful", "lazy odd vague", "clear blue"]),
]
LENGTH = 5


class Data:
    """What the manager uses of ``DataProto``: rows of tensors, and numpy arrays of everything else."""

    def __init__(self, batch: dict[str, torch.Tensor], non_tensor_batch: dict[str, np.ndarray]) -> None:
        self.batch, self.non_tensor_batch = batch, non_tensor_batch

    def __getitem__(self, index: Any) -> Any:
        parts = [{name: value[index] for name, value in part.items()} for part in (self.batch, self.non_tensor_batch)]
        if isinstance(index, slice):
            return Data(*parts)
        return SimpleNamespace(batch=parts[0], non_tensor_batch=parts[1])


def config(estimator: str = "rmcore", n: int = 4, val_n: int = 4, **more: Any) -> dict[str, Any]:
    rmcore = more.pop("rmcore", {"url": "http://127.0.0.1:8400"})
    return {
        "reward": {"reward_kwargs": {"rmcore": rmcore}},
        "algorithm": {"adv_estimator": estimator, "use_kl_in_reward": False} | more,
        "actor_rollout_ref": {"rollout": {"n": n, "val_kwargs": {"n": val_n}}},
    }


def sample(tokenizer: Any, prompt: Any, response: str, *, kind: type = Data, rows: int = 1, **about: Any) -> Any:
    """One call's data as verl's agent loop makes it (``_compute_score``): left prompt, right-padded response."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    response_ids = torch.full((rows, LENGTH), tokenizer.pad_token_id)
    response_ids[-1, : len(ids)] = torch.tensor(ids)
    prompt_ids = torch.tensor([[5, 6, 7]] * rows)
    mask = torch.cat([torch.ones(rows, 3, dtype=torch.int64), (response_ids != tokenizer.pad_token_id).long()], 1)
    batch = {"prompts": prompt_ids, "responses": response_ids, "attention_mask": mask}
    about = {"raw_prompt": prompt, "global_steps": 7, "extra_info": {"split": "train"}} | about
    return kind(batch, {name: np.array([value] * rows) for name, value in about.items()})


def run_all(manager: Any, tokenizer: Any, kind: type = Data) -> list[dict[str, Any]]:
    """All samples of both groups at once, in random order; results in the order of the groups."""
    calls = [(uid, k) for uid in range(2) for k in range(4)]
    mixed = random.Random(0).sample(calls, len(calls))

    async def gathered() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(
                manager.run_single(
                    sample(tokenizer, GROUPS[u][0], GROUPS[u][1][k], kind=kind, uid=f"uid-{u}", session_id=k)
                )
                for u, k in mixed
            )
        )

    results = dict(zip(mixed, asyncio.run(gathered()), strict=True))
    return [results[call] for call in calls]


def batch_of(tokenizer: Any) -> Data:
    rows = [sample(tokenizer, prompt, text).batch for prompt, texts in GROUPS for text in texts]
    return Data({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, {})


def exact(engine: RewardEngine) -> torch.Tensor:
    return engine.score([prompt for prompt, _ in GROUPS], [texts for _, texts in GROUPS]).advantages
