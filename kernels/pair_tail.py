r"""Difference mode for groups of one size, without y: pair distances are taken where y = U ĉ is computed (design 2.6).

    v_ij = factor_scale · Σ_n Σ_{d in tile n} (y_id − y_jd)²        g_ij = Σ parts (logit_i − logit_j)

====  ====================================================================================================
in    ĉ (G K, D') serving dtype, less its group's first row (``features.features(centre=K)``); logits (parts, G K)
      float32; U packed as in variance.py; counters (≥ row tiles,) int32, zero; K a power of two up to 8
out   g, v (G K(K−1)/2,) float32; exactly 0 for equal rows
bytes those of the product alone; 4 K floats a row and tile of columns of distances, where pair_variance.py writes
      and reads y: for 64 groups of 8 at D = 4096 2 MB instead of 8 + 58. FLOP 3 K a value of y more
====  ====================================================================================================

The last program of a row of tiles adds the tiles' distances up, in the order of the tiles (score_tail.py says how). Two
launches in all, three where the projection is cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EDGE, cdiv, empty, launch, power_of_two
from .heuristics import Device
from .score_tail import came_before
from .variance import TILE_EDGE, column_product, stored_tile

_SIZES = (2, 4, 8)
"""Rows of a group. Of 16 the differences would spill on Ampere, and cost 3 · 16 operations a value of y."""
_TILE_ROWS = 512
"""Tiles are those of at most this many rows: wider accumulators would spill beside the differences."""


@triton.jit
def _pair_distances(acc, out, m, n, rows, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
    """Σ over a tile's columns of (y_i − y_j)², for all i, j of its groups: out[n, row i, j]."""
    groups = tl.reshape(acc, (BM // K, K, BN))
    within = tl.arange(0, K)[None, :, None]
    row = m * BM + tl.arange(0, BM // K)[:, None] * K + tl.arange(0, K)[None, :]
    place = out + (n.to(tl.int64) * rows + row) * K
    for j in tl.static_range(K):
        other = tl.sum(tl.where(within == j, groups, 0.0), axis=1, keep_dims=True)
        delta = groups - other
        tl.store(place + j, tl.sum(delta * delta, axis=2), mask=row < rows)


@triton.jit
def _pair_sums(
    distances, logits, g, v, m, rows, columns, parts, factor_scale, BM: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """g and v of the pairs i < j of a row tile's groups: tiles and parts added in order."""
    element = tl.arange(0, BM * K)
    row, j = m * BM + element // K, element % K
    i = row % K
    wanted = (i < j) & (row < rows)
    at = row.to(tl.int64) * K + j
    total = tl.zeros((BM * K,), dtype=tl.float32)
    for n in range(columns):
        total += tl.load(distances + n * (rows.to(tl.int64) * K) + at, mask=wanted, other=0.0, cache_modifier=".cg")
    left = tl.zeros((BM * K,), dtype=tl.float32)
    right = tl.zeros((BM * K,), dtype=tl.float32)
    for part in range(parts):
        line = logits + part * rows.to(tl.int64) + row
        left += tl.load(line, mask=wanted, other=0.0)
        right += tl.load(line - i + j, mask=wanted, other=0.0)
    place = (row // K).to(tl.int64) * (K * (K - 1) // 2) + i * K - i * (i + 1) // 2 + j - i - 1
    tl.store(v + place, total * factor_scale, mask=wanted)
    tl.store(g + place, left - right, mask=wanted)


@triton.jit(do_not_specialize=["rows", "tiles", "total", "parts"])
def column_pair_kernel(
    c, c_stride, factor, distances, logits, counters, g, v, rows, tiles, total, parts, factor_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
    PAIRED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Distances of a tile of columns, or two; the last of a row of tiles adds them up. counters: one for each m."""
    task = tl.program_id(0)
    columns = tl.cdiv(tiles * EDGE, BN)
    for half in range(2 if PAIRED else 1):
        chosen = tl.where(half == 0, task, total - 1 - task)
        if (half == 0) | (chosen != task):  # the middle one of an odd count has no partner
            m, n, acc = column_product(chosen, c, c_stride, factor, rows, tiles, BM, BN, BK, PER, GROUP)
            _pair_distances(acc, distances, m, n, rows, BM, BN, K)
            if came_before(counters + m) == columns - 1:
                _pair_sums(distances, logits, g, v, m, rows, columns, parts, factor_scale, BM, K)


def serves(sizes: list[int]) -> bool:
    """Whether :func:`pairs` can do these groups: all of one size, a power of two that rows of tiles are made of."""
    return len(set(sizes)) == 1 and sizes[0] in _SIZES


def counters(rows: int, element: int, device: Device, on: torch.device) -> Tensor:
    """What an earlier launch must zero for ``rows`` rows of ``element`` bytes a value."""
    tile = stored_tile(min(rows, _TILE_ROWS), element, device)
    return empty(power_of_two(cdiv(rows, tile.rows)), dtype=torch.int32, device=on)


def pairs(
    c: Tensor,
    logits: Tensor,
    counted: Tensor,
    factor: Tensor,
    size: int,
    k: int,
    g: Tensor,
    v: Tensor,
    device: Device,
    factor_scale: float,
) -> None:
    """Fill g, v (Q,) from centred c (G k ≥ 1, D') and partial logits (parts, G k)."""
    rows, tiles = c.shape[0], cdiv(size, TILE_EDGE)
    tile = stored_tile(min(rows, _TILE_ROWS), c.element_size(), device)
    columns = cdiv(tiles * TILE_EDGE, tile.cols)
    total = cdiv(rows, tile.rows) * columns
    paired = tile.paired and device.multiprocessors < total <= 2 * device.multiprocessors
    distances = empty(columns, rows, k, dtype=torch.float32, device=c.device)
    launch(
        column_pair_kernel, (cdiv(total, 2) if paired else total,),
        c, c.stride(0), factor, distances, logits, counted, g, v, rows, tiles, total, logits.shape[0], factor_scale,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, PER=TILE_EDGE // tile.depth, GROUP=tile.group, PAIRED=paired, K=k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
