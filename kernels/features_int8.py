r"""Features of an int8 head: whole numbers times whole numbers, summed exactly; scales and cosine in the epilogue.

    t_d = w_d f Σ_k W_dk x'_k + outliers + phase_d        c = cos(2πt)        c' = round(127 c)        g = Σ_d β_d c_d

====  ====================================================================================================
in    x' (B, h') int8 with factors f (B,) and outliers (rows_int8.py), in one term or two; W (D, h') int8 with
      factors w (D,) float32; phase, β (D,) float32
out   c' (B, D') int8, D' = D rounded up to 256, zero beyond D; logits (parts, B) float32, of c before it is rounded
bytes B h' + D h' + B D, each operand once; FLOP 2 B h D, twice that with rows in two terms. At h = D = 4096: 17 MB at
      B = 1, 5.5 µs at 3.04 TB/s; 137 G at B = 4096, 87 µs at 1.58 P/s (twice the 16-bit rate measured on an H100)
====  ====================================================================================================

Rows and c are rounded as on the CPU, so every product has the CPU's whole numbers, and their int32 sums are the same in
any order: tiles and the pieces of cut reductions change nothing, nor does a row's batch change its c'. What may differ
from the CPU is a float32 rounding of t, and with it now and then a c' that lies on the edge between two whole numbers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics, heuristics_int8
from .common import after_the_last, cdiv, cos_turns, empty, grouped, halves, launch
from .features import PAD, Features
from .features import _aligned as aligned
from .heuristics import Device
from .rows_int8 import MAX_COLUMNS, MOST_OUTLIERS, WholeRows, nearest

_JOIN_ROWS, _JOIN_COLS = 16, 128
_KEEP = tl.constexpr(MOST_OUTLIERS)


@triton.jit
def _finish_part(
    acc, low, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn, rows, inner, outer, padded,
    BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Whole sums → c', stored; returns their share of βᵀc, of c before it is rounded."""
    rd = tl.minimum(rn, outer - 1)
    last = tl.minimum(rm, rows - 1)
    scale = tl.load(scales + rd)
    factor = tl.load(factors + last)
    value = acc.to(tl.float32) * scale[None, :] * factor[:, None]
    if LOW:
        value += low.to(tl.float32) * scale[None, :] * (factor * (1.0 / 254.0))[:, None]
    count = tl.load(counts + last)
    for k in range(tl.max(count, axis=0)):
        has = k < count
        column = tl.load(columns + last * _KEEP + k, mask=has, other=0)
        apart = tl.load(values + last * _KEEP + k, mask=has, other=0.0)
        place = weight + (rd[None, :] * inner + column[:, None])  # below 2^31, see ``refusal``
        value += apart[:, None] * (tl.load(place, mask=has[:, None], other=0).to(tl.float32) * scale[None, :])
    value = tl.where((rn < outer)[None, :], cos_turns(value + tl.load(phase + rd)[None, :]), 0.0)
    dot = tl.sum(value * tl.load(beta + rd)[None, :], axis=1)
    stored = out + rm[:, None].to(tl.int64) * padded + rn[None, :]
    tl.store(stored, nearest(value * 127.0).to(tl.int8), mask=(rm < rows)[:, None] & (rn < padded)[None, :])
    return dot


@triton.jit
def _finish_tile(
    acc, low, weight, scales, phase, beta, factors, counts, columns, values, out, logits, m, n, rows, inner, outer,
    padded, BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """A tile of whole sums → c', and their share of βᵀc as row n of ``logits``. A large one is done in quarters."""
    rm = m * BM + tl.arange(0, BM)
    if (BM * BN > 8192) | (LOW & (BM * BN > 4096)):
        PART: tl.constexpr = BN // 4
        rn = n * BN + tl.arange(0, PART)
        left, right = halves(acc, BM, BN)
        first, second = halves(left, BM, BN // 2)
        third, fourth = halves(right, BM, BN // 2)
        if LOW:
            left, right = halves(low, BM, BN)
            low_1, low_2 = halves(left, BM, BN // 2)
            low_3, low_4 = halves(right, BM, BN // 2)
        else:
            low_1, low_2, low_3, low_4 = first, second, third, fourth
        dot = _finish_part(
            first, low_1, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn,
            rows, inner, outer, padded, BM, PART, LOW,
        )  # fmt: skip
        dot += _finish_part(
            second, low_2, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn + PART,
            rows, inner, outer, padded, BM, PART, LOW,
        )  # fmt: skip
        dot += _finish_part(
            third, low_3, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn + 2 * PART,
            rows, inner, outer, padded, BM, PART, LOW,
        )  # fmt: skip
        dot += _finish_part(
            fourth, low_4, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn + 3 * PART,
            rows, inner, outer, padded, BM, PART, LOW,
        )  # fmt: skip
    else:
        rn = n * BN + tl.arange(0, BN)
        dot = _finish_part(
            acc, low, weight, scales, phase, beta, factors, counts, columns, values, out, rm, rn,
            rows, inner, outer, padded, BM, BN, LOW,
        )  # fmt: skip
    tl.store(logits + n.to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "stop_every"])
def project_int8_kernel(
    x, x_low, weight, scales, phase, beta, factors, counts, columns, values, out, logits, pieces,
    rows, inner, outer, padded, stop_every,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    LOW: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One BM×BN tile of x' Wᵀ over ``stop_every`` steps of BK, finished or stored as a piece. BK divides ``inner``."""
    after_the_last(PDL)
    m, n = grouped(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(padded, BN), GROUP)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    # Rows and columns beyond the edge repeat the last one: loads need no mask, and nothing of them is stored.
    first = tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * inner + rk[None, :]
    ws = weight + tl.minimum(rn, outer - 1).to(tl.int64)[None, :] * inner + rk[:, None]
    start = tl.program_id(1) * stop_every
    stop = tl.minimum(start + stop_every, inner // BK)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    low = tl.zeros((BM, BN) if LOW else (1, 1), dtype=tl.int32)
    for step in range(start, stop):
        k = step * BK
        b = tl.load(ws + k)
        acc = tl.dot(tl.load(x + first + k), b, acc, out_dtype=tl.int32)
        if LOW:
            low = tl.dot(tl.load(x_low + first + k), b, low, out_dtype=tl.int32)
    if SPLIT:
        place = pieces + (tl.program_id(1).to(tl.int64) * rows + rm[:, None]) * padded + rn[None, :]
        mask = (rm < rows)[:, None] & (rn < padded)[None, :]
        tl.store(place, acc, mask=mask)
        if LOW:
            tl.store(place + tl.num_programs(1).to(tl.int64) * rows * padded, low, mask=mask)
    else:
        _finish_tile(
            acc, low, weight, scales, phase, beta, factors, counts, columns, values, out, logits, m, n,
            rows, inner, outer, padded, BM, BN, LOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "count"])
def join_int8_kernel(
    pieces, weight, scales, phase, beta, factors, counts, columns, values, out, logits,
    rows, inner, outer, padded, count, BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the ``count`` pieces of a tile, and those of the second terms behind them, and finish it."""
    after_the_last(PDL)
    m, n = tl.program_id(0), tl.program_id(1)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    place = pieces + rm[:, None].to(tl.int64) * padded + rn[None, :]
    mask = (rm < rows)[:, None] & (rn < padded)[None, :]
    area = rows.to(tl.int64) * padded
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    low = tl.zeros((BM, BN) if LOW else (1, 1), dtype=tl.int32)
    for piece in range(count):
        acc += tl.load(place + piece * area, mask=mask, other=0)
        if LOW:
            low += tl.load(place + (count + piece) * area, mask=mask, other=0)
    _finish_tile(
        acc, low, weight, scales, phase, beta, factors, counts, columns, values, out, logits, m, n,
        rows, inner, outer, padded, BM, BN, LOW,
    )  # fmt: skip


def columns(feature_map: Any) -> int:
    """h', as many as the rows must have."""
    return aligned(feature_map, "projection").shape[1]


def refusal(feature_map: Any) -> str | None:
    """Why a head of this size is not served, or None."""
    if feature_map.hidden_size > MAX_COLUMNS:
        return f"hidden size {feature_map.hidden_size}: int8 heads are served up to {MAX_COLUMNS}"
    if cdiv(feature_map.hidden_size, PAD) * PAD * feature_map.num_features >= 1 << 31:
        return f"a projection of {feature_map.num_features} features: int8 heads are served below 2 GiB"
    return None


def project(x: WholeRows, feature_map: Any, beta: Tensor, device: Device) -> Features:
    """c' and partial logits of rows (B ≥ 1, h'). ``feature_map``: an int8 ``rmcore.ops.FeatureMap``."""
    weight = aligned(feature_map, "projection")
    rows, (outer, inner) = x.whole.shape[0], weight.shape
    padded = cdiv(outer, PAD) * PAD
    tile = heuristics_int8.project(device, rows, x.low is not None)
    depth = math.gcd(tile.depth, inner)
    steps, tiles_n = inner // depth, cdiv(padded, tile.cols)
    split = heuristics.splits(tile, device, cdiv(rows, tile.rows) * tiles_n, steps)
    out = empty(rows, padded, dtype=torch.int8, device=weight.device)
    logits = empty(tiles_n if split == 1 else cdiv(padded, _JOIN_COLS), rows, dtype=torch.float32, device=weight.device)
    terms = 1 if x.low is None else 2
    pieces = out if split == 1 else empty(terms * split, rows, padded, dtype=torch.int32, device=weight.device)
    finish = (
        weight, feature_map.projection_scale, feature_map.phase, beta,
        x.factor, x.counts, x.columns, x.values, out, logits,
    )  # fmt: skip
    launch(
        project_int8_kernel, (cdiv(rows, tile.rows) * tiles_n, split),
        x.whole, x.whole if x.low is None else x.low, *finish, pieces, rows, inner, outer, padded, cdiv(steps, split),
        BM=tile.rows, BN=tile.cols, BK=depth, GROUP=tile.group, LOW=x.low is not None, SPLIT=split > 1,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        launch(
            join_int8_kernel, (cdiv(rows, _JOIN_ROWS), cdiv(padded, _JOIN_COLS)),
            pieces, *finish, rows, inner, outer, padded, split,
            BM=_JOIN_ROWS, BN=_JOIN_COLS, LOW=x.low is not None, warps=4, stages=1,
        )  # fmt: skip
    return Features(out, logits)
