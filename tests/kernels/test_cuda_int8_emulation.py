"""The streamed int8 kernel's index arithmetic, run on the host: csrc/cuda/emulate_int8.cpp against whole numbers."""

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

from int8_checks import check_same_numbers, draw, make_head, spread

from rmcore.ops import whole_numbers
from rmcore.ops.weights import HeadWeights

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulate") / "libemulate.so"
    names = [str(SOURCES / name) for name in ("emulate_int8.cpp", "int8_plan.cpp", "stream_plan.cpp", "score_plan.cpp")]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *names, "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    found = ctypes.CDLL(str(target))
    found.emulate_int8_message.restype = ctypes.c_char_p
    return found


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def run(
    library, hidden: Tensor, weights: HeadWeights, grid: int, *, spoilt: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """(4, B), and c in whole numbers (B, D). Of ``spoilt`` rows the factor is NaN."""
    m, (rows, h), d, f = weights.map, hidden.shape, weights.num_features, ctypes.c_float
    two = 2 * h <= d
    x = hidden if m.hidden_shift is None else (hidden - m.hidden_shift) * m.hidden_scale
    found = whole_numbers.whole_rows(x, two)
    whole, low = found.whole.to(torch.int8), found.low.to(torch.int8) if two else None
    factors = found.factor[:, 0].clone()
    factors[list(spoilt)] = math.nan
    pitch = -(-h // 16) * 16
    projection = torch.nn.functional.pad(m.projection, (0, pitch - h)).contiguous()
    out, kept = torch.full((4, rows), math.nan), torch.full((rows, d), 77, dtype=torch.int8)
    code = library.emulate_int8(
        h, d, pointer(projection), ctypes.c_int64(pitch), pointer(m.projection_scale), pointer(m.phase),
        pointer(weights.beta), pointer(weights.factor), pointer(weights.factor_row_scale),
        pointer(weights.factor_diagonal), f(weights.beta0), f(weights.factor_scale), f(weights.amplitude),
        pointer(whole), pointer(low), pointer(factors), pointer(found.apart), rows, grid,
        pointer(out), pointer(kept),
    )  # fmt: skip
    assert code == 0, library.emulate_int8_message().decode()
    return out, kept


@pytest.mark.parametrize(
    ("h", "d", "grid"),
    [(1, 1, 5), (15, 17, 1), (16, 130, 3), (33, 127, 40), (129, 70, 7), (2060, 40, 5), (72, 300, 9)],
)
def test_every_weight_is_used_once_and_the_numbers_are_right(library, h, d, grid):
    weights = make_head(h, d)
    for rows in (1, 9, 16) if max(h, d) < 200 else (13,):
        hidden = spread(draw(rows, h, seed=rows))
        out, kept = run(library, hidden, weights, grid)
        check_same_numbers(out.double(), whole_numbers.score(hidden, weights), weights)
        exact = 127 * whole_numbers.features(hidden, weights.map)
        assert float((kept.double() - exact).abs().max()) < 0.5 + 1e-3


def test_outliers_and_rows_that_are_not_finite(library):
    weights, hidden = make_head(100, 130), draw(12, 100)
    hidden[3, 5], hidden[7, 99] = 900.0, -800.0
    clean, _ = run(library, hidden, weights, 4)
    check_same_numbers(clean.double(), whole_numbers.score(hidden, weights), weights)
    got, _ = run(library, hidden, weights, 4, spoilt=(4,))
    keep = torch.arange(12) != 4
    assert torch.equal(got[:, keep], clean[:, keep])
    assert bool(got[:, 4].isnan().all())


def test_what_it_serves(library):
    """Shared memory of an H100. Beside 16 rows of 4096 and their sums 7 slots are left, 112 KB under way."""
    sizes = {
        (4096, 4096, 1): 12, (4096, 4096, 16): 7, (2048, 4096, 16): 7, (8192, 4096, 16): 0, (8192, 8192, 8): 8,
        (16384, 16384, 8): 4, (16384, 16384, 16): 0,
    }  # fmt: skip
    found = {}
    for h, d, rows in sizes:
        plan = (ctypes.c_int64 * 3)()
        library.emulate_int8_plan(h, d, rows, 132, ctypes.c_int64(232448 - 512), plan)
        found[h, d, rows] = plan[0]
        assert not plan[0] or (plan[1] == 132 and plan[2] < 1 << 20)
    assert found == sizes
