r"""Variance of many rows, by programs that stay: parts of v = ‖U c‖² row by row, as in variance.py.

    y_i = Σ_{j ≤ i} U_ij c_j        v = factor_scale · Σ_i y_i²

====  ====================================================================================================
in    c (B, D') fp16/bf16; U as packed lower tiles (n(n+1)/2, 128, 128) in the same dtype
out   (n, B) float32: Σ y_i² over each row of tiles, for ``variance.score`` to add
bytes D(D + 128) of U + 2 B D; FLOP B D (D + 128). At D = 4096, B = 4096: 51 MB, 71 GFLOP: 90 µs at 790 TFLOP/s
====  ====================================================================================================

Tiles are one row of U's tiles wide and differ in length up to n times. They are dealt out from the longest, in turns
that go back and forth over the programs: with 132 of those and D = 4096, all come to the same number of steps
(tests/kernels/test_schedules.py), where the hardware's own order ends 1 to 2% later. All rows of a launch belong to one
deal, so more rows than the L2 keeps (``STRIP_ROWS``) take several launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics_tma
from .common import EDGE, cdiv, empty, launch
from .heuristics import Device

TILE_EDGE = 128
_CONSUMER_ROWS = 64
"""Rows of one consumer's matrix instruction. Triton makes two consumers in any case, and with fewer than twice these
rows they do not part the tile but both compute it."""


@triton.jit
def _dealt(turn, programs):
    """The task that this program has in its ``turn``-th turn; the last turn may go beyond what there is."""
    program = tl.program_id(0)
    return turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)


@triton.jit
def _place(task, tiles_m, tiles):
    """Row tile m and row of U's tiles n of a task. Tasks count from the longest."""
    return task % tiles_m, tiles - 1 - task // tiles_m


@triton.jit
def _store_squares(acc, out, out_stride, m, n, rows, BM: tl.constexpr):
    rm = m * BM + tl.arange(0, BM)
    tl.store(out + n.to(tl.int64) * out_stride + rm, tl.sum(acc * acc, axis=1), mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "out_stride", "tiles", "total", "programs"])
def column_persistent_kernel(
    c, c_stride, factor, out, out_stride, rows, tiles, total, programs,
    BM: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Row sums of squares of BM rows times 128 columns of y, over all tiles this program is dealt: out (tiles, rows).
    A row of U's tile takes PER steps.

    One loop over all their steps, since Triton makes one of two only where every tile is as long as the others.
    """
    cs = tl.make_tensor_descriptor(c, [rows, tiles * EDGE], [c_stride, 1], [BM, BK])
    us = tl.make_tensor_descriptor(factor, [tiles * (tiles + 1) // 2 * EDGE, EDGE], [EDGE, 1], [EDGE, BK])
    tiles_m = tl.cdiv(rows, BM)
    work = 0
    for turn in range(tl.cdiv(total, programs)):
        task = _dealt(turn, programs)
        _, n = _place(task, tiles_m, tiles)
        work += tl.where(task < total, n + 1, 0)
    turn, m, n, step, last = -1, 0, 0, -1, -1
    acc = tl.zeros((BM, EDGE), dtype=tl.float32)
    for _ in range(work * PER):
        step = tl.where(step == last, 0, step + 1)
        if step == 0:
            turn += 1
            m, n = _place(_dealt(turn, programs), tiles_m, tiles)
            last = (n + 1) * PER - 1
        a = cs.load([m * BM, step * BK])
        b = us.load([(n * (n + 1) // 2 + step // PER) * EDGE, (step % PER) * BK])
        acc = tl.dot(a, b.T, acc)
        if step == last:
            _store_squares(acc, out, out_stride, m, n, rows, BM)
            acc = tl.zeros((BM, EDGE), dtype=tl.float32)


@triton.jit(do_not_specialize=["rows", "out_stride", "tiles", "total", "programs"])
def column_specialized_kernel(
    c, c_stride, factor, out, out_stride, rows, tiles, total, programs,
    BM: tl.constexpr, BK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """The same, with warps of their own that ask for the loads. BM is 128 or more, a half for each consumer."""
    cs = tl.make_tensor_descriptor(c, [rows, tiles * EDGE], [c_stride, 1], [BM, BK])
    us = tl.make_tensor_descriptor(factor, [tiles * (tiles + 1) // 2 * EDGE, EDGE], [EDGE, 1], [EDGE, BK])
    tiles_m = tl.cdiv(rows, BM)
    turns = tl.cdiv(total, programs)
    turns -= tl.where(_dealt(turns - 1, programs) < total, 0, 1)
    for turn in tl.range(0, turns, warp_specialize=True):
        m, n = _place(_dealt(turn, programs), tiles_m, tiles)
        acc = tl.zeros((BM, EDGE), dtype=tl.float32)
        for step in range((n + 1) * PER):
            a = cs.load([m * BM, step * BK])
            b = us.load([(n * (n + 1) // 2 + step // PER) * EDGE, (step % PER) * BK])
            acc = tl.dot(a, b.T, acc)
        _store_squares(acc, out, out_stride, m, n, rows, BM)


def squares(c: Tensor, factor: Tensor, size: int, device: Device, form: str) -> Tensor:
    """Parts of ‖factor c‖²: c (B ≥ 1, D') → (parts, B) float32."""
    rows, tiles = c.shape[0], cdiv(size, TILE_EDGE)
    out = empty(tiles, rows, dtype=torch.float32, device=c.device)
    for start in range(0, rows, heuristics_tma.STRIP_ROWS):
        strip = c[start : start + heuristics_tma.STRIP_ROWS]
        tile = heuristics_tma.product(form, device, len(strip))
        total = cdiv(len(strip), tile.rows) * tiles
        programs = heuristics_tma.programs(total, device)
        special = form == "specialized" and tile.rows >= 2 * _CONSUMER_ROWS
        launch(
            column_specialized_kernel if special else column_persistent_kernel, (programs,),
            strip, strip.stride(0), factor, out[:, start:], out.stride(0), len(strip), tiles, total, programs,
            BM=tile.rows, BK=tile.depth, PER=TILE_EDGE // tile.depth, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    return out
