r"""Gram matrix of a chunk of rows, by programs that stay: P += scale · Φ̂ᵀΦ̂, as in gram.py.

    P_ij += scale Σ_n φ̂_ni φ̂_nj

====  ====================================================================================================
in    Φ̂ (N, D') fp16/bf16, already weighed (``gram.weigh``)
out   P (D, D) float32 or float64, lower triangle in place
bytes N D of Φ̂, P read and written once, and half its entries in float32 between; FLOP N D (D + 128).
      16,384 rows at D = 4096: 277 GFLOP: 350 µs at 790 TFLOP/s
====  ====================================================================================================

The same tiles, pieces and order of addition as gram.py, so what is added to P does not depend on who computes a tile:
whole tiles first, in rounds in which every program is at the same rows, which then come from the L2, and what is left
beyond the last whole round in pieces. Rows beyond N are zeros that the descriptors fill in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics, heuristics_tma
from .common import cdiv, halves, launch, triangle_row
from .gram import add_kernel
from .heuristics import Device

_ADD_ROWS = 16


@triton.jit
def _piece(number, whole, cut, stop_every, steps, SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of P, first step and the one after the last, of a whole tile or of a piece of one."""
    late = tl.maximum(number - whole, 0)
    task = tl.minimum(number, whole) + late // cut
    start = (late % cut) * stop_every
    stop = tl.where(number < whole, steps, tl.minimum(start + stop_every, steps))
    a = triangle_row(task // SHARE)
    local = task - a * (a + 1) // 2 * SHARE
    return (a * SHARE + local % SHARE) * BM, (local // SHARE) * BN, start, stop


@triton.jit
def _store(part, pieces, number, column, BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr):
    """Columns ``column`` and on of a tile."""
    place = tl.arange(0, BM)[:, None] * BN + (column + tl.arange(0, PART))[None, :]
    tl.store(pieces + tl.cast(number, tl.int64) * (BM * BN) + place, part)


@triton.jit(do_not_specialize=["rows", "whole", "cut", "stop_every", "total", "programs"])
def gram_persistent_kernel(
    phi, pieces, rows, padded, whole, cut, stop_every, total, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Lower BM×BN tiles of Φ̂ᵀΦ̂ and pieces of them, every ``programs``-th: pieces[number] (BM, BN).

    One loop over all their steps. A tile is stored in quarters, whose way into rows fits beside the stages.
    """
    xs = tl.make_tensor_descriptor(phi, [rows, padded], [padded, 1], [BK, BM])
    ys = tl.make_tensor_descriptor(phi, [rows, padded], [padded, 1], [BK, BN])
    steps = tl.cdiv(rows, BK)
    work = 0
    for number in range(tl.program_id(0), total, programs):
        _, _, start, stop = _piece(number, whole, cut, stop_every, steps, SHARE, BM, BN)
        work += stop - start
    number = tl.program_id(0) - programs
    row, column, step, stop = 0, 0, -1, 0
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(work):
        step += 1
        if step == stop:
            number += programs
            row, column, step, stop = _piece(number, whole, cut, stop_every, steps, SHARE, BM, BN)
        x = xs.load([step * BK, row])
        y = ys.load([step * BK, column])
        acc = tl.dot(x.T, y, acc)
        if step == stop - 1:
            left, right = halves(acc, BM, BN)
            first, second = halves(left, BM, BN // 2)
            third, fourth = halves(right, BM, BN // 2)
            _store(first, pieces, number, 0, BM, BN, BN // 4)
            _store(second, pieces, number, BN // 4, BM, BN, BN // 4)
            _store(third, pieces, number, 2 * (BN // 4), BM, BN, BN // 4)
            _store(fourth, pieces, number, 3 * (BN // 4), BM, BN, BN // 4)
            acc = tl.zeros((BM, BN), dtype=tl.float32)


@triton.jit(do_not_specialize=["rows", "whole", "cut", "stop_every", "total", "programs"])
def gram_specialized_kernel(
    phi, pieces, rows, padded, whole, cut, stop_every, total, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The same, with warps of their own that ask for the loads."""
    xs = tl.make_tensor_descriptor(phi, [rows, padded], [padded, 1], [BK, BM])
    ys = tl.make_tensor_descriptor(phi, [rows, padded], [padded, 1], [BK, BN])
    steps = tl.cdiv(rows, BK)
    for number in tl.range(tl.program_id(0), total, programs, warp_specialize=True):
        row, column, start, stop = _piece(number, whole, cut, stop_every, steps, SHARE, BM, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(start, stop):
            x = xs.load([step * BK, row])
            y = ys.load([step * BK, column])
            acc = tl.dot(x.T, y, acc)
        _store(acc, pieces, number, 0, BM, BN, BN)


def gram(phi: Tensor, precision: Tensor, device: Device, form: str, *, scale: float) -> None:
    """precision (D, D), lower triangle, += scale · phiᵀ phi; phi (N ≥ 1, D')."""
    rows, padded = phi.shape
    size = precision.shape[0]
    tile = heuristics_tma.gram(form, device, size)
    share, blocks = tile.cols // tile.rows, cdiv(size, tile.cols)
    tiles = share * blocks * (blocks + 1) // 2
    steps = cdiv(rows, tile.depth)
    whole, cut = heuristics.cuts(tile, device, tiles, steps)
    every = cdiv(steps, cut)
    cut = cdiv(steps, every)  # a piece without a step would never be stored
    total = whole + (tiles - whole) * cut
    programs = heuristics_tma.programs(total, device)
    pieces = torch.empty(total, tile.rows, tile.cols, dtype=torch.float32, device=phi.device)
    shape = {"BM": tile.rows, "BN": tile.cols, "SHARE": share}
    launch(
        gram_specialized_kernel if form == "specialized" else gram_persistent_kernel, (programs,),
        phi, pieces, rows, padded, whole, cut, every, total, programs,
        BK=tile.depth, **shape, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    launch(
        add_kernel, (tiles, tile.rows // _ADD_ROWS),
        pieces, precision, size, precision.stride(0), whole, cut, scale,
        STRIP=_ADD_ROWS, **shape, warps=4, stages=1,
    )  # fmt: skip
