r"""Difference mode: g_ij = βᵀ(φ_i − φ_j) and v_ij = ‖U(φ_i − φ_j)‖² for all pairs of every group (design 2.6).

    ĉ_i = round(c_i − c_first of its group)        y_i = U ĉ_i        v_ij = factor_scale · Σ_d (y_id − y_jd)²

====  ====================================================================================================
in    c (R, D') float32, first (R,) int64; then y (R, 128 n) float32 and (i, j) (Q,) int64
out   g, v (Q,) float32; exactly 0 for equal rows
bytes 8 R D' to centre, 4 R D' to read y once (its rows come from the cache after that); FLOP 3 Q D. The triangular
      product between them costs R D (D + 128): R rows, not Q pairs
====  ====================================================================================================

Differences from the group's first row are formed in float32, so rounding sees only the group's own spread; what two
rows share beyond it cancels in float32 again, term by term.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch, power_of_two

_CENTRE_ROWS, _CENTRE_COLS = 16, 256
_PAIR_ROWS, _PAIR_COLS, _PAIR_PARTS = 16, 256, 64


@triton.jit(do_not_specialize=["rows"])
def centre_kernel(
    c, first, beta, out, logits, rows, size, padded,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ĉ = round(c_i − c_first), and the shares of βᵀ(c_i − c_first), not rounded, as logits (column blocks, rows)."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    base = tl.load(first + rm, mask=rm < rows, other=0)
    mask = (rm < rows)[:, None] & (rn < padded)[None, :]
    offsets = rm[:, None].to(tl.int64) * padded + rn[None, :]
    delta = tl.load(c + offsets, mask=mask, other=0.0)
    delta -= tl.load(c + base[:, None] * padded + rn[None, :], mask=mask, other=0.0)
    tl.store(out + offsets, delta.to(out.dtype.element_ty), mask=mask)
    dot = tl.sum(delta * tl.load(beta + rn, mask=rn < size, other=0.0)[None, :], axis=1)
    tl.store(logits + tl.program_id(1).to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit(do_not_specialize=["count", "rows", "parts"])
def pair_kernel(
    y, logits, left, right, g, v, count, rows, parts, width, factor_scale,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BM pairs: the squared distance of two rows of y, and the difference of their logits."""
    rq = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rq < count
    i = tl.load(left + rq, mask=inside, other=0)
    j = tl.load(right + rq, mask=inside, other=0)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BN):
        rn = start + tl.arange(0, BN)
        mask = inside[:, None] & (rn < width)[None, :]
        delta = tl.load(y + i[:, None] * width + rn[None, :], mask=mask, other=0.0)
        delta -= tl.load(y + j[:, None] * width + rn[None, :], mask=mask, other=0.0)
        total += delta * delta
    tl.store(v + rq, tl.sum(total, axis=1) * factor_scale, mask=inside)
    rp = tl.arange(0, BP)
    gi = tl.zeros((BM,), dtype=tl.float32)
    gj = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, parts, BP):
        mask = (start + rp < parts)[:, None] & inside[None, :]
        place = logits + (start + rp)[:, None].to(tl.int64) * rows
        gi += tl.sum(tl.load(place + i[None, :], mask=mask, other=0.0), axis=0)
        gj += tl.sum(tl.load(place + j[None, :], mask=mask, other=0.0), axis=0)
    tl.store(g + rq, gi - gj, mask=inside)


def centre(c: Tensor, first: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """c (R ≥ 1, D') float32, first (R,) → ĉ (R, D') in ``dtype`` and logits (parts, R)."""
    rows, padded = c.shape
    blocks = cdiv(padded, _CENTRE_COLS)
    out = torch.empty(rows, padded, dtype=dtype, device=c.device)
    logits = torch.empty(blocks, rows, dtype=torch.float32, device=c.device)
    launch(
        centre_kernel, (cdiv(rows, _CENTRE_ROWS), blocks),
        c, first, beta, out, logits, rows, beta.shape[0], padded,
        BM=_CENTRE_ROWS, BN=_CENTRE_COLS, warps=4, stages=1,
    )  # fmt: skip
    return out, logits


def pairs(y: Tensor, logits: Tensor, left: Tensor, right: Tensor, g: Tensor, v: Tensor, factor_scale: float) -> None:
    """Fill g, v (Q ≥ 1,) from y (R, 128 n), logits (parts, R) and the pairs' row numbers."""
    count, parts = left.shape[0], logits.shape[0]
    launch(
        pair_kernel, (cdiv(count, _PAIR_ROWS),),
        y, logits, left, right, g, v, count, y.shape[0], parts, y.shape[1], factor_scale,
        BM=_PAIR_ROWS, BN=_PAIR_COLS, BP=min(_PAIR_PARTS, power_of_two(parts)), warps=4, stages=1,
    )  # fmt: skip
