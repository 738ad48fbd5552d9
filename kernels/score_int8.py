r"""Score of an int8 head: c' of features_int8.py → g, v, u, p, and the whole of it from hidden rows.

    y_i = r_i/127 Σ_{j<i} U_ij c'_j + U_ii c'_i/127    v = factor_scale Σ_i y_i²    u = √(1 + a v)    p = g / u

====  ====================================================================================================
in    c' (B, D') int8; U as packed lower tiles (n(n+1)/2, 128, 128) int8 without its diagonal, factors r and diagonal
      (D,) float32; logits (parts, B). ``score``: x (B, h) any float dtype and strides, and the head
out   (4, B) float32: g, v, u, p
bytes D(D + 128)/2 of U + B D; FLOP B D (D + 128). At D = 4096: 8.7 MB at B = 1, 2.9 µs at 3.04 TB/s; 71 G at B = 4096,
      45 µs at 1.58 P/s. With the features of h = 4096: 8.4 and 132 µs
====  ====================================================================================================

Tasks and pieces are cut as in variance.py; sums are whole numbers, the same in any order. A row with a value that is
not finite has a NaN factor, hence NaN t and g, but some c': v = v + (g − g) ends as it must.
"""

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import features_int8, heuristics, heuristics_int8, rows_int8
from .common import AREA, EDGE, after_the_last, cdiv, empty, grouped, halves, launch, power_of_two, triangle_row
from .heuristics import Device, Tile

TILE_EDGE = 128
_SQUARE_ROWS = 16
_SCORE_ROWS, _SCORE_PARTS = 32, 64


class Head(Protocol):
    """What is read of an int8 head; ``rmcore.ops.HeadWeights`` is one."""

    @property
    def map(self) -> Any: ...
    @property
    def beta(self) -> Tensor: ...
    @property
    def factor(self) -> Tensor: ...
    @property
    def factor_row_scale(self) -> Tensor | None: ...
    @property
    def factor_diagonal(self) -> Tensor | None: ...
    @property
    def beta0(self) -> float: ...
    @property
    def factor_scale(self) -> float: ...
    @property
    def amplitude(self) -> float: ...


@triton.jit
def _product(
    c, c_stride, factor, rm, rn, first, last, rows, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Σ over tile columns first ≤ j < last of c'_j U_ijᵀ: rows ``rm`` of c', rows ``rn`` of U, PER steps a tile."""
    rk = tl.arange(0, BK)
    cs = c + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * c_stride + rk[None, :]
    i = (rn // EDGE).to(tl.int64)
    us = factor + (i * (i + 1) // 2 * AREA + (rn % EDGE) * EDGE)[None, :] + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(first * PER, last * PER):
        j = step // PER
        a = tl.load(cs + step * BK)
        place = us + tl.cast(j, tl.int64) * AREA + (step % PER) * BK
        # Of two rows of tiles the upper one ends a tile earlier, and the lower one may not exist.
        b = tl.load(place, mask=((i >= j) & (i < tiles))[None, :], other=0) if BN > EDGE else tl.load(place)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _squares(acc, c, c_stride, scales, diagonal, rm, rn, rows, size, BM: tl.constexpr, BN: tl.constexpr):
    """Whole sums of y's columns ``rn``, of all but the diagonal → Σ y² of each row."""
    inside = rn < size
    scale = tl.load(scales + rn, mask=inside, other=0.0)
    own = tl.load(diagonal + rn, mask=inside, other=0.0) * (1.0 / 127.0)
    place = c + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * c_stride + rn[None, :]
    whole = tl.load(place).to(tl.float32)  # no tile reaches beyond D'
    y = acc.to(tl.float32) * scale[None, :] * (1.0 / 127.0) + own[None, :] * whole
    return tl.sum(y * y, axis=1)


@triton.jit
def _column_task(
    task, c, c_stride, factor, scales, diagonal, out, rows, tiles, size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row sums of squares of one tile of y, over its whole reduction. Tasks count from the longest."""
    columns = tl.cdiv(tiles * EDGE, BN)
    m, reverse = grouped(task, tl.cdiv(rows, BM), columns, GROUP)
    n = columns - 1 - reverse
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    last = tl.minimum((n * BN + BN - 1) // EDGE + 1, tiles)
    acc = _product(c, c_stride, factor, rm, rn, 0, last, rows, tiles, BM, BN, BK, PER)
    if BM * BN > 8192:  # in quarters: what an epilogue holds beside the sums must fit the registers
        PART: tl.constexpr = BN // 4
        left, right = halves(acc, BM, BN)
        first, second = halves(left, BM, BN // 2)
        third, fourth = halves(right, BM, BN // 2)
        rp = n * BN + tl.arange(0, PART)
        total = _squares(first, c, c_stride, scales, diagonal, rm, rp, rows, size, BM, PART)
        total += _squares(second, c, c_stride, scales, diagonal, rm, rp + PART, rows, size, BM, PART)
        total += _squares(third, c, c_stride, scales, diagonal, rm, rp + 2 * PART, rows, size, BM, PART)
        total += _squares(fourth, c, c_stride, scales, diagonal, rm, rp + 3 * PART, rows, size, BM, PART)
    else:
        total = _squares(acc, c, c_stride, scales, diagonal, rm, rn, rows, size, BM, BN)
    tl.store(out + n.to(tl.int64) * rows + rm, total, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "tiles", "total"])
def column_int8_kernel(
    c, c_stride, factor, scales, diagonal, out, rows, tiles, total, size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
    PAIRED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row sums of squares per tile of columns: out (columns, rows)."""
    after_the_last(PDL)
    task = tl.program_id(0)
    for half in range(2 if PAIRED else 1):  # the middle one of an odd count is done twice, with the same result
        chosen = tl.where(half == 0, task, total - 1 - task)
        _column_task(chosen, c, c_stride, factor, scales, diagonal, out, rows, tiles, size, BM, BN, BK, PER, GROUP)


@triton.jit(do_not_specialize=["rows", "tiles", "span"])
def piece_int8_kernel(
    c, c_stride, factor, out, rows, tiles, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """At most ``span`` tiles of one row of tiles: out[slot] (rows, 128) int32. Slots as in variance.py."""
    after_the_last(PDL)
    tiles_m = tl.cdiv(rows, BM)
    slot = tl.program_id(0) // tiles_m
    a = triangle_row(slot // span)
    within = slot - a * (a + 1) // 2 * span
    i = a * span + within % span
    if i < tiles:
        rm = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
        first = (within // span) * span
        local = tl.arange(0, BN)
        acc = _product(
            c, c_stride, factor, rm, i * EDGE + local, first, tl.minimum(first + span, i + 1), rows, tiles,
            BM, BN, BK, PER,
        )  # fmt: skip
        place = out + (slot.to(tl.int64) * rows + rm[:, None]) * EDGE + local[None, :]
        tl.store(place, acc, mask=(rm < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "span"])
def square_int8_kernel(
    pieces, c, c_stride, scales, diagonal, out, rows, span, size,
    BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the pieces of a tile, square, sum over its columns: out (tiles, rows)."""
    after_the_last(PDL)
    i = tl.program_id(1)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    local = tl.arange(0, BN)
    a = i // span
    slot = a * (a + 1) // 2 * span + i % span
    offsets = rm[:, None] * EDGE + local[None, :]
    mask = (rm < rows)[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for piece in range(a + 1):
        place = pieces + (slot + piece * span).to(tl.int64) * rows * EDGE
        acc += tl.load(place + offsets, mask=mask, other=0)
    total = _squares(acc, c, c_stride, scales, diagonal, rm, i * EDGE + local, rows, size, BM, BN)
    tl.store(out + i.to(tl.int64) * rows + rm, total, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "logit_parts", "square_parts", "out_stride"])
def score_int8_kernel(
    logits, squares, out, out_stride, rows, logit_parts, square_parts, beta0, factor_scale, amplitude,
    BM: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the parts in order; g, v, u, p into the rows of out (4, B)."""
    after_the_last(PDL)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rp = tl.arange(0, BP)
    inside = (rm < rows)[None, :]
    place = rp[:, None].to(tl.int64) * rows + rm[None, :]
    g = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, logit_parts, BP):
        mask = (start + rp < logit_parts)[:, None] & inside
        g += tl.sum(tl.load(logits + start * rows.to(tl.int64) + place, mask=mask, other=0.0), axis=0)
    v = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, square_parts, BP):
        mask = (start + rp < square_parts)[:, None] & inside
        v += tl.sum(tl.load(squares + start * rows.to(tl.int64) + place, mask=mask, other=0.0), axis=0)
    g += beta0
    v = v * factor_scale + (g - g)  # whole numbers know no NaN
    u = tl.sqrt(1.0 + amplitude * v)
    tl.store(out + rm, g, mask=rm < rows)
    tl.store(out + out_stride + rm, v, mask=rm < rows)
    tl.store(out + 2 * out_stride + rm, u, mask=rm < rows)
    tl.store(out + 3 * out_stride + rm, g / u, mask=rm < rows)


def _parts(c: Tensor, head: Head, device: Device) -> Tensor:
    """Parts of ‖U c‖²: c' (B, D') → (parts, B) float32."""
    rows, size = c.shape[0], head.map.num_features
    tiles, tile = cdiv(size, TILE_EDGE), heuristics_int8.product(device, rows)
    tiles_m = cdiv(rows, tile.rows)
    scales = (head.factor_row_scale, head.factor_diagonal)
    shape: dict[str, Any] = {"BM": tile.rows, "BK": tile.depth, "PER": TILE_EDGE // tile.depth}
    if tile.fill > 0:
        return _cut(c, head, device, tile, scales, shape)
    columns = cdiv(tiles * TILE_EDGE, tile.cols)
    total = tiles_m * columns
    paired = tile.paired and device.multiprocessors < total <= 2 * device.multiprocessors
    out = empty(columns, rows, dtype=torch.float32, device=c.device)
    launch(
        column_int8_kernel, (cdiv(total, 2) if paired else total,),
        c, c.stride(0), head.factor, *scales, out, rows, tiles, total, size,
        **shape, BN=tile.cols, GROUP=tile.group, PAIRED=paired, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out


def _cut(c: Tensor, head: Head, device: Device, tile: Tile, scales: Any, shape: dict[str, Any]) -> Tensor:
    """The same with each row of tiles in pieces."""
    rows, size = c.shape[0], head.map.num_features
    tiles, tiles_m = cdiv(size, TILE_EDGE), cdiv(rows, tile.rows)
    span = heuristics.span(tile, device, tiles, tiles_m)
    blocks = cdiv(tiles, span)
    slots = span * blocks * (blocks + 1) // 2
    pieces = empty(slots, rows, TILE_EDGE, dtype=torch.int32, device=c.device)
    out = empty(tiles, rows, dtype=torch.float32, device=c.device)
    launch(
        piece_int8_kernel, (slots * tiles_m,),
        c, c.stride(0), head.factor, pieces, rows, tiles, span,
        **shape, BN=TILE_EDGE, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    launch(
        square_int8_kernel, (cdiv(rows, _SQUARE_ROWS), tiles),
        pieces, c, c.stride(0), *scales, out, rows, span, size, BM=_SQUARE_ROWS, BN=TILE_EDGE, warps=4, stages=1,
    )  # fmt: skip
    return out


def score(hidden: Tensor, head: Head, out: Tensor, device: Device) -> None:
    """Fill ``out`` (4, B), rows unit-strided, from hidden rows (B ≥ 1, h) of an int8 head."""
    feature_map, rows = head.map, hidden.shape[0]
    two_terms = 2 * feature_map.hidden_size <= feature_map.num_features
    x = rows_int8.whole_rows(
        hidden, features_int8.columns(feature_map), scale=feature_map.input_scale, shift=feature_map.hidden_shift,
        balance=feature_map.hidden_scale, two_terms=two_terms,
    )  # fmt: skip
    c, logits = features_int8.project(x, feature_map, head.beta, device)
    assert logits is not None
    parts = _parts(c, head, device)
    launch(
        score_int8_kernel, (cdiv(rows, _SCORE_ROWS),),
        logits, parts, out, out.stride(0), rows, logits.shape[0], parts.shape[0],
        head.beta0, head.factor_scale, head.amplitude,
        BM=_SCORE_ROWS, BP=min(_SCORE_PARTS, power_of_two(max(logits.shape[0], parts.shape[0]))), warps=4, stages=1,
    )  # fmt: skip
