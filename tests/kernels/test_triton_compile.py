"""The Triton kernels compile for GPUs that are not here, spill nothing and fit; triton itself is imported late.

The ends of the tables only, for Hopper; ``make compile-gate`` sets RMCORE_ALL_ARCHS=1 and has the others compiled too.
All of the tables: ``python tests/kernels/compile_triton.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHS = {80, 90, 100} if os.environ.get("RMCORE_ALL_ARCHS") == "1" else {90}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_without_spills_and_fit_shared_memory(tmp_path):
    script = Path(__file__).parent / "compile_triton.py"
    # Beside other tests one process, which imports torch and triton once; where it has the machine, one a core.
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(os.cpu_count() or 1, 4)
    options = ["--quick", "--archs", *map(str, sorted(ARCHS)), "--workers", str(workers)]
    done = run(str(script), *options, "--json", str(tmp_path / "builds"))
    assert done.returncode == 0, done.stdout + done.stderr
    builds = json.loads((tmp_path / "builds").read_text())
    assert {build["arch"] for build in builds} == ARCHS
    kernels = {
        "add_kernel", "attributes_kernel", "centre_kernel", "column_int8_kernel", "column_kernel",
        "column_pair_kernel", "column_score_kernel", "copy_kernel", "fold_kernel", "gate_kernel", "gram_kernel",
        "group_kernel", "join_kernel", "last_kernel", "layernorm_kernel", "pair_kernel", "piece_int8_kernel",
        "piece_kernel", "piece_score_kernel", "project_int8_kernel", "project_kernel", "rows_kernel",
        "score_int8_kernel", "score_kernel", "square_int8_kernel", "square_kernel", "step_kernel", "weigh_kernel",
    }  # fmt: skip
    described = {b["kernel"] for b in builds if b["boxes"]}  # and every box as large as where it goes: faults()
    if 90 in ARCHS:
        kernels |= described
        assert described == {
            "project_tma_kernel", "column_persistent_kernel", "column_specialized_kernel", "gram_persistent_kernel",
            "gram_specialized_kernel",
        }  # fmt: skip
        assert all(b["unit"] == "wgmma" and not b["spills"] for b in builds if b["boxes"])
        # Of each kernel that may specialise: two consumers of 128 threads beside a producer.
        assert {b["warps"] for b in builds if "specialized" in b["kernel"] or "SPECIAL=True" in b["constants"]} == {12}
    # Sums of int8 rows are cut, and joined, on some architectures only.
    assert {build["kernel"] for build in builds} - {"join_int8_kernel"} == kernels
    # Hopper's own matrix instructions where the tiles are large enough for them, which faults() insists on.
    large = {build["kernel"] for build in builds if build["unit"] == "wgmma"}
    assert {
        "project_kernel",
        "gate_kernel",
        "column_kernel",
        "gram_kernel",
        "column_pair_kernel",
        "column_score_kernel",
    } <= large
    # Whole numbers are multiplied as bytes, large tiles by Hopper's own instructions: wgmma … s32.s8.s8.
    bytewise = {b["kernel"] for b in builds if b["unit"] == "wgmma s8"}
    assert {"project_int8_kernel", "column_int8_kernel"} <= bytewise
    counting = {build["kernel"] for build in builds if build["counts"]}
    assert counting == {"piece_score_kernel", "column_score_kernel", "column_pair_kernel"}


def test_rmcore_and_its_backend_import_without_triton(torch_python):
    code = (
        "import sys, torch, rmcore, rmcore.ops, rmcore.ops.backends.triton as t\n"
        "t.unavailable('score', torch.device('cpu'), torch.float16)\n"
        "sys.exit('triton' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = torch_python.start(code, env=environment)
    _, errors = done.communicate()
    assert done.returncode == 0, errors


def test_on_a_cpu_the_backend_says_what_it_needs(monkeypatch):
    import torch

    from rmcore.ops.backends import triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cpu" in str(triton.unavailable("score", torch.device("cpu"), torch.float16))
    assert "float64" in str(triton.unavailable("score", torch.device("cuda"), torch.float64))
