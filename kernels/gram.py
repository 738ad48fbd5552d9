r"""Accumulate: P += ΦᵀWΦ, Φᵀ(y − p) and Σ log-likelihood of a chunk of rows (design 2.4).

    g = βᵀφ + β₀    p = σ(g)    w = p(1−p) or 1, times the sample weight    φ̂ = round(√w c)    P_ij += κ² Σ_n φ̂_ni φ̂_nj

====  ====================================================================================================
in    c (N, D') serving dtype (float32 rows and index pairs in difference mode), logits (parts, N), labels (N,)
out   P (D, D) float32 or float64, lower triangle in place; slope (blocks, D) and likelihood (blocks,) in parts
bytes N D of c written and read once more by ``weigh``, P read and written once a chunk; FLOP N D (D + 128).
      65,536 rows at D = 4096: 1.1 PFLOP: 1.4 ms at 790 TFLOP/s, beside 2.8 ms of features
====  ====================================================================================================

Both operands of the product are the same rounded Φ̂, so the sum stays positive semi-definite whatever was lost in
rounding. Lower tiles only. Differences are formed in float32 and rounded once, together with √w.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.kernels import heuristics
from rmcore.kernels.common import cdiv, halves, launch, power_of_two, triangle_row
from rmcore.kernels.heuristics import Device

_WEIGH_PARTS = 64


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
    if WEIGHTED:
        weight = tl.load(weights + rm, mask=inside, other=0.0)
    else:
        weight = tl.where(inside, 1.0, 0.0)
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
def _add_part(acc, precision, rm, rn, size, row_stride, scale):
    """P += scale · acc at rows rm and columns rn, on and below the diagonal."""
    place = precision + rm[:, None].to(tl.int64) * row_stride + rn[None, :]
    mask = (rm < size)[:, None] & (rn[None, :] <= rm[:, None])
    tl.store(place, tl.load(place, mask=mask, other=0.0) + (acc * scale).to(precision.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gram_kernel(
    phi, precision, rows, size, padded, row_stride, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One lower BM×BN tile of P += scale · Φ̂ᵀΦ̂, BN a multiple of BM.

    BN/BM rows of tiles share a length: block row a has BN/BM · (a + 1) tiles, counted down its columns.
    """
    share: tl.constexpr = BN // BM
    task = tl.program_id(0)
    a = triangle_row(task // share)
    local = task - a * (a + 1) // 2 * share
    rm = (a * share + local % share) * BM + tl.arange(0, BM)
    rn = (local // share) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    left = phi + rk[:, None].to(tl.int64) * padded + rm[None, :]
    right = phi + rk[:, None].to(tl.int64) * padded + rn[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(rows, BK)):
        k = step * BK
        offset = tl.cast(k, tl.int64) * padded
        if EVEN:
            x = tl.load(left + offset)
            y = tl.load(right + offset)
        else:
            x = tl.load(left + offset, mask=rk[:, None] < rows - k, other=0.0)
            y = tl.load(right + offset, mask=rk[:, None] < rows - k, other=0.0)
        acc = tl.dot(tl.trans(x), y, acc, input_precision="ieee")
    if BN > 128:
        near, far = halves(acc, BM, BN)
        _add_part(near, precision, rm, (local // share) * BN + tl.arange(0, BN // 2), size, row_stride, scale)
        _add_part(far, precision, rm, (local // share) * BN + BN // 2 + tl.arange(0, BN // 2), size, row_stride, scale)
    else:
        _add_part(acc, precision, rm, rn, size, row_stride, scale)


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
    blocks = cdiv(size, tile.cols)
    launch(
        gram_kernel, (tile.cols // tile.rows * blocks * (blocks + 1) // 2,),
        phi, precision, rows, size, padded, precision.stride(0), scale,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, EVEN=rows % tile.depth == 0, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
