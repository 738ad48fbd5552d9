"""The host's time before a launch: both ways are measured, and the planned one is the shorter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from rmcore.bench import eager, gpu_probe


def check(rows: list[dict]) -> None:
    assert {(row["rows"], row["way"]) for row in rows} == {(n, way) for n in (1, 64) for way in ("long", "planned")}
    us = {(row["rows"], row["way"]): row["host_us"] for row in rows}
    assert all(row["driver"] == "none" for row in rows)
    for n in (1, 64):
        assert 0 < us[n, "planned"] < us[n, "long"]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_planned_way_is_the_shorter(monkeypatch, backend):
    monkeypatch.setitem(eager.ROWS, backend, (1, 64))
    monkeypatch.setattr(eager, "ROUNDS", 15)
    check(list(eager.measure(backend, torch.device("cpu"), 64, print)))


def test_the_first_contact_reports_it(tmp_path, monkeypatch):
    monkeypatch.setitem(eager.ROWS, "cuda", (1,))
    monkeypatch.setattr(eager, "ROUNDS", 2)
    out = tmp_path / "rows.jsonl"
    options = ["eager", "--device", "cpu", "--size", "32", "--backends", "cuda", "--out", str(out)]
    assert gpu_probe.main(options) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in found] == ["eager cuda, long", "eager cuda, planned", "eager cuda"]
    assert all(row["host_us"] > 0 for row in found[:2])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_tritons_way_too_with_its_own_binder_and_compiled_kernels():
    code = """
import json, torch
from rmcore.bench import eager
eager.ROWS["triton"], eager.ROUNDS = (1, 64), 5
print(json.dumps(list(eager.measure("triton", torch.device("cpu"), 128, print))))
print(json.dumps(list(eager.operations(torch.device("cpu"), 128, ("power_iteration",)))))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    scores, others = done.stdout.splitlines()[-2:]
    check(json.loads(scores))
    us = {(row["op"], row["way"]): row["host_us"] for row in json.loads(others)}
    assert us["power_iteration", "direct"] < us["power_iteration", "looked up"]
