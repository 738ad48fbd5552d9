r"""Features of many rows, by programs that stay: hidden rows → c and the partial sums of βᵀc, as in features.py.

    t = s x Ωᵀ + phase        c = cos(2πt)        g = Σ_d β_d c_d

====  ====================================================================================================
in    x (B, h) fp16/bf16, unit column stride; Ω (D, h) in the same dtype, h a multiple of 8; phase, β (D,) float32;
      s a power of two
out   c (B, D') in that dtype, D' = D rounded up to 256, zero beyond D; logits (parts, B) float32
bytes 2 (B h + D h + B D); FLOP 2 B h D. At B = 4096, h = D = 4096: 101 MB, 137 GFLOP: 174 µs at 790 TFLOP/s
====  ====================================================================================================

A program a multiprocessor takes every so manieth tile. Operands come by tensor descriptors, which fill with zeros what
lies beyond the edge: no load is masked, and h need not be whole steps. What is asked for and what multiplies are the
same asynchronous kind of access, so no proxy fence is needed between them, which Triton 3.6 would not put there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import features, heuristics_tma
from .common import cdiv, cos_turns, empty, grouped, halves, launch
from .features import PAD, FeatureMap, Features
from .heuristics import Device

_ALIGNMENT = 16
"""Bytes at whose multiples a descriptor's rows begin."""


@triton.jit
def _finish_part(
    acc, phase, beta, out, rm, rn, rows, outer, padded, scale, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Sums → features, stored rounded; returns their share of βᵀc. No column is beyond ``padded``.

    Two ways to have nothing beyond D, each of which spills nothing where the other spills some registers.
    """
    place = out + rm[:, None].to(tl.int64) * padded + rn[None, :]
    if SPECIAL:
        rd = tl.minimum(rn, outer - 1)
        value = cos_turns(acc * scale + tl.load(phase + rd)[None, :])
        value = tl.where((rn < outer)[None, :], value, 0.0)
        tl.store(place, value.to(out.dtype.element_ty), mask=(rm < rows)[:, None])
        dot = tl.sum(value * tl.load(beta + rd)[None, :], axis=1)
    else:  # the sum is 0 there, and a quarter turn's cosine is 0 as ``cos_turns`` has it
        inside = rn < outer
        value = cos_turns(acc * scale + tl.load(phase + rn, mask=inside, other=0.25)[None, :])
        dot = tl.sum(value * tl.load(beta + rn, mask=inside, other=0.0)[None, :], axis=1)
        tl.store(place, value.to(out.dtype.element_ty), mask=(rm < rows)[:, None])
    return dot


@triton.jit
def _finish_tile(
    acc, phase, beta, out, logits, m, n, rows, outer, padded, scale,
    BM: tl.constexpr, BN: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """A tile of sums → features, and their share of βᵀc as row n of ``logits``.

    A wide tile is done in quarters, but for warps that specialise: Triton 3.6 parts no halves between them.
    """
    rm = m * BM + tl.arange(0, BM)
    if SPECIAL or BN <= 128:
        rn = n * BN + tl.arange(0, BN)
        dot = _finish_part(acc, phase, beta, out, rm, rn, rows, outer, padded, scale, SPECIAL)
    else:
        rn = n * BN + tl.arange(0, BN // 4)
        left, right = halves(acc, BM, BN)
        first, second = halves(left, BM, BN // 2)
        third, fourth = halves(right, BM, BN // 2)
        dot = _finish_part(first, phase, beta, out, rm, rn, rows, outer, padded, scale, SPECIAL)
        dot += _finish_part(second, phase, beta, out, rm, rn + BN // 4, rows, outer, padded, scale, SPECIAL)
        dot += _finish_part(third, phase, beta, out, rm, rn + BN // 2, rows, outer, padded, scale, SPECIAL)
        dot += _finish_part(fourth, phase, beta, out, rm, rn + 3 * (BN // 4), rows, outer, padded, scale, SPECIAL)
    tl.store(logits + n.to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "programs"])
def project_tma_kernel(
    x, x_stride, weight, phase, beta, out, logits, rows, inner, outer, padded, programs, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """BM×BN tiles of cos 2π(s x weightᵀ + phase), every ``programs``-th; BN divides ``padded``.

    SPECIAL: warps of their own ask for the loads. Without, both loops are one, and a tile's last steps ask for the
    next one's first.
    """
    xs = tl.make_tensor_descriptor(x, [rows, inner], [x_stride, 1], [BM, BK])
    ws = tl.make_tensor_descriptor(weight, [outer, inner], [inner, 1], [BN, BK])
    tiles_m, tiles_n = tl.cdiv(rows, BM), padded // BN
    steps = tl.cdiv(inner, BK)
    for task in tl.range(
        tl.program_id(0), tiles_m * tiles_n, programs, flatten=not SPECIAL, warp_specialize=SPECIAL
    ):  # fmt: skip
        m, n = grouped(task, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(steps):
            a = xs.load([m * BM, step * BK])
            b = ws.load([n * BN, step * BK])
            acc = tl.dot(a, b.T, acc)
        _finish_tile(acc, phase, beta, out, logits, m, n, rows, outer, padded, scale, BM, BN, SPECIAL)


def refusal(feature_map: FeatureMap, device: Device) -> str | None:
    """Why this map's features are not computed here, or None."""
    weight = feature_map.projection
    if device.kind not in heuristics_tma.KINDS:
        return f"no tables for {device.kind}"
    if feature_map.layer_weight is not None or weight is None or feature_map.features != "rff":
        return "only folded random features"
    if feature_map.dtype not in (torch.float16, torch.bfloat16):
        return f"only 16-bit heads, not {feature_map.dtype}"
    if weight.shape[1] * weight.element_size() % _ALIGNMENT or weight.data_ptr() % _ALIGNMENT:
        return f"rows of the projection ({weight.shape[1]} values) do not begin at multiples of {_ALIGNMENT} bytes"
    return None


def project(
    x: Tensor, weight: Tensor, phase: Tensor, beta: Tensor, device: Device, form: str, *, scale: float = 1.0
) -> Features:
    """cos 2π(scale · x weightᵀ + phase): x (B ≥ 1, k), weight (n, k) → (B, n') in their dtype, and logits."""
    rows, (outer, inner) = x.shape[0], weight.shape
    padded = cdiv(outer, PAD) * PAD
    tile = heuristics_tma.project(form, device, rows, even=(outer | inner) % 16 == 0)
    tiles_n = padded // tile.cols
    programs = heuristics_tma.programs(cdiv(rows, tile.rows) * tiles_n, device)
    out = empty(rows, padded, dtype=weight.dtype, device=x.device)
    logits = empty(tiles_n, rows, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {"warps": tile.warps, "stages": tile.stages}
    launch(
        project_tma_kernel, (programs,),
        x, x.stride(0), weight, phase, beta, out, logits, rows, inner, outer, padded, programs, scale,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP=tile.group, SPECIAL=form == "specialized", **options,
    )  # fmt: skip
    return Features(out, logits)


def compute(hidden: Tensor, feature_map: FeatureMap, device: Device, form: str, *, beta: Tensor) -> Features:
    """c of ``hidden`` (B ≥ 1, h) in the serving dtype, and partial logits; for maps without a :func:`refusal`."""
    weight, phase = feature_map.projection, feature_map.phase
    assert weight is not None
    assert phase is not None
    serving, scale = feature_map.dtype, feature_map.input_scale
    hidden = hidden.float() if hidden.dtype == torch.float64 else hidden
    foreign = hidden.dtype != serving
    plain = hidden.stride(1) == 1 and hidden.data_ptr() % _ALIGNMENT == 0
    if foreign or not plain or hidden.stride(0) * hidden.element_size() % _ALIGNMENT or hidden.stride(0) == 0:
        hidden = features.copy(hidden, serving, scale=scale if foreign else 1.0).c[:, : weight.shape[1]]
        scale = 1.0 if foreign else scale
    return project(hidden, weight, phase, beta, device, form, scale=scale)
