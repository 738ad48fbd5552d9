"""Two ranks under torchrun and gloo: whole groups exact, straddling groups refused on both, or gathered and exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.shared import made_once

from rmcore.engine import RewardEngine

pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")

SCRIPT = Path(__file__).with_name("two_ranks.py")


Ranks = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks_of(policy_path, reward_model_path, tmp_path_factory) -> Ranks:
    """``ranks_of(rows, partial_groups)``: each rank's account; one launch for all runs, the failing one last."""

    def launch(out: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(SCRIPT)]
        command += [str(policy_path("llama")), str(reward_model_path), str(out), "8,raise", "6,gather", "6,raise"]
        env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert len(list(out.glob("*.json"))) == 6, done.stderr[-3000:]

    out = made_once(tmp_path_factory, "two ranks", launch)
    return lambda rows, partial: [
        json.loads((out / f"{rows} {partial} rank {rank}.json").read_text()) for rank in range(2)
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
@pytest.mark.parametrize(("rows", "partial_groups"), [(8, "raise"), (6, "gather")], ids=["whole", "gathered"])
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
