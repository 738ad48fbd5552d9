r"""Rows → whole numbers: what int8 heads take of hidden rows (rmcore.ops.quantize; the same as csrc/cpu/activations.h).

    x' = (x − shift) · balance s      f = max |x'| / 127      whole = round(x' / f)      low = round(254 (x'/f − whole))

====  ====================================================================================================
in    x (B, h) any float dtype and strides; shift, balance (h,) float32 or none; s a power of two
out   whole (B, h') int8, h' = h rounded up to 64 or more, zero beyond h; low (B, h') int8 where rows take two terms;
      factor f (B,) float32, NaN where a value of the row is not finite; outliers: count (B,), columns, values (B, 32)
bytes 2 B h read, B h' written (2 B h' in two terms); FLOP about 30 B h. At B = 4096, h = 4096: 50 MB, 16 µs
====  ====================================================================================================

Outliers of a row are left out of its whole numbers, and join the product in float32 (csrc/cpu/outliers.h): while the
largest magnitude is beyond twelve times the mean one, all from a quarter of it on are taken, 32 in all at most.

A program holds a whole row in registers. Multiplications are not fused with the additions that follow, and divisions
are rounded correctly: a row's whole numbers are those of the CPU, bit for bit (but where its float32 sum of magnitudes,
whose order differs, decides otherwise what is far).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import after_the_last, empty, launch, power_of_two

MAX_COLUMNS = 16384
"""Columns of a row that a program can hold."""
MOST_OUTLIERS = 32
_FAR = tl.constexpr(12.0)
_NEARBY = tl.constexpr(0.25)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and taking it away rounds |x| < 2^22 to an integer, half to even
_PANEL = 64
"""The CPU's mean magnitude of a row counts its zeros up to the next whole panel."""


class WholeRows(NamedTuple):
    """Rows as whole numbers.

    Attributes:
        whole: (B, h') int8.
        low: (B, h') int8 in units of a 254th of ``whole``'s, or None.
        factor: (B,) float32.
        counts: (B,) int32 outliers of each row, of which ``columns`` (B, 32) int32 and ``values`` (B, 32) float32 hold
            the first ``counts``.
        columns: see ``counts``.
        values: see ``counts``.
    """

    whole: Tensor
    low: Tensor | None
    factor: Tensor
    counts: Tensor
    columns: Tensor
    values: Tensor


@triton.jit
def nearest(x):
    """The nearest whole number, half to even, of |x| < 2^22; 0 for a NaN."""
    return tl.where(tl.abs(x) < 4194304.0, (x + _ROUND) - _ROUND, 0.0)


@triton.jit(do_not_specialize=["size"])
def rows_kernel(
    x, row_stride, col_stride, shift, balance, whole, low, factors, counts, columns, values, size, padded, span, scale,
    BN: tl.constexpr, KEEP: tl.constexpr, BALANCED: tl.constexpr, LOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. ``span``: by how many columns its sum of magnitudes is divided for their mean."""
    after_the_last(PDL)
    row = tl.program_id(0).to(tl.int64)
    rn = tl.arange(0, BN)
    inside = rn < size
    value = tl.load(x + row * row_stride + rn.to(tl.int64) * col_stride, mask=inside, other=0.0).to(tl.float32)
    if BALANCED:
        value -= tl.load(shift + rn, mask=inside, other=0.0)
        value *= tl.load(balance + rn, mask=inside, other=0.0) * scale
    else:
        value *= scale
    size_of = tl.abs(value)
    edge = tl.max(size_of, axis=0)
    total = tl.sum(size_of, axis=0)
    spoilt = tl.sum(value - value, axis=0)
    limit = edge  # nothing is beyond it
    count = tl.full((), 0, dtype=tl.int32)
    far = edge * span > _FAR * total  # not where there is a NaN or Inf
    while far:
        nearby = edge * _NEARBY
        found = tl.sum((size_of > nearby).to(tl.int32), axis=0)
        fits = found <= KEEP
        rest = tl.where(size_of > nearby, 0.0, size_of)
        edge = tl.where(fits, tl.max(rest, axis=0), edge)
        total = tl.where(fits, tl.sum(rest, axis=0), total)
        limit = tl.where(fits, nearby, limit)
        count = tl.where(fits, found, count)
        far = fits & (edge * span > _FAR * total)
    factor = tl.where(edge > 1e-30, tl.div_rn(127.0, tl.maximum(edge, 1e-30)), 0.0)
    scaled = tl.where(size_of > limit, 0.0, value) * factor
    near = nearest(scaled)
    stored = row * padded + rn
    tl.store(whole + stored, near.to(tl.int8), mask=rn < padded)
    if LOW:
        tl.store(low + stored, nearest((scaled - near) * 254.0).to(tl.int8), mask=rn < padded)
    tl.store(factors + row, tl.div_rn(edge, 127.0) + spoilt)
    tl.store(counts + row, count)
    taken = size_of > limit
    column = -1
    for k in range(count):  # one after another: they are few, and a prefix sum of the row would not fit the registers
        column = tl.min(tl.where(taken & (rn > column), rn, BN), axis=0)
        tl.store(columns + row * KEEP + k, column)
        tl.store(values + row * KEEP + k, tl.sum(tl.where(rn == column, value, 0.0), axis=0))


def whole_rows(
    x: Tensor, padded: int, *, scale: float, shift: Tensor | None, balance: Tensor | None, two_terms: bool
) -> WholeRows:
    """Rows x (B ≥ 1, h ≤ 16384) as whole numbers in ``padded`` ≥ h columns."""
    rows, size = x.shape
    if x.dtype == torch.float64:
        x = x.float()
    whole = empty(rows, padded, dtype=torch.int8, device=x.device)
    low = empty(rows, padded, dtype=torch.int8, device=x.device) if two_terms else None
    factor = empty(rows, dtype=torch.float32, device=x.device)
    count = empty(rows, dtype=torch.int32, device=x.device)
    columns = empty(rows, MOST_OUTLIERS, dtype=torch.int32, device=x.device)
    values = empty(rows, MOST_OUTLIERS, dtype=torch.float32, device=x.device)
    width = max(power_of_two(padded), 128)
    launch(
        rows_kernel, (rows,),
        x, x.stride(0), x.stride(1), factor if shift is None else shift, factor if balance is None else balance,
        whole, whole if low is None else low, factor, count, columns, values,
        size, padded, float(-(-size // _PANEL) * _PANEL), scale,
        BN=width, KEEP=MOST_OUTLIERS, BALANCED=shift is not None, LOW=two_terms,
        warps=min(16, max(4, width // 512)), stages=1, enable_fp_fusion=False,  # 32 spill on sm_120
    )  # fmt: skip
    return WholeRows(whole, low, factor, count, columns, values)
