"""`rmcore train --config`: one YAML file for options, data and the trainer; several processes train one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.model import RewardModel

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (pip install 'rmcore[train]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def config(tmp_path: Path, backbone_path: Path, preferences: Path, held_out: Path):
    """``config(**changes)``: a file, with a value of None to leave a key out."""

    def write(**changes: object) -> Path:
        values = {
            "backbone": str(backbone_path), "pooling": "mean", "out": str(tmp_path / "model"), "features": 64,
            "layer-size": 8, "device": "cpu", "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1,
            "learning_rate": 1e-3, "datasets": [{"path": str(preferences), "weight": 1.5}, str(held_out)],
            "held_out": 0.2, "error-prior": False,
        }  # fmt: skip
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return path

    return write


def test_a_run_from_a_file(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    path = config(report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    result = call("train", "--config", path, "--set", "max_steps=6", "--layer-size", 16)
    assert result.exit_code == 0, result.stderr
    assert "| source | weight | read |" in result.stderr
    head = json.loads((tmp_path / "model" / "rmcore.json").read_text())["head"]["config"]
    assert (head["layer_size"], head["num_features"]) == (16, 64)  # the command line wins over the file
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval/accuracy")] == [2, 4, 6]
    model = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert model.score("red tree house", ["good clear", "bad rude"]).preference.isfinite().all()


def test_adapters_from_a_file(config, preferences, tmp_path):
    pytest.importorskip("peft")
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["query", "value"]}
    result = call("train", preferences, "--config", config(**lora, datasets=None, held_out=None))
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "model" / "backbone" / "adapter_config.json").read_text())
    assert told["r"] == 2
    assert not (tmp_path / "model" / "backbone" / "model.safetensors").exists()


def test_sources_are_streamed(config, preferences, tmp_path):
    """Without duplicates, with prompts held out by their hash, and a report of what was read."""
    with preferences.open("a") as file:
        file.write(preferences.read_text().splitlines()[0] + "\n")
        file.write(json.dumps({"prompt": "red", "chosen": "good", "rejected": "good"}) + "\n")
    report = tmp_path / "data.json"
    changes = {"datasets": [str(preferences)], "held_out": 0.3, "held_out_pairs": 10, "eval_strategy": "steps"}
    path = config(streaming=True, max_steps=9, eval_steps=3, data_report=str(report), **changes)
    result = call("train", "--config", path)
    assert result.exit_code == 0, result.stderr
    assert "a stream (1 pairs left out)" in result.stderr
    told = json.loads(report.read_text())
    (source,) = told["sources"]
    assert (source["read"], source["duplicates"]) == (62, 1)
    assert told["left_out"] == {"equal responses": 1}
    assert 5 <= told["held_out"] == 61 - told["trained"] - 1 <= 30
    assert "Left out, since nothing can be learned from them: 1 equal responses." in result.stderr
    assert (tmp_path / "model" / "backbone" / "model.safetensors").is_file()


@pytest.mark.parametrize("trained", [True, False])
def test_over_long_pairs_are_in_the_table(trained, config, preferences, tmp_path):
    """Of a backbone that is trained, and of one that stays as it is."""
    with preferences.open("a") as file:
        file.write(json.dumps({"prompt": "red " * 40, "chosen": "good", "rejected": "bad"}) + "\n")
    changes = {"overlong": "no-reward", "max_length": 30, "datasets": [str(preferences)], "held_out": None}
    if not trained:
        names = ("max_steps", "per_device_train_batch_size", "logging_steps", "learning_rate")
        changes |= dict.fromkeys(names)
    result = call("train", "--config", config(**changes, data_report=str(tmp_path / "data.json")))
    assert result.exit_code == 0, result.stderr
    assert "| 61 | 0 | 0 | 61 | 1 over-long |" in result.stderr
    assert json.loads((tmp_path / "data.json").read_text())["trained"] == 60


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learnin_rate": 1e-3}, "unknown keys ['learnin_rate']"),
        ({"max_steps": None}, "num_train_epochs or max_steps too"),
        ({"eval_strategy": "epoch", "held_out": None}, "eval_strategy"),
        ({"held_out": "a tenth"}, "held_out"),
        ({"datasets": [{"file": "x"}]}, "datasets[0]"),
        ({"fp16": True}, "fp16"),
        ({"covariance_momentum": 0.9}, "covariance_momentum"),
        ({"datasets": None}, "preferences"),
        ({"streaming": True, "max_steps": None, "num_train_epochs": 1}, "streaming"),
        ({"held_out_pairs": 5}, "held_out_pairs"),
        ({"streaming": True, "remembered": -1}, "remembered"),
        ({"data_report": 3}, "data_report"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan, expected a finite number"),
        ({"lr_scheduler_kwargs": {"min_lr": float("nan")}}, "lr_scheduler_kwargs.min_lr: got nan"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm: got inf, expected a finite number"),
        ({"use_peft": True, "lora_r": 0}, "lora_r: got 0, expected a whole number, at least 1"),
        (
            {"use_peft": True, "lora_dropout": float("nan")},
            "lora_dropout: got nan, expected a number, at least 0, below 1",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, changes, told):
    result = call("train", "--config", config(**changes))
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "ridge: 1\nseed: 0\nridge: 2\n",
        "seed: 0\nlr_scheduler_kwargs: {ridge: 1, ridge: 2}\n",
        "datasets:\n- path: a\n- ridge: 1\n  ridge: 2\n",
        "a: &x {b: &y [*x, {ridge: 1, ridge: 2}]}\nc: *x\n",
    ],
)
def test_a_name_that_comes_twice_is_told_wherever_it_stands(tmp_path, text):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    result = call("train", "--config", path, "-o", tmp_path / "out", "--backbone", "x")
    assert result.exit_code == 2
    assert "with 'ridge' twice, expected each name once" in result.stderr


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "train.yaml"
    for text in ("- a\n- b\n", "a: [", "1: 2\n", "ridge: 1\nseed: 0\nridge: 2\n", "[" * 20_000):
        path.write_text(text)
        result = call("train", "--config", path, "-o", tmp_path / "out", "--backbone", "x")
        assert result.exit_code == 2
        assert "--config" in result.stderr
    result = call("train", "x.jsonl", "-o", tmp_path / "out", "--backbone", "x", "--set", "max_steps")
    assert result.exit_code == 2
    assert "name=value" in result.stderr


_TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
_ACCELERATE = ("accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--dynamo_backend=no", "--main_process_port=0")  # fmt: skip
# BERT's own list of what is sharded whole has its embeddings, which accelerate 1.15 then shards a second time.
_FSDP = ("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
         "--fsdp_transformer_layer_cls_to_wrap=BertLayer")  # fmt: skip
# On processors accelerate has gloo for DDP alone: what it takes for FSDP and DeepSpeed to take it is said with each.
LAUNCHERS = {
    "torchrun": ([*_TORCHRUN, "-m", "rmcore"], {}, []),
    "accelerate": ([*_ACCELERATE, "--multi_gpu", "-m", "rmcore"], {}, []),
    "fsdp": ([*_ACCELERATE, *_FSDP, "-m", "support.accelerate_gloo", "rmcore"], {}, ["use_cpu=false"]),
    "zero3": (
        [*_ACCELERATE, "--use_deepspeed", "--zero_stage=3", "--zero3_save_16bit_model=true", "-m", "rmcore"],
        {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"},
        ["use_cpu=false", "ddp_backend=gloo"],
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_one_model(launcher, config, tmp_path):
    if launcher == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (make test-sharding)")
    how, more, settings = LAUNCHERS[launcher]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    env["PYTHONPATH"] = f"{Path.cwd()}:{Path.cwd() / 'tests'}"
    given = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", *how, "train", "--config", str(config()), *given]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("on 2 processes") == 1
    model = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert model.score("red tree house", ["good clear", "bad rude"]).preference.isfinite().all()
