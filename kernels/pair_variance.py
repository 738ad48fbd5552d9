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

Two kernels for the last step (``heuristics.FORMS``): 16 pairs a program, or all pairs of a group. For 64 groups of 8 at
D = 4096 the one asks the L2 for 58 MB of y, the other for 8; on an H100 both took 97 to 99 µs in all. A third way takes
the distances in the product itself (pair_tail.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch, power_of_two, triangle_row

_CENTRE_ROWS, _CENTRE_COLS = 16, 256
_PAIR_ROWS, _PAIR_COLS, _PAIR_PARTS = 16, 256, 64
_GROUP_ROWS, _GROUP_SUMS = 16, 16384
"""Rows of a group that one program takes at most; float32 sums that it holds, 64 registers a thread."""


class Rows(NamedTuple):
    """Which rows are subtracted: groups of ``k`` rows each, or (k = 0) as listed.

    Attributes:
        k: rows of every group, or 0.
        first: (R,) the first row of each row's group.
        left: (Q,) the one row of each pair.
        right: (Q,) the other.
    """

    k: int
    first: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


@triton.jit(do_not_specialize=["rows", "k"])
def centre_kernel(
    c, first, beta, out, logits, rows, size, padded, k,
    BM: tl.constexpr, BN: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """ĉ = round(c_i − c_first), and the shares of βᵀ(c_i − c_first), not rounded, as logits (column blocks, rows).

    EQUAL: all groups have k rows, and ``first`` is not read.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    base = (rm - rm % k).to(tl.int64) if EQUAL else tl.load(first + rm, mask=rm < rows, other=0)
    mask = (rm < rows)[:, None] & (rn < padded)[None, :]
    offsets = rm[:, None].to(tl.int64) * padded + rn[None, :]
    delta = tl.load(c + offsets, mask=mask, other=0.0)
    delta -= tl.load(c + base[:, None] * padded + rn[None, :], mask=mask, other=0.0)
    tl.store(out + offsets, delta.to(out.dtype.element_ty), mask=mask)
    dot = tl.sum(delta * tl.load(beta + rn, mask=rn < size, other=0.0)[None, :], axis=1)
    tl.store(logits + tl.program_id(1).to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit
def _pair_of(q, k):
    """The rows i < j of pair q where every group has k ≥ 2 rows: a lower triangle, counted from its end."""
    each = k * (k - 1) // 2
    left = each - 1 - q % each
    a = triangle_row(left)
    start = (q // each).to(tl.int64) * k
    return start + (k - 2 - a), start + (k - 1 - (left - a * (a + 1) // 2))


@triton.jit(do_not_specialize=["count", "rows", "parts", "k"])
def pair_kernel(
    y, logits, left, right, g, v, count, rows, parts, width, factor_scale, k,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """BM pairs: the squared distance of two rows of y, and the difference of their logits. EQUAL as above."""
    rq = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rq < count
    if EQUAL:
        i, j = _pair_of(tl.minimum(rq, count - 1), k)
    else:
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


@triton.jit(do_not_specialize=["rows", "parts", "k"])
def group_kernel(
    y, logits, g, v, k, rows, parts, width, factor_scale,
    KP: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """All pairs i < j of one group of k ≤ KP rows: y is read once, both sides of a difference from the same lines."""
    group = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, KP)
    i, j = row[:, None, None], row[None, :, None]
    source = y + group * k * width
    total = tl.zeros((KP, KP, BN), dtype=tl.float32)
    for start in range(0, width, BN):
        rn = start + tl.arange(0, BN)[None, None, :]
        left = tl.load(source + i * width + rn, mask=(i < k) & (rn < width), other=0.0)
        right = tl.load(source + j * width + rn, mask=(j < k) & (rn < width), other=0.0)
        delta = left - right
        total += delta * delta
    first, second = row[:, None], row[None, :]
    place = group * (k * (k - 1) // 2) + first * k - first * (first + 1) // 2 + second - first - 1
    mask = (first < second) & (second < k)
    tl.store(v + place, tl.sum(total, axis=2) * factor_scale, mask=mask)
    rp = tl.arange(0, BP)
    sums = tl.zeros((KP,), dtype=tl.float32)
    for start in range(0, parts, BP):
        inside = (start + rp < parts)[:, None] & (row < k)[None, :]
        at = logits + (start + rp)[:, None].to(tl.int64) * rows + (group * k + row)[None, :]
        sums += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    tl.store(g + place, sums[:, None] - sums[None, :], mask=mask)


def centre(c: Tensor, which: Rows, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """c (R ≥ 1, D') float32 → ĉ (R, D') in ``dtype`` and logits (parts, R)."""
    rows, padded = c.shape
    blocks = cdiv(padded, _CENTRE_COLS)
    out = torch.empty(rows, padded, dtype=dtype, device=c.device)
    logits = torch.empty(blocks, rows, dtype=torch.float32, device=c.device)
    launch(
        centre_kernel, (cdiv(rows, _CENTRE_ROWS), blocks),
        c, c if which.first is None else which.first, beta, out, logits, rows, beta.shape[0], padded, which.k,
        BM=_CENTRE_ROWS, BN=_CENTRE_COLS, EQUAL=which.k > 0, warps=4, stages=1,
    )  # fmt: skip
    return out, logits


def pairs(y: Tensor, logits: Tensor, which: Rows, g: Tensor, v: Tensor, factor_scale: float) -> None:
    """Fill g, v (Q ≥ 1,) from y (R, 128 n), logits (parts, R) and the pairs' row numbers."""
    count, parts = g.shape[0], logits.shape[0]
    left, right = y if which.left is None else which.left, y if which.right is None else which.right
    launch(
        pair_kernel, (cdiv(count, _PAIR_ROWS),),
        y, logits, left, right, g, v, count, y.shape[0], parts, y.shape[1], factor_scale, which.k,
        BM=_PAIR_ROWS, BN=_PAIR_COLS, BP=min(_PAIR_PARTS, power_of_two(parts)), EQUAL=which.k > 0, warps=4, stages=1,
    )  # fmt: skip


def by_groups(sizes: list[int]) -> bool:
    """Whether :func:`groups` can do these: all of one size, no larger than a program takes."""
    return len(set(sizes)) == 1 and 2 <= sizes[0] <= _GROUP_ROWS


def groups(y: Tensor, logits: Tensor, k: int, g: Tensor, v: Tensor, factor_scale: float) -> None:
    """The same as :func:`pairs` for whole groups of k rows each, a program a group."""
    rows, parts, height = y.shape[0], logits.shape[0], power_of_two(k)
    launch(
        group_kernel, (rows // k,),
        y, logits, g, v, k, rows, parts, y.shape[1], factor_scale,
        KP=height, BN=min(1024, _GROUP_SUMS // (height * height)), BP=min(_PAIR_PARTS, power_of_two(parts)),
        warps=8, stages=1,
    )  # fmt: skip
