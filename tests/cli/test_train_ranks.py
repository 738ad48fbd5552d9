"""``rmcore train`` and ``upgrade`` under torchrun: the model of one process, and an end that says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmcore.model.reward_model import RewardModel

pytestmark = pytest.mark.distributed


def run(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", "-m", "rmcore.cli"]
    command = [sys.executable, *(torchrun if size > 1 else ["-m", "rmcore.cli"]), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RMCORE_CACHE": "off", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)


def heads(folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    model = RewardModel.from_pretrained(folder)
    assert model.error_prior is not None
    return model.head.beta, model.error_prior.mean, model.head.config.resolved_amplitude


def test_training_over_two_and_four_ranks_is_training_in_one_process(tmp_path, preferences, held_out, backbone_path):
    settings = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--calibrate", held_out, "--tune"]
    found = {}
    for size in (1, 2, 4):
        out = tmp_path / f"over {size}"
        done = run(size, "train", preferences, "-o", out, *settings)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("60 pairs, ") == 1, done.stderr  # rank 0 alone speaks
        found[size] = heads(out)
    for size in (2, 4):
        for mine, one in zip(found[size][:2], found[1][:2], strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-4)
        assert found[size][2] == pytest.approx(found[1][2], rel=1e-3)


def test_upgrading_over_ranks_is_upgrading_in_one_process(tmp_path, preferences, classifier_path):
    for size in (1, 3):
        done = run(size, "upgrade", classifier_path, preferences, "-o", tmp_path / str(size), "--no-error-prior")
        assert done.returncode == 0, done.stderr
    one, three = (RewardModel.from_pretrained(tmp_path / size).head for size in ("1", "3"))
    assert torch.equal(one.beta, three.beta)
    torch.testing.assert_close(three.posterior.precision, one.posterior.precision, rtol=1e-5, atol=1e-5)


def test_what_one_rank_cannot_read_ends_all(tmp_path, preferences, backbone_path):
    with preferences.open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "good"}) + "\n")
    done = run(2, "train", preferences, "-o", tmp_path / "out", "--backbone", backbone_path)
    assert done.returncode != 0
    assert f"{preferences}:61: rejected: missing" in done.stderr
    assert not (tmp_path / "out").exists()
