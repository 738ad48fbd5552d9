r"""Variance: v = ‖U c‖² row by row, the product never stored whole (design 2.4); then g, v, u, p (2.3, 2.5).

    y_i = Σ_{j ≤ i} U_ij c_j        v = factor_scale · Σ_i y_i²        u = √(1 + a v)        p = g / u

====  ====================================================================================================
in    c (B, D') serving dtype; U as packed lower tiles (n(n+1)/2, 128, 128), tile (i, j) at i(i+1)/2 + j;
      logits (parts, B) of the features kernel
out   (4, B) float32: g, v, u, p. For difference mode y (B, 128 n) float32 instead
bytes D(D + 128) of U (the diagonal tiles whole) + 2 B D; FLOP B D (D + 128). At D = 4096, B = 4096: 51 MB, 71 GFLOP:
      90 µs at 790 TFLOP/s. At B = 1 the 17 MB of U: 4 µs at 4.3 TB/s
====  ====================================================================================================

A tile of output columns i needs the reduction only up to its diagonal, so tiles differ in length up to n times. Three
ways to balance: with many rows, programs are ordered longest first and the hardware's scheduler evens them out; where
all fit on the device at once, one program takes a long and a short one (``paired``); with few rows, each row of
tiles is cut into pieces of equal length, whose float32 sums ``square`` adds in order before squaring.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import AREA, EDGE, after_the_last, cdiv, empty, grouped, launch, power_of_two, triangle_row
from .heuristics import Device

SQUARE = tl.constexpr(0)
STORE = tl.constexpr(1)
TILE_EDGE = 128
_SQUARE_ROWS = 16
_STORED_ROWS = 1024
"""Where y is stored, tiles stay those of at most this many rows: the widest ones would spill registers."""
_UNCUT_ROWS = 512
"""From this many rows on no table cuts the reduction."""
_SCORE_ROWS, _SCORE_PARTS = 32, 64


@triton.jit
def _product(
    c, c_stride, factor, rm, rn, first, last, rows, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Σ over tile columns first ≤ j < last of c_j U_ijᵀ: rows ``rm`` of c, rows ``rn`` of U, PER steps a tile."""
    rk = tl.arange(0, BK)
    cs = c + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * c_stride + rk[None, :]
    i = (rn // EDGE).to(tl.int64)
    us = factor + (i * (i + 1) // 2 * AREA + (rn % EDGE) * EDGE)[None, :] + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(first * PER, last * PER):
        j = step // PER
        a = tl.load(cs + step * BK)
        place = us + tl.cast(j, tl.int64) * AREA + (step % PER) * BK
        # Of two rows of tiles the upper one ends a tile earlier, and the lower one may not exist.
        b = tl.load(place, mask=((i >= j) & (i < tiles))[None, :], other=0.0) if BN > EDGE else tl.load(place)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def column_product(
    task, c, c_stride, factor, rows, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The task-th tile (m, n) of y, counting from the longest, and its values."""
    columns = tl.cdiv(tiles * EDGE, BN)
    m, reverse = grouped(task, tl.cdiv(rows, BM), columns, GROUP)
    n = columns - 1 - reverse
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    last = tl.minimum((n * BN + BN - 1) // EDGE + 1, tiles)
    return m, n, _product(c, c_stride, factor, rm, rn, 0, last, rows, tiles, BM, BN, BK, PER)


@triton.jit
def column_task(
    task, c, c_stride, factor, out, rows, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One tile of y, over its whole reduction. Tasks count from the longest."""
    m, n, acc = column_product(task, c, c_stride, factor, rows, tiles, BM, BN, BK, PER, GROUP)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    if MODE == SQUARE:
        tl.store(out + n.to(tl.int64) * rows + rm, tl.sum(acc * acc, axis=1), mask=rm < rows)
    else:
        place = out + rm[:, None].to(tl.int64) * (tiles * EDGE) + rn[None, :]
        tl.store(place, acc, mask=(rm < rows)[:, None] & (rn < tiles * EDGE)[None, :])


@triton.jit(do_not_specialize=["rows", "tiles", "total"])
def column_kernel(
    c, c_stride, factor, out, rows, tiles, total,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
    MODE: tl.constexpr, PAIRED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row sums of squares per tile of columns (SQUARE: out (columns, rows)), or y itself (STORE: out (rows, 128 n))."""
    after_the_last(PDL)
    task = tl.program_id(0)
    if PAIRED:  # the middle one of an odd count is done twice, with the same result
        for half in range(2):
            chosen = tl.where(half == 0, task, total - 1 - task)
            column_task(chosen, c, c_stride, factor, out, rows, tiles, BM, BN, BK, PER, GROUP, MODE)
    else:
        column_task(task, c, c_stride, factor, out, rows, tiles, BM, BN, BK, PER, GROUP, MODE)


@triton.jit
def piece_product(
    c, c_stride, factor, out, slot, within, i, rm, rows, tiles, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """At most ``span`` tiles of row i of tiles, the ``within``-th of its block row: out[slot] (rows, 128)."""
    first = (within // span) * span
    last = tl.minimum(first + span, i + 1)
    local = tl.arange(0, BN)
    acc = _product(c, c_stride, factor, rm, i * EDGE + local, first, last, rows, tiles, BM, BN, BK, PER)
    place = out + (slot.to(tl.int64) * rows + rm[:, None]) * EDGE + local[None, :]
    tl.store(place, acc, mask=(rm < rows)[:, None])


@triton.jit
def piece_sum(pieces, out, i, rm, rows, span, BM: tl.constexpr, BN: tl.constexpr, CACHE: tl.constexpr):
    """Add the pieces of row i of tiles in order, square, sum over its columns: out (tiles, rows)."""
    a = i // span
    slot = a * (a + 1) // 2 * span + i % span
    offsets = rm[:, None] * EDGE + tl.arange(0, BN)[None, :]
    mask = (rm < rows)[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for piece in range(a + 1):
        place = pieces + (slot + piece * span).to(tl.int64) * rows * EDGE
        acc += tl.load(place + offsets, mask=mask, other=0.0, cache_modifier=CACHE)
    tl.store(out + i.to(tl.int64) * rows + rm, tl.sum(acc * acc, axis=1), mask=rm < rows)


@triton.jit
def scores(
    logits, squares, out, out_stride, rm, rows, logit_parts, square_parts, beta0, factor_scale, amplitude,
    BM: tl.constexpr, BP: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Add the parts of rows ``rm`` in order; g, v, u, p into the rows of out (4, B)."""
    rp = tl.arange(0, BP)
    place = rp[:, None].to(tl.int64) * rows + rm[None, :]
    g = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, logit_parts, BP):
        mask = (start + rp < logit_parts)[:, None] & (rm < rows)[None, :]
        part = tl.load(logits + start * rows.to(tl.int64) + place, mask=mask, other=0.0, cache_modifier=CACHE)
        g += tl.sum(part, axis=0)
    v = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, square_parts, BP):
        mask = (start + rp < square_parts)[:, None] & (rm < rows)[None, :]
        part = tl.load(squares + start * rows.to(tl.int64) + place, mask=mask, other=0.0, cache_modifier=CACHE)
        v += tl.sum(part, axis=0)
    g += beta0
    v *= factor_scale
    u = tl.sqrt(1.0 + amplitude * v)
    tl.store(out + rm, g, mask=rm < rows)
    tl.store(out + out_stride + rm, v, mask=rm < rows)
    tl.store(out + 2 * out_stride + rm, u, mask=rm < rows)
    tl.store(out + 3 * out_stride + rm, g / u, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "tiles", "span"])
def piece_kernel(
    c, c_stride, factor, out, rows, tiles, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """At most ``span`` tiles of one row of tiles: out[slot] (rows, 128).

    Rows a·span … a·span + span − 1 have a + 1 pieces each; slots count them block row by block row, pieces outermost.
    """
    after_the_last(PDL)
    tiles_m = tl.cdiv(rows, BM)
    slot = tl.program_id(0) // tiles_m
    a = triangle_row(slot // span)
    within = slot - a * (a + 1) // 2 * span
    i = a * span + within % span
    if i < tiles:
        rm = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
        piece_product(c, c_stride, factor, out, slot, within, i, rm, rows, tiles, span, BM, BN, BK, PER)


@triton.jit(do_not_specialize=["rows", "span"])
def square_kernel(
    pieces, out, rows, span, BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the pieces of a tile in order, square, sum over its columns: out (tiles, rows)."""
    after_the_last(PDL)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    piece_sum(pieces, out, tl.program_id(1), rm, rows, span, BM, BN, "")


@triton.jit(do_not_specialize=["rows", "logit_parts", "square_parts", "out_stride"])
def score_kernel(
    logits, squares, out, out_stride, rows, logit_parts, square_parts, beta0, factor_scale, amplitude,
    BM: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the parts in order; g, v, u, p into the rows of out (4, B)."""
    after_the_last(PDL)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    scores(
        logits, squares, out, out_stride, rm, rows, logit_parts, square_parts, beta0, factor_scale, amplitude,
        BM, BP, "",
    )  # fmt: skip


def squares(c: Tensor, factor: Tensor, size: int, device: Device) -> Tensor:
    """Parts of ‖factor c‖²: c (B ≥ 1, D') → (parts, B) float32."""
    rows, tiles = c.shape[0], cdiv(size, TILE_EDGE)
    tile = heuristics.product(device, c.element_size(), rows)
    tiles_m = cdiv(rows, tile.rows)
    if tile.fill > 0:
        span = heuristics.span(tile, device, tiles, tiles_m)
        blocks = cdiv(tiles, span)
        slots = span * blocks * (blocks + 1) // 2
        pieces = empty(slots, rows, TILE_EDGE, dtype=torch.float32, device=c.device)
        out = empty(tiles, rows, dtype=torch.float32, device=c.device)
        launch(
            piece_kernel, (slots * tiles_m,),
            c, c.stride(0), factor, pieces, rows, tiles, span,
            BM=tile.rows, BN=TILE_EDGE, BK=tile.depth, PER=TILE_EDGE // tile.depth,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        launch(
            square_kernel, (cdiv(rows, _SQUARE_ROWS), tiles),
            pieces, out, rows, span,
            BM=_SQUARE_ROWS, BN=TILE_EDGE, warps=4, stages=1,
        )  # fmt: skip
        return out
    out = empty(cdiv(tiles * TILE_EDGE, tile.cols), rows, dtype=torch.float32, device=c.device)
    _columns(c, factor, out, tiles, tile, device, SQUARE)
    return out


def stored_tile(rows: int, element: int, device: Device) -> heuristics.Tile:
    """The tile of a product whose values are kept, or worked on, rather than squared."""
    tile = heuristics.product(device, element, min(rows, _STORED_ROWS))
    if tile.fill > 0 and tile.rows > 64:  # made to be cut: whole, its matrix instructions are serialised by Triton 3.6
        tile = heuristics.product(device, element, _UNCUT_ROWS)
    return tile


def product(c: Tensor, factor: Tensor, size: int, device: Device) -> Tensor:
    """y = factor c: (B ≥ 1, D') → (B, 128 n) float32."""
    rows, tiles = c.shape[0], cdiv(size, TILE_EDGE)
    tile = stored_tile(rows, c.element_size(), device)
    out = torch.empty(rows, tiles * TILE_EDGE, dtype=torch.float32, device=c.device)
    _columns(c, factor, out, tiles, tile, device, STORE)
    return out


def _columns(
    c: Tensor, factor: Tensor, out: Tensor, tiles: int, tile: heuristics.Tile, device: Device, mode: Any
) -> None:
    rows = c.shape[0]
    total = cdiv(rows, tile.rows) * cdiv(tiles * TILE_EDGE, tile.cols)
    paired = tile.paired and device.multiprocessors < total <= 2 * device.multiprocessors
    launch(
        column_kernel, (cdiv(total, 2) if paired else total,),
        c, c.stride(0), factor, out, rows, tiles, total,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, PER=TILE_EDGE // tile.depth, GROUP=tile.group,
        MODE=mode.value, PAIRED=paired, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def score(logits: Tensor, parts: Tensor, out: Tensor, *, beta0: float, factor_scale: float, amplitude: float) -> None:
    """Fill ``out`` (4, B), rows unit-strided, from partial logits and partial squares."""
    rows = parts.shape[1]
    launch(
        score_kernel, (cdiv(rows, _SCORE_ROWS),),
        logits, parts, out, out.stride(0), rows, logits.shape[0], parts.shape[0], beta0, factor_scale, amplitude,
        BM=_SCORE_ROWS, BP=min(_SCORE_PARTS, power_of_two(max(logits.shape[0], parts.shape[0]))), warps=4, stages=1,
    )  # fmt: skip
