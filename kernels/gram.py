r"""Accumulate: P += ΦᵀWΦ, Φᵀ(y − p) and Σ log-likelihood of a chunk of rows (design 2.4).

    g = βᵀφ + β₀    p = σ(g)    w = p(1−p) or 1, times the sample weight    φ̂ = round(√w c)    P_ij += κ² Σ_n φ̂_ni φ̂_nj

====  ====================================================================================================
in    c (N, D') serving dtype (float32 rows and index pairs in difference mode), logits (parts, N), labels (N,)
out   P (D, D) float32 or float64, lower triangle in place; slope (blocks, D) and likelihood (blocks,) in parts
bytes N D of c written and read once more by ``weigh``, P read and written once a chunk; FLOP N D (D + 128).
      65,536 rows at D = 4096: 1.1 PFLOP: 1.4 ms at 790 TFLOP/s, beside 2.8 ms of features
====  ====================================================================================================

Tensor cores cut their float32 sums off and do not round: over a chunk of 16,384 rows the diagonal comes out 8e-5 of
itself too small (an H100; derived in tests/kernels/triton_checks.py), and no chunk is longer. Shorter sums would cost
a pass over P each.

Both operands of the product are the same rounded Φ̂, so the sum stays positive semi-definite whatever was lost in
rounding. Lower tiles only; few of them are cut along the rows too, and so may be those beyond the last whole wave of
programs (272 tiles on 132 multiprocessors: 264 whole, 8 in 16 pieces each). Tiles go to P through a float32 workspace
of half its entries: adding to a float64 P straight from the accumulators does not fit the registers. Differences are
formed in float32 and rounded once, together with √w.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import cdiv, launch, power_of_two, triangle_row
from .heuristics import Device

_WEIGH_PARTS = 32
_ADD_ROWS = 16


class Slope(NamedTuple):
    """Φ̂ (N, D'), and Φᵀ(y − p) and the log-likelihood as sums over blocks of rows: (blocks, D'), (blocks,)."""

    weighted: Tensor
    gradient: Tensor
    likelihood: Tensor


@triton.jit
def _sum_parts(logits, rm, inside, parts, stride, BP: tl.constexpr, BM: tl.constexpr):
    """Σ over parts of logits[part, rm], in order."""
    rp = tl.arange(0, BP)
    g = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, parts, BP):
        mask = (start + rp < parts)[:, None] & inside[None, :]
        place = logits + (start + rp)[:, None].to(tl.int64) * stride + rm[None, :]
        g += tl.sum(tl.load(place, mask=mask, other=0.0), axis=0)
    return g


@triton.jit(do_not_specialize=["rows", "parts", "logit_stride"])
def weigh_kernel(
    c, logits, pairs, labels, weights, out, gradient, likelihood,
    rows, parts, logit_stride, padded, feature_scale, beta0,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, LOGISTIC: tl.constexpr,
):  # fmt: skip
    """One block of rows × columns: w and p of the rows (done again by every block of columns), then Φ̂ and the slope."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rm < rows
    mask = inside[:, None] & (rn < padded)[None, :]
    if PAIRS:
        first = tl.load(pairs + 2 * rm.to(tl.int64), mask=inside, other=0)
        second = tl.load(pairs + 2 * rm.to(tl.int64) + 1, mask=inside, other=0)
        g = _sum_parts(logits, first, inside, parts, logit_stride, BP, BM)
        g -= _sum_parts(logits, second, inside, parts, logit_stride, BP, BM)
        phi = tl.load(c + first[:, None] * padded + rn[None, :], mask=mask, other=0.0)
        phi -= tl.load(c + second[:, None] * padded + rn[None, :], mask=mask, other=0.0)
    else:
        g = _sum_parts(logits, rm, inside, parts, logit_stride, BP, BM)
        phi = tl.load(c + rm[:, None].to(tl.int64) * padded + rn[None, :], mask=mask, other=0.0).to(tl.float32)
    g = g * feature_scale + beta0
    label = tl.load(labels + rm, mask=inside, other=0.0)
    weight = tl.load(weights + rm, mask=inside, other=0.0) if WEIGHTED else tl.where(inside, 1.0, 0.0)
    e = tl.exp(-tl.abs(g))
    p = tl.where(g < 0, e, 1.0) / (1.0 + e)
    curvature = weight
    if LOGISTIC:
        curvature = weight * (e / ((1.0 + e) * (1.0 + e)))
    stored = out + rm[:, None].to(tl.int64) * padded + rn[None, :]
    tl.store(stored, (tl.sqrt(curvature)[:, None] * phi).to(out.dtype.element_ty), mask=mask)
    slope = tl.sum((weight * (label - p))[:, None] * phi, axis=0)
    tl.store(gradient + tl.program_id(0).to(tl.int64) * padded + rn, slope, mask=rn < padded)
    if tl.program_id(1) == 0:
        # log σ(g) = min(g, 0) − log(1 + e^−|g|), and log σ(−g) = log σ(g) − g
        log_sigmoid = tl.minimum(g, 0.0) - tl.log(1.0 + e)
        each = weight * (log_sigmoid - (1.0 - label) * g)
        tl.store(likelihood + tl.program_id(0), tl.sum(tl.where(inside, each, 0.0), axis=0))


@triton.jit
def _tile_origin(task, SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of the task-th lower tile, BN = SHARE · BM.

    SHARE rows of tiles have one length: block row a holds SHARE · (a + 1) tiles, counted down its columns.
    """
    a = triangle_row(task // SHARE)
    local = task - a * (a + 1) // 2 * SHARE
    return (a * SHARE + local % SHARE) * BM, (local // SHARE) * BN


@triton.jit(do_not_specialize=["rows", "whole", "cut", "stop_every"])
def gram_kernel(
    phi, pieces, rows, padded, whole, cut, stop_every,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One lower BM×BN tile of Φ̂ᵀΦ̂ → pieces[program] (BM, BN).

    The first ``whole`` tiles have a program each, the others ``cut``, each for ``stop_every`` steps of BK rows.
    """
    program = tl.program_id(0)
    steps = tl.cdiv(rows, BK)
    late = tl.maximum(program - whole, 0)
    task = tl.minimum(program, whole) + late // cut
    start = (late % cut) * stop_every
    stop = tl.where(program < whole, steps, tl.minimum(start + stop_every, steps))
    row, column = _tile_origin(task, SHARE, BM, BN)
    rk = tl.arange(0, BK)
    left = phi + rk[:, None].to(tl.int64) * padded + (row + tl.arange(0, BM))[None, :]
    right = phi + rk[:, None].to(tl.int64) * padded + (column + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(start, stop):
        offset = tl.cast(step, tl.int64) * (padded * BK)
        if EVEN:
            x = tl.load(left + offset)
            y = tl.load(right + offset)
        else:
            x = tl.load(left + offset, mask=rk[:, None] < rows - step * BK, other=0.0)
            y = tl.load(right + offset, mask=rk[:, None] < rows - step * BK, other=0.0)
        acc = tl.dot(tl.trans(x), y, acc, input_precision="ieee")
    base = pieces + program.to(tl.int64) * (BM * BN)
    tl.store(base + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit(do_not_specialize=["whole", "cut"])
def add_kernel(
    pieces, precision, size, row_stride, whole, cut, scale,
    BM: tl.constexpr, BN: tl.constexpr, SHARE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """STRIP rows of a tile: its pieces added in order, P += scale · sum on and below the diagonal."""
    task = tl.program_id(0)
    row, column = _tile_origin(task, SHARE, BM, BN)
    rs = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    rn = tl.arange(0, BN)
    local = rs[:, None] * BN + rn[None, :]
    first = tl.minimum(task, whole) + tl.maximum(task - whole, 0) * cut
    acc = tl.zeros((STRIP, BN), dtype=tl.float32)
    for piece in range(tl.where(task < whole, 1, cut)):
        acc += tl.load(pieces + (first + piece).to(tl.int64) * (BM * BN) + local)
    place = precision + (row + rs)[:, None].to(tl.int64) * row_stride + (column + rn)[None, :]
    mask = (row + rs < size)[:, None] & ((column + rn)[None, :] <= (row + rs)[:, None])
    tl.store(place, tl.load(place, mask=mask, other=0.0) + (acc * scale).to(precision.dtype.element_ty), mask=mask)


def weigh(
    c: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype,
    feature_scale: float,
    beta0: float,
    logistic: bool,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Slope:
    """Rows (or pairs of float32 rows) of c, N ≥ 1, labels float32 → :class:`Slope`; without pairs, Φ̂ may replace c."""
    rows, padded = labels.shape[0], c.shape[1]
    block = heuristics.WEIGH
    blocks = cdiv(rows, block.rows)
    reuse = pairs is None and c.dtype == dtype
    out = c if reuse else torch.empty(rows, padded, dtype=dtype, device=c.device)
    gradient = torch.empty(blocks, padded, dtype=torch.float32, device=c.device)
    likelihood = torch.empty(blocks, dtype=torch.float32, device=c.device)
    parts = logits.shape[0]
    launch(
        weigh_kernel, (blocks, cdiv(padded, block.cols)),
        c, logits, labels if pairs is None else pairs, labels, labels if sample_weight is None else sample_weight,
        out, gradient, likelihood, rows, parts, logits.stride(0), padded, feature_scale, beta0,
        BM=block.rows, BN=block.cols, BP=min(_WEIGH_PARTS, power_of_two(parts)),
        PAIRS=pairs is not None, WEIGHTED=sample_weight is not None, LOGISTIC=logistic,
        warps=block.warps, stages=block.stages,
    )  # fmt: skip
    return Slope(out, gradient, likelihood)


def gram(phi: Tensor, precision: Tensor, device: Device, *, scale: float) -> None:
    """precision (D, D), lower triangle, += scale · phiᵀ phi; phi (N ≥ 1, D')."""
    rows, padded = phi.shape
    size = precision.shape[0]
    tile = heuristics.gram(device, phi.element_size(), size)
    share, blocks = tile.cols // tile.rows, cdiv(size, tile.cols)
    tiles = share * blocks * (blocks + 1) // 2
    steps = cdiv(rows, tile.depth)
    whole, cut = heuristics.cuts(tile, device, tiles, steps)
    programs = whole + (tiles - whole) * cut
    pieces = torch.empty(programs, tile.rows, tile.cols, dtype=torch.float32, device=phi.device)
    shape = {"BM": tile.rows, "BN": tile.cols, "SHARE": share}
    launch(
        gram_kernel, (programs,),
        phi, pieces, rows, padded, whole, cut, cdiv(steps, cut),
        BK=tile.depth, EVEN=rows % tile.depth == 0, **shape, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    launch(
        add_kernel, (tiles, tile.rows // _ADD_ROWS),
        pieces, precision, size, precision.stride(0), whole, cut, scale,
        STRIP=_ADD_ROWS, **shape, warps=4, stages=1,
    )  # fmt: skip
