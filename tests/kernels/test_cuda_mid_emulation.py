"""The persistent score of 65 to 512 rows, run on the host: csrc/cuda/emulate_mid.cpp against float64 formulas."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from test_cuda_emulation import DTYPES, check, head, padded, pointer, truth

from rmcore.ops.weights import HeadWeights

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
SHARED = 232448
"""Bytes of shared memory that a thread block of an H100 may have."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulate") / "libemulate.so"
    names = [str(SOURCES / name) for name in ("emulate_mid.cpp", "mid_plan.cpp")]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", *names, "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    found = ctypes.CDLL(str(target))
    found.emulate_mid_message.restype = ctypes.c_char_p
    return found


def run(library, hidden: Tensor, weights: HeadWeights, *, clusters=3, columns=0, slots=3) -> Tensor:
    """(4, B) from (B, h) float32 rows; of ``columns`` rows at once, or as many as the plan takes."""
    m, rows, f = weights.map, hidden.shape[0], ctypes.c_float
    projection, factor, out = padded(m.projection), weights.factor.float().contiguous(), torch.full((4, rows), math.nan)
    code = library.emulate_mid(
        DTYPES[weights.dtype], m.hidden_size, m.num_features, pointer(projection),
        ctypes.c_int64(projection.stride(0)), pointer(m.phase), pointer(weights.beta), pointer(factor),
        int(m.features == "linear"), f(weights.beta0), f(weights.factor_scale), f(weights.amplitude),
        pointer(hidden), ctypes.c_int64(hidden.stride(0)), rows, clusters, columns, slots, pointer(out),
    )  # fmt: skip
    assert code == 0, library.emulate_mid_message().decode()
    return out


def rows_of(rows: int, h: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [65, 66, 96, 127, 128, 129, 192, 193, 255, 256, 257, 384, 511, 512])
def test_every_batch_size(library, rows):
    weights, hidden = head(72, 200), rows_of(rows, 72)
    check(run(library, hidden, weights), truth(hidden, weights), torch.float16, 200)


@pytest.mark.parametrize(
    ("h", "d"),
    [(1, 1), (7, 15), (63, 127), (64, 128), (65, 129), (100, 255), (128, 256), (129, 257), (200, 385), (330, 130)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_h_and_d(library, h, d, dtype):
    """Every k-block of every tile is multiplied once, whatever the sizes; boxes that reach past a matrix hold zeros."""
    weights, hidden = head(h, d, dtype=dtype), rows_of(70, h + 3)[:, :h]
    check(run(library, hidden, weights), truth(hidden, weights), dtype, d)


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
@pytest.mark.parametrize(("rows", "clusters"), [(65, 1), (130, 2), (200, 4), (300, 33)])
def test_rows_at_once_and_clusters(library, rows, clusters, columns):
    weights, hidden = head(150, 300), rows_of(rows, 150)
    found = run(library, hidden, weights, clusters=clusters, columns=columns, slots=4)
    check(found, truth(hidden, weights), torch.float16, 300)


@pytest.mark.parametrize("slots", [3, 5, 8])
def test_bits_do_not_depend_on_where_or_by_whom(library, slots):
    """Of the ring's depth, of the clusters, and of a row's place in the batch."""
    weights, hidden = head(330, 260), rows_of(131, 330)
    first = run(library, hidden, weights, columns=64, clusters=1)
    assert torch.equal(run(library, hidden, weights, columns=64, clusters=5, slots=slots), first)
    assert torch.equal(run(library, hidden, weights, columns=192, clusters=5, slots=slots), first)
    assert torch.equal(run(library, hidden.flip(0), weights, columns=64, slots=slots).flip(1), first)


def test_linear_features_and_bad_rows_stay_alone(library):
    hidden, weights = rows_of(80, 80), head(80, 100, linear=True)
    clean = run(library, hidden, weights)
    check(clean, truth(hidden, weights), torch.float16, 100)
    hidden[4, 79], hidden[71, 5] = math.inf, math.nan
    dirty = run(library, hidden, weights)
    bad = torch.zeros(80, dtype=torch.bool)
    bad[[4, 71]] = True
    assert dirty[:, bad].isnan().any(0).all()
    assert torch.equal(dirty[:, ~bad], clean[:, ~bad])


def test_thread_blocks_that_pass_sums_on_never_wait_for_each_other_for_ever(library):
    for seed in range(4):
        assert library.emulate_mid_exchange(60, ctypes.c_uint(seed)) == 0, library.emulate_mid_message().decode()


def layout(library, h: int, d: int, rows: int, *, m: int = 0, clusters: int = 32, shared: int = SHARED) -> list[int]:
    facts = (ctypes.c_int64 * 11)()
    library.emulate_mid_plan(0, h, d, m, rows, clusters, ctypes.c_int64(shared), facts)
    return list(facts)


@pytest.mark.parametrize(
    ("d", "rows", "columns", "groups"),
    [
        (4096, 65, 128, 1),
        (4096, 128, 128, 1),
        (4096, 129, 192, 1),
        (4096, 256, 256, 1),
        (4096, 300, 192, 2),
        (4096, 512, 256, 2),
        (2048, 128, 64, 2),  # sixteen tiles for 32 clusters: the batch is cut instead
        (2048, 256, 128, 2),
        (1024, 256, 64, 4),
        (8192, 256, 256, 1),
    ],
)
def test_rows_that_are_taken_at_once(library, d, rows, columns, groups):
    found = layout(library, 4096, d, rows)
    assert found[:2] == [columns, groups]
    assert found[3] == min(32, d // 128 * groups)
    assert found[4] >= 4
    assert found[5] <= SHARED
    assert found[6] < 16 << 20
    # In stage 2 all thread blocks have nearly as much to multiply.
    assert found[9] <= 1.1 * found[10] + 2


def test_what_is_not_served(library):
    for facts in (
        layout(library, 4096, 4096, 64),
        layout(library, 4096, 4096, 513),
        layout(library, 4096, 4096, 128, m=4096),  # a layer that does not fold
        layout(library, 4096, 4096, 128, clusters=0),
        layout(library, 4096, 4096, 128, shared=64 << 10),
        layout(library, 1 << 20, 4096, 128),
    ):
        assert facts[0] == 0
