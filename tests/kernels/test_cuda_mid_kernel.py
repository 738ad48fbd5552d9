"""The kernel for 65 to 512 rows itself, run on the host: csrc/cuda/mid.cuh on a GPU made of fibers, in bf16.

Every thread of every thread block, in random order, with copies that come late and products that are taken late
(csrc/cuda/emulate_mid_device.h): whatever is given back, read or waited for too early or too late shows in the numbers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from test_cuda_emulation import check, head, pointer, truth

from rmcore.ops.weights import HeadWeights

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
REPLACED = ("barrier.cuh", "device.cuh", "mid_ptx.cuh", "mid_wgmma.cuh")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    shutil.copy(SOURCES / "mid.cuh", folder)
    for name in REPLACED:
        (folder / name).write_text('#include "emulate_mid_device.h"\n')
    names = [str(SOURCES / name) for name in ("emulate_mid_kernel.cpp", "mid_plan.cpp")]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-I", str(folder), "-I", str(SOURCES), *names]
    subprocess.run([*command, "-o", str(folder / "libkernel.so")], check=True, capture_output=True)
    found = ctypes.CDLL(str(folder / "libkernel.so"))
    found.emulate_mid_kernel_message.restype = found.emulate_mid_report.restype = ctypes.c_char_p
    return found


def run(
    library, hidden: Tensor, weights: HeadWeights, *, clusters: int, columns: int, seed: int = 0, missing: int = -1
) -> tuple[Tensor, int]:
    """(4, B), and what a launch with a missing cluster tells the host."""
    m, rows, f = weights.map, hidden.shape[0], ctypes.c_float
    unit = -(-m.hidden_size // 8) * 8
    projection = torch.nn.functional.pad(m.projection, (0, unit - m.hidden_size)).contiguous()
    out, report = torch.full((4, rows), 7.0), ctypes.c_uint64()
    code = library.emulate_mid_kernel(
        m.hidden_size, m.num_features, pointer(projection), ctypes.c_int64(unit), pointer(m.phase),
        pointer(weights.beta), pointer(weights.factor), int(m.features == "linear"), f(weights.beta0),
        f(weights.factor_scale), f(weights.amplitude), pointer(hidden), ctypes.c_int64(hidden.stride(0)), rows,
        clusters, columns, ctypes.c_uint(seed), missing, pointer(out), ctypes.byref(report),
    )  # fmt: skip
    assert code == 0, library.emulate_mid_kernel_message().decode()
    return out, report.value


def rows_of(rows: int, h: int) -> Tensor:
    """A wider tensor's first columns."""
    return torch.randn(rows, h + 5, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :h]


@pytest.mark.parametrize(
    ("h", "d", "rows", "clusters", "columns"),
    [
        (70, 100, 65, 4, 64),  # one tile, in groups
        (330, 300, 70, 3, 128),  # three tiles, so one without a partner
        (200, 260, 130, 2, 192),  # a cluster has two tiles, and three halves
        (130, 390, 300, 5, 192),  # more rows than are taken at once
        (2560, 30, 200, 1, 256),  # the ring goes round two and a half times, then again
        (64, 700, 200, 1, 256),  # and five times in the triangle, six jobs after six
    ],
)
def test_the_kernel(library, h, d, rows, clusters, columns):
    weights, hidden = head(h, d, dtype=torch.bfloat16), rows_of(rows, h)
    want = truth(hidden.float(), weights)
    first, report = run(library, hidden, weights, clusters=clusters, columns=columns)
    assert report == 0
    check(first, want, torch.bfloat16, d)
    again, _ = run(library, hidden, weights, clusters=clusters, columns=columns, seed=1)
    assert torch.equal(first, again)  # whoever comes first


def test_linear_features(library):
    weights, hidden = head(80, 100, dtype=torch.bfloat16, linear=True), rows_of(66, 80)
    found, _ = run(library, hidden, weights, clusters=2, columns=64)
    check(found, truth(hidden.float(), weights), torch.bfloat16, 100)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_cluster_that_does_not_come_ends_the_launch_with_nan_and_is_named(library, missing):
    """What was asked for ahead of the barrier has come by then: a box in flight would be an error."""
    weights, hidden = head(100, 300, dtype=torch.bfloat16), rows_of(70, 100)
    for seed in (0, 1):
        found, report = run(library, hidden, weights, clusters=3, columns=128, missing=missing, seed=seed)
        assert found.isnan().all()
        message = library.emulate_mid_report(ctypes.c_uint64(report)).decode()
        assert message.startswith(f"thread block {4 * missing} did not come to grid barrier 1 of an earlier score")
