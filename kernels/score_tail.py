r"""The end of a score in one launch: y = U c, its squares, and g, v, u, p, added up by whoever comes last.

    y_i = Σ_{j ≤ i} U_ij c_j        v = factor_scale · Σ_i y_i²     g = β₀ + Σ parts     u = √(1 + a v)     p = g / u

====  ====================================================================================================
in    c (B, D') serving dtype; logits (parts, B) float32; U packed as in variance.py; counters (≥ counts,) int32, zero
out   (4, B) float32
bytes those of variance.py; one or two launches fewer, which at one row on an H100 were 4 of 37 µs each
====  ====================================================================================================

The same tiles, pieces and orders of addition as the launches of variance.py that this replaces (``heuristics.FORMS``).
A program that has stored its share counts itself; the one that finds all others counted adds everything up, in the
order of the shares and not of arrival, so the same input gives the same bits whoever is last. Counting releases what
the program has stored and acquires what the others have: an atomic with acq_rel at the GPU's scope, between two
barriers of the program, and the sums are read past the first-level cache. ``features.project`` has zeroed the counters,
a launch earlier, so a workspace may hold anything and a captured graph can be replayed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import EDGE, after_the_last, cdiv, empty, grouped, launch, power_of_two, triangle_row
from .heuristics import Device, Tile
from .variance import SQUARE, TILE_EDGE, column_task, piece_product, piece_sum, scores

_PARTS = 64


class Tail(NamedTuple):
    """How the end of a score is cut, and the counters that an earlier launch must zero."""

    tile: Tile
    tiles: int
    counters: Tensor


@triton.jit
def came_before(counter):
    """How many programs have counted themselves here before this one, which now has."""
    tl.debug_barrier()  # all of this program's stores before its one atomic
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit(do_not_specialize=["rows", "tiles", "span", "out_stride", "logit_parts"])
def piece_score_kernel(
    c, c_stride, factor, pieces, squares, logits, counters, out, out_stride, rows, tiles, span, logit_parts,
    beta0, factor_scale, amplitude,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A piece of a row of tiles; the last of a row's adds its pieces and squares, the last row's adds rows and logits.

    counters: one for each row of tiles and m, then one for each m.
    """
    after_the_last(PDL)
    tiles_m = tl.cdiv(rows, BM)
    m = tl.program_id(0) % tiles_m
    slot = tl.program_id(0) // tiles_m
    a = triangle_row(slot // span)
    within = slot - a * (a + 1) // 2 * span
    i = a * span + within % span
    rm = m * BM + tl.arange(0, BM)
    if i < tiles:
        piece_product(c, c_stride, factor, pieces, slot, within, i, rm, rows, tiles, span, BM, BN, BK, PER)
        if came_before(counters + i * tiles_m + m) == a:
            piece_sum(pieces, squares, i, rm, rows, span, BM, BN, ".cg")
            if came_before(counters + tiles * tiles_m + m) == tiles - 1:
                scores(
                    logits, squares, out, out_stride, rm, rows, logit_parts, tiles, beta0, factor_scale, amplitude,
                    BM, BP, ".cg",
                )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles", "total", "out_stride", "logit_parts"])
def column_score_kernel(
    c, c_stride, factor, squares, logits, counters, out, out_stride, rows, tiles, total, logit_parts,
    beta0, factor_scale, amplitude,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
    PAIRED: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row sums of squares of a tile of columns, or two; the last of a row of tiles adds its tiles and logits.

    counters: one for each m.
    """
    after_the_last(PDL)
    task = tl.program_id(0)
    columns = tl.cdiv(tiles * EDGE, BN)
    tiles_m = tl.cdiv(rows, BM)
    for half in range(2 if PAIRED else 1):
        chosen = tl.where(half == 0, task, total - 1 - task)
        if (half == 0) | (chosen != task):  # the middle one of an odd count has no partner
            column_task(chosen, c, c_stride, factor, squares, rows, tiles, BM, BN, BK, PER, GROUP, SQUARE)
            m, _ = grouped(chosen, tiles_m, columns, GROUP)
            if came_before(counters + m) == columns - 1:
                rm = m * BM + tl.arange(0, BM)
                scores(
                    logits, squares, out, out_stride, rm, rows, logit_parts, columns, beta0, factor_scale, amplitude,
                    BM, BP, ".cg",
                )  # fmt: skip


def plan(rows: int, size: int, dtype: torch.dtype, device: Device, on: torch.device) -> Tail:
    """How ``rows`` rows of ``size`` features end, with counters for ``features.project`` to zero."""
    tile, tiles = heuristics.product(device, dtype.itemsize, rows), cdiv(size, TILE_EDGE)
    tiles_m = cdiv(rows, tile.rows)
    counts = tiles_m * (tiles + 1) if tile.fill > 0 else tiles_m
    return Tail(tile, tiles, empty(power_of_two(counts), dtype=torch.int32, device=on))


def score(
    tail: Tail,
    c: Tensor,
    logits: Tensor,
    factor: Tensor,
    out: Tensor,
    device: Device,
    *,
    beta0: float,
    factor_scale: float,
    amplitude: float,
) -> None:
    """Fill ``out`` (4, B), rows unit-strided, from c (B ≥ 1, D') and partial logits."""
    tile, tiles, counters = tail
    rows, parts = c.shape[0], logits.shape[0]
    tiles_m = cdiv(rows, tile.rows)
    shape = {"BM": tile.rows, "BK": tile.depth, "PER": TILE_EDGE // tile.depth}
    ends = (beta0, factor_scale, amplitude)
    options = {"warps": tile.warps, "stages": tile.stages}
    if tile.fill > 0:
        span = heuristics.span(tile, device, tiles, tiles_m)
        blocks = cdiv(tiles, span)
        slots = span * blocks * (blocks + 1) // 2
        pieces = empty(slots, rows, TILE_EDGE, dtype=torch.float32, device=c.device)
        squares = empty(tiles, rows, dtype=torch.float32, device=c.device)
        launch(
            piece_score_kernel, (slots * tiles_m,),
            c, c.stride(0), factor, pieces, squares, logits, counters, out, out.stride(0), rows, tiles, span, parts,
            *ends, **shape, BN=TILE_EDGE, BP=min(_PARTS, power_of_two(max(parts, tiles))), **options,
        )  # fmt: skip
        return
    columns = cdiv(tiles * TILE_EDGE, tile.cols)
    total = tiles_m * columns
    paired = tile.paired and device.multiprocessors < total <= 2 * device.multiprocessors
    squares = empty(columns, rows, dtype=torch.float32, device=c.device)
    launch(
        column_score_kernel, (cdiv(total, 2) if paired else total,),
        c, c.stride(0), factor, squares, logits, counters, out, out.stride(0), rows, tiles, total, parts, *ends,
        **shape, BN=tile.cols, GROUP=tile.group, PAIRED=paired,
        BP=min(_PARTS, power_of_two(max(parts, columns))), **options,
    )  # fmt: skip
