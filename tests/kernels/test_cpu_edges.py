"""Every CPU kernel at odd places, on every instruction set: sizes of one, of a tile and one more or less, strided rows
that end where their memory ends, nothing at all. Against float64, as in the files of the kernels.

More than a plain run has time for, so it is not in ``make test``: ``make sanitize`` runs it on a build that stops at a
byte read or written out of bounds.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.attribute_checks import check_scores, make_heads
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import int8_checks
import test_cpu_score as scores
import test_cpu_sums as sums

from rmcore.ops import reference
from rmcore.ops.backends import cpu
from rmcore.ops.backends import torch as plain
from rmcore.ops.weights import HeadWeights

_cpu = pytest.importorskip("rmcore._cpu")

pytestmark = pytest.mark.sanitize

SIZES = ((1, 1), (3, 65), (63, 64), (64, 63), (65, 3), (1, 129), (129, 1))
"""(h, D)."""
ROWS = (0, 1, 7, 13)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=scores.AVAILABLE, autouse=True)
def isa(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa("auto")


def at_the_end(rows: Tensor, row_gap: int, column_step: int) -> Tensor:
    """The same rows with other strides, the last number of the last row being the last of its memory."""
    count, size = rows.shape
    if not count:
        return rows
    row_stride = (size - 1) * column_step + 1 + row_gap
    memory = torch.full(((count - 1) * row_stride + (size - 1) * column_step + 1,), math.nan, dtype=rows.dtype)
    strided = memory.as_strided((count, size), (row_stride, column_step))
    strided.copy_(rows)
    return strided


def layouts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows, at_the_end(rows, 3, 1), at_the_end(rows, 0, 2), rows.mT.contiguous().mT


def bounds(hidden: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """Those of the file of ``score``, but that p = g / u may be off by what g and u may be.

    There each is held against torch in the same dtype. Of one feature torch rounds g and u alike, so that their ratio
    is nearly exact, by chance; the kernel has g in float32 where that is cheap, and so it is not.
    """
    expected, allowed = scores.bounds(hidden, weights)
    g, u = allowed[0], allowed[2]
    of_both = ((g + expected[3].abs() * u) / expected[2]).amax()
    return expected, torch.stack([*allowed[:3], torch.maximum(allowed[3], of_both)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_score(dtype):
    for h, d in SIZES:
        weights, hidden = scores.make_head(h, d, dtype), scores.draw(max(ROWS), h)
        whole = scores.run(hidden, weights)
        scores.check(whole, hidden, weights, bounds(hidden, weights), (h, d))
        for rows in ROWS:
            for strided in layouts(hidden[:rows]):
                assert torch.equal(scores.run(strided, weights), whole[:, :rows]), (h, d, rows)


def test_score_of_every_kind_of_features_and_rows():
    for kind, dtype in itertools.product(scores.KINDS.values(), FLOATS):
        for h, d in ((1, 1), (65, 63)):
            for of in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                hidden = scores.draw(7, h, of)
                weights = scores.make_head(h, d, dtype, **kind)
                whole = scores.run(hidden, weights)
                scores.check(whole, hidden, weights, bounds(hidden, weights), (h, d, of))
                for strided in layouts(hidden):
                    assert torch.equal(scores.run(strided, weights), whole)


def test_score_of_int8_heads():
    for h, d in SIZES:
        weights, hidden = int8_checks.make_head(h, d), int8_checks.spread(int8_checks.draw(max(ROWS), h))
        if h > 12:  # of fewer columns none is far beyond the mean
            hidden[1:, h // 2] = 1e4  # an outlier in every row but one
        whole = scores.run(hidden, weights)
        int8_checks.check(whole, hidden, weights)
        for rows in ROWS:
            for strided in layouts(hidden[:rows]):
                assert torch.equal(scores.run(strided, weights), whole[:, :rows]), (h, d, rows)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate(dtype):
    for h, d in SIZES:
        for rows, paired in itertools.product((1, 65), (False, True)):
            weights, labels = sums.make_head(h, d, dtype), torch.rand(rows)
            hidden, beta = sums.draw(rows, h), sums.draw(d, seed=2) / math.sqrt(d)
            pairs = torch.randint(0, rows, (rows, 2)) if paired else None
            weight = torch.rand(rows)
            for double in (False, True):
                first, *others = (
                    sums.accumulate(weights, strided, labels, beta, pairs=pairs, sample_weight=weight, double=double)
                    for strided in layouts(hidden)
                )
                truth = sums.accumulated_truth(
                    weights.map(hidden.double()), weights, labels, beta, pairs, weight, "logistic"
                )
                assert float((first[0] - truth[0]).abs().max()) <= 0.1 * weights.map.feature_scale**2 * math.sqrt(rows)
                for other in others:
                    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_pair_variance(dtype):
    sizes = torch.tensor([0, 1, 2, 3, 7, 0, 13])
    for h, d in SIZES:
        make = int8_checks.make_head if dtype == torch.int8 else lambda h, d: sums.make_head(h, d, dtype)
        weights, hidden = make(h, d), sums.draw(int(sizes.sum()), h)
        g, v = cpu.pair_variance(hidden, sizes, weights)
        expected = plain.pair_variance(hidden.double(), sizes, weights)
        for got, true in zip((g, v), expected, strict=True):
            assert float((got - true).abs().max()) <= 0.1 * float(true.abs().max()) + 1e-3, (h, d)
        for strided in layouts(hidden):
            assert all(
                torch.equal(a, b) for a, b in zip(cpu.pair_variance(strided, sizes, weights), (g, v), strict=True)
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_power_iteration(dtype):
    for m, n in itertools.product((1, 15, 65), (1, 17, 63, 65)):
        weight, vector = sums.draw(m, n).to(dtype), sums.draw(n, seed=1)
        sigma, v = cpu.power_iteration(weight, vector, 2)
        expected, direction = reference.power_iteration(weight.double(), vector.double(), 2)
        assert float((sigma - expected).abs()) <= 1e-5 * float(expected), (m, n)
        assert float((v - direction).abs().max()) <= 1e-5, (m, n)
        for strided in layouts(weight):
            again = cpu.power_iteration(strided, vector, 2)
            assert torch.equal(sigma, again[0])
            assert torch.equal(v, again[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_score_attributes(dtype):
    kinds = (
        {"attributes": 1},
        {"attributes": 3, "members": 2, "widths": (1,)},
        {"attributes": 19, "widths": (65, 63), "softmax": True},
        {"attributes": 2, "per": 3, "widths": (64,)},
    )
    for h, kind, rows in itertools.product((1, 63, 65), kinds, (0, 1, 7, 13)):
        # Numbers that the dtype has: torch's own error, against which this is held, is a measure of what rounding costs
        # only where many numbers are rounded, not where there is one column, or one activation.
        heads, hidden = make_heads(h, dtype, **kind), sums.draw(rows, h).to(dtype).float()
        got = check_scores(cpu, hidden, heads)
        for strided in layouts(hidden):
            for a, b in zip(cpu.score_attributes(strided, heads, None), got, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


SHORT = """
import torch
from support import cpu_build
from rmcore.ops.backends import cpu_packing
import test_cpu_score as scores

class Short:
    def __init__(self, nbytes):
        self.nbytes, self.memory = nbytes, torch.empty(nbytes // 2, dtype=torch.uint8)
        self.data_ptr, self.numel = self.memory.data_ptr, lambda: nbytes

weights = scores.make_head(65, 63, torch.float32)
cpu_packing.large = Short
scores.run(scores.draw(7, 65), weights)
"""


@pytest.mark.skipif("RMCORE_SANITISED" not in os.environ, reason="a build with sanitizers: make sanitize")
def test_a_byte_out_of_bounds_ends_the_process():
    """So that all the others, which pass, say something."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", SHORT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
