"""Two ranks under torchrun and gloo: whole groups exact, straddling groups refused on both, or gathered and exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmcore.engine import RewardEngine

pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")

Ranks = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks_of(two_ranks) -> Ranks:
    """``ranks_of(rows, partial_groups)``: each rank's account."""
    return lambda rows, partial: [
        json.loads((two_ranks / f"{rows} {partial} rank {rank}.json").read_text()) for rank in range(2)
    ]


def expected(reward_model, ranks: list[dict], step: int, size: int = 4) -> torch.Tensor:
    """Advantages of the rows of all ranks, computed here from the texts the ranks saw."""
    prompts = [p for rank in ranks for p in rank["seen"][step]["prompts"]]
    texts = [c for rank in ranks for c in rank["seen"][step]["completions"]]
    starts = range(0, len(texts), size)
    assert all(len(set(prompts[s : s + size])) == 1 for s in starts)
    scores = RewardEngine(reward_model).score([prompts[s] for s in starts], [texts[s : s + size] for s in starts])
    return scores.advantages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "partial_groups"),
    [(8, "raise"), (6, "gather"), (8, "raise served"), (6, "gather served")],
    ids=["whole", "gathered", "whole, from a vLLM server", "gathered, from a vLLM server"],
)
def test_two_ranks_are_exact(rows, partial_groups, ranks_of, reward_model):
    ranks = ranks_of(rows, partial_groups)
    assert not [rank["error"] for rank in ranks if "error" in rank]
    for step in range(2):
        ours = expected(reward_model, ranks, step)
        theirs = torch.tensor([a for rank in ranks for a in rank["advantages"][step]], dtype=torch.float64)
        assert len(theirs) == 2 * rows
        assert float(ours.abs().max()) > 0.01
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_straddling_groups_raise_on_every_rank(ranks_of):
    for rank in ranks_of(6, "raise"):
        assert rank["error"].startswith("GroupingError")
        for word in ("per_device_train_batch_size", "steps_per_generation", "num_generations"):
            assert word in rank["error"]
