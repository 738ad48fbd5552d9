"""Two gloo ranks, DDP, FSDP2, ZeRO-3, against one process: losses alike to rounding, heads to the bit, one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rmcore.head import SNGPHead
from rmcore.model import RewardModel

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore.integrations.training.replicated_head import ReplicatedHead

RUNS = ("plain", "concat accumulated", "covariance", "streamed", "resumed")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--main_process_port=0")  # fmt: skip
LAUNCHERS = {
    "alone": (),
    "ddp": TORCHRUN,
    "transformers-fsdp": TORCHRUN,
    "fsdp": (*ACCELERATE, "--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"),
    "zero3": (*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file=zero3.json"),
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # Else parameters as small as these stay whole.
    "zero_optimization": {
        "stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0
    },
}  # fmt: skip
SHARDED = {"ddp": "whole", "transformers-fsdp": "fsdp2", "fsdp": "fsdp2", "zero3": "zero3"}
KINDS = [kind for kind in LAUNCHERS if kind != "alone"]
RESUMABLE = [kind for kind in KINDS if kind != "transformers-fsdp"]  # transformers refuses: it keeps no optimiser state


@pytest.fixture(scope="module")
def runs(make_backbone, preferences, tmp_path_factory) -> Callable[[str], Path]:
    """``runs(kind)``: the folder with what ranks_run.py writes of it, run once."""
    folder = tmp_path_factory.mktemp("ranks")
    base = make_backbone("llama", model={"num_hidden_layers": 2})
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    script = Path(__file__).with_name("ranks_run.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'tests'}"}
    given = [str(script), str(folder / "base"), str(folder / "pairs.jsonl"), str(folder)]

    @cache
    def run(kind: str) -> Path:
        more: dict[str, str] = {}
        if kind == "zero3":
            pytest.importorskip("deepspeed", reason="deepspeed is not installed (make test-sharding)")
            more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        names = [f"{kind} {name}" for name in RUNS if name != "resumed" or kind == "alone" or kind in RESUMABLE]
        command = [sys.executable, *LAUNCHERS[kind], *given, *names]
        # DeepSpeed compiles an operation of its own for gloo the first time.
        done = subprocess.run(
            command, cwd=folder, env=env | more, capture_output=True, text=True, timeout=290, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "run"), [(kind, run) for kind in KINDS for run in RUNS if run != "resumed" or kind in RESUMABLE]
)
def test_two_ranks_train_what_one_process_trains(kind, run, runs):
    folder = runs(kind)
    alone = json.loads((runs("alone") / f"alone {run} rank 0.json").read_text())
    told = [json.loads((folder / f"{kind} {run} rank {rank}.json").read_text()) for rank in range(2)]
    assert {one["sharded"] for one in told} == {SHARDED[kind]}
    assert told[0]["losses"] == told[1]["losses"]
    assert told[0]["metrics"] == pytest.approx(told[1]["metrics"], nan_ok=True, rel=1e-12)
    assert told[0]["sigma"] == told[1]["sigma"]
    # float32 sums in another order, through six steps of AdamW
    assert told[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert told[0]["metrics"] == pytest.approx(alone["metrics"], rel=2e-3, nan_ok=True)
    assert told[0]["sigma"] == pytest.approx(alone["sigma"], rel=1e-4)
    assert told[0]["count"] == told[1]["count"] == alone["count"] == (48 if "concat" in run else 24)
    heads = [load_file(folder / f"{kind} {run} rank {rank}.safetensors") for rank in range(2)]
    reference = load_file(folder / f"alone {run} rank 0.safetensors")
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name]), name
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(tensor, reference[name], rtol=1e-2, atol=2e-3 * scale)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_run_of_two_ranks_that_ended_goes_on(kind, runs):
    """From its checkpoint: the losses after it are those of the run that was not stopped."""
    folder = runs(kind)
    whole, resumed = (json.loads((folder / f"{kind} {run} rank 0.json").read_text()) for run in ("plain", "resumed"))
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    heads = [load_file(folder / f"{kind} {run} rank 0.safetensors") for run in ("plain", "resumed")]
    for name, tensor in heads[0].items():
        torch.testing.assert_close(heads[1][name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_that_two_ranks_write_scores_as_that_of_one(kind, runs):
    given = ("tell me about the fox 1", ["a good fox is quick", "a bad fox is quick"])
    found = [
        RewardModel.from_pretrained(runs(how) / f"{how} plain model", device="cpu", dtype=torch.float32).score(*given)
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
