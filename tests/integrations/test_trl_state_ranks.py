"""Two ranks under torchrun and gloo that stop and resume: each goes on with its own budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")

SCRIPT = Path(__file__).with_name("two_ranks_state.py")


@pytest.mark.slow
def test_budgets_of_two_ranks_hold_over_a_resumed_run(policy_path, reward_model_path, tmp_path):
    """Every rank has a budget of its own, here 5 calls and 9, and gets its own back; whole groups and gathered ones."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(SCRIPT)]
    command += [str(policy_path("llama")), str(reward_model_path), str(tmp_path), "8,raise", "6,gather"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    for mode in ("8,raise", "6,gather"):
        files = [tmp_path / mode / f"rank{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in files), done.stderr[-3000:]
        ranks = [json.loads(file.read_text()) for file in files]
        assert not [rank["error"] for rank in ranks if "error" in rank]
        assert [rank["calls"] for rank in ranks] == [[5, 5], [9, 9]]
        document = json.loads((tmp_path / mode / "checkpoint-6" / "rmcore_state.json").read_text())
        assert [state["router"]["state"]["budgets"][0]["spent"] for state in document["ranks"]] == [5, 9]
        assert len(ranks[0]["win_rates"]) == 6
        assert all(0 <= rate <= 1 for rate in ranks[0]["win_rates"])
