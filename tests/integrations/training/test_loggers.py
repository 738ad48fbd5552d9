"""``report_to``: wandb without a network, and trackio, each read back. tensorboard's are in test_trainer.py."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore.integrations.trl import PairwiseRewardTrainer

HEAD = {"num_features": 64, "kernel_scale": 3.0}
WANTED = {"train/loss", "eval/accuracy", "eval/log_loss", "eval/ece", "eval/auroc_u"}


@pytest.fixture
def logged(backbone_of, config_of, preferences):
    """``logged(name)``: the losses of a run that reports there."""

    def run(name: str) -> list[float]:
        args = config_of(
            report_to=[name], run_name="small", project="rewards", eval_strategy="steps", eval_steps=2,
            posterior_at_evaluation=True,
        )  # fmt: skip
        trainer = PairwiseRewardTrainer(
            backbone_of(), args, head=HEAD, train_dataset=preferences, eval_dataset=preferences[:9]
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


def test_wandb_without_a_network(logged, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (make test-sharding)")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    losses = logged("wandb")
    wandb.finish()
    wandb.teardown()  # the process that writes has ended
    (file,) = tmp_path.rglob("*.wandb")
    found: dict[str, list[float]] = {}
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert found.keys() >= WANTED
    assert found["train/loss"] == pytest.approx(losses)


def records(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: a log in LevelDB's format, 32 KiB blocks of (crc, length, type) and data, after 7 bytes."""
    block = 32768
    data, at, begun = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        at += 7 + length
        begun = part if kind in (1, 2) else begun + part  # whole, first; middle, last
        if kind in (1, 4):
            yield begun


def test_trackio(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="trackio is not installed (make test-sharding)")
    losses = logged("trackio")
    (file,) = tmp_path.rglob("rewards.db")
    found: dict[str, list[float]] = {}
    with sqlite3.connect(file) as database:
        for (row,) in database.execute("select metrics from metrics order by step, id"):
            for name, value in json.loads(row).items():
                found.setdefault(name, []).append(value)
    assert found.keys() >= WANTED
    assert found["train/loss"] == pytest.approx(losses)
