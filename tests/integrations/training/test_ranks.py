"""Two gloo ranks, DDP and FSDP2, against one process: losses alike to rounding, heads alike to the bit, one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rmcore.head import SNGPHead
from rmcore.model import RewardModel

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore.integrations.training.replicated_head import ReplicatedHead

RUNS = ("plain", "concat accumulated", "covariance")


@pytest.fixture(scope="module")
def runs(make_backbone, preferences, tmp_path_factory) -> Path:
    """The folder with what ranks_run.py writes: each run alone, over DDP and over FSDP2."""
    folder = tmp_path_factory.mktemp("ranks")
    base = make_backbone("llama", model={"num_hidden_layers": 2})
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = Path(__file__).with_name("ranks_run.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd())}
    given = [str(script), str(folder / "base"), str(folder / "pairs.jsonl"), str(folder)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0"]
    for how, kinds in ([], ("alone",)), (torchrun, ("ddp", "fsdp")):
        names = [f"{kind} {run}" for kind in kinds for run in RUNS]
        done = subprocess.run(
            [sys.executable, *how, *given, *names], env=env, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_process_trains(kind, run, runs):
    alone = json.loads((runs / f"alone {run} rank 0.json").read_text())
    told = [json.loads((runs / f"{kind} {run} rank {rank}.json").read_text()) for rank in range(2)]
    assert told[0]["losses"] == told[1]["losses"]
    assert told[0]["metrics"] == pytest.approx(told[1]["metrics"], nan_ok=True, rel=1e-12)
    # float32 sums in another order, through six steps of AdamW
    assert told[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert told[0]["metrics"] == pytest.approx(alone["metrics"], rel=2e-3, nan_ok=True)
    assert told[0]["count"] == told[1]["count"] == alone["count"] == (48 if "concat" in run else 24)
    heads = [load_file(runs / f"{kind} {run} rank {rank}.safetensors") for rank in range(2)]
    reference = load_file(runs / f"alone {run} rank 0.safetensors")
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name]), name
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(tensor, reference[name], rtol=1e-2, atol=2e-3 * scale)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_folder_that_two_ranks_write_scores_as_that_of_one(kind, runs):
    given = ("tell me about the fox 1", ["a good fox is quick", "a bad fox is quick"])
    found = [
        RewardModel.from_pretrained(runs / f"{how} plain model", device="cpu", dtype=torch.float32).score(*given)
        for how in (kind, "alone")
    ]
    torch.testing.assert_close(found[0].preference, found[1].preference, rtol=1e-2, atol=1e-3)


def test_heads_of_two_ranks_stay_the_same_bits():
    """Without processes: each rank's own gradient, the mean of both, one AdamW step and one of power iteration."""
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    flat: list[torch.Tensor] = []

    def one(rank: int, means: list[torch.Tensor]) -> ReplicatedHead:
        def reduce(mine: torch.Tensor, how: str) -> torch.Tensor:
            assert how == "mean"
            flat.append(mine.clone())
            return means[0].clone() if means else mine

        accelerator = SimpleNamespace(num_processes=2, reduce=reduce)
        head = SNGPHead(12, num_features=16, layer_size=4, length_scale=2.0)
        whole = ReplicatedHead(head, None, lr=0.1, weight_decay=0.01, max_grad_norm=1.0, accelerator=accelerator)
        torch.nn.init.ones_(head.beta)
        head.step_power_iteration(50)
        head(rows[3 * rank : 3 * rank + 3]).sum().backward()
        whole.step(1.0, 10.0, 0)
        return whole

    for rank in range(2):
        one(rank, [])
    assert not torch.equal(flat[0], flat[1])
    mean = [(flat[0] + flat[1]) / 2]
    first, second = one(0, mean), one(1, mean)
    assert all(torch.equal(t, second.head.state_dict()[name]) for name, t in first.head.state_dict().items())
    assert not torch.equal(first.head.weight, SNGPHead(12, num_features=16, layer_size=4, length_scale=2.0).weight)
