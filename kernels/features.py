r"""Features: hidden rows → c and the partial sums of βᵀc (design 2.1, 2.2, 2.3).

    t = s x Ωᵀ + phase        c = cos(2πt)  or  t        g = Σ_d β_d c_d
    unfolded heads first:     z = layernorm(act(s x Wᵀ + bias)), then x := z

====  ====================================================================================================
in    x (B, h) fp16/bf16/fp32, unit column stride; Ω (D, h) serving dtype; phase, β (D,) float32; s a power of two
out   c (B, D') serving dtype (float32 on request), D' = D rounded up to 256, zero beyond D;
      logits (parts, B) float32: g without β₀ is their sum over parts, taken in order by the next kernel
bytes 2 (B h + D h + B D), each operand once; FLOP 2 B h D. At B = 4096, h = D = 4096: 101 MB, 137 GFLOP: 174 µs
      at 790 TFLOP/s. At B = 1 the 34 MB of Ω: 7.8 µs at 4.3 TB/s
====  ====================================================================================================

With few rows the reduction is cut: each piece stores its float32 sum, ``join`` adds them in order and finishes.
β multiplies c in float32, before c is rounded. Rows are independent: a non-finite one spoils only itself.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import COSINE, IDENTITY, TANH, after_the_last, cdiv, cos_turns, empty, grouped, halves, launch, tanh
from .heuristics import Device

PAD = 256
"""Columns of c are a multiple of this: whole tiles of every later kernel."""
_ALIGN = 64
_JOIN_ROWS, _JOIN_COLS = 16, 128
_COPY_ROWS, _COPY_COLS = 16, 256
_NORM_COLS = 1024


class FeatureMap(Protocol):
    """What is read of a head's map; ``rmcore.ops.FeatureMap`` is one. These files need torch and triton, nothing else.

    ``projection`` (D, h or m), ``layer_weight`` (m, h) or None in ``dtype``; ``phase``, ``layer_bias`` float32;
    ``cache`` keeps padded copies.
    """

    @property
    def features(self) -> str: ...  # rff or linear
    @property
    def projection(self) -> Tensor | None: ...
    @property
    def phase(self) -> Tensor | None: ...
    @property
    def layer_weight(self) -> Tensor | None: ...
    @property
    def layer_bias(self) -> Tensor | None: ...
    @property
    def activation(self) -> str: ...  # none or tanh
    @property
    def layernorm(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def input_scale(self) -> float: ...
    @property
    def cache(self) -> dict[str, object]: ...


class Features(NamedTuple):
    """c (B, D') and, where β was given, the partial logits (parts, B)."""

    c: Tensor
    logits: Tensor | None


@triton.jit
def _finish_part(
    acc, bias, beta, out, rm, rn, rows, outer, padded, scale,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr,
    CENTRE: tl.constexpr,
):  # fmt: skip
    """Sums → features, stored rounded; returns their share of βᵀc. CENTRE: less those of the first of every so many."""
    value = acc * scale
    inside = rn < outer
    rd = tl.minimum(rn, outer - 1)
    if HAS_BIAS:
        value += tl.load(bias + rd)[None, :]
    if EPILOGUE == COSINE:
        value = cos_turns(value)
    elif EPILOGUE == TANH:
        value = tanh(value) + (value - value)  # tanh saturates; what is infinite must not become a confident answer
    if CENTRE > 1:
        groups = tl.reshape(value, (BM // CENTRE, CENTRE, BN))
        heads = tl.where(tl.arange(0, CENTRE)[None, :, None] == 0, groups, 0.0)
        value = tl.reshape(groups - tl.sum(heads, axis=1, keep_dims=True), (BM, BN))
    value = tl.where(inside[None, :], value, 0.0)
    dot = tl.sum(value * tl.load(beta + rd)[None, :], axis=1) if HAS_BETA else tl.sum(value, axis=1)
    stored = out + rm[:, None].to(tl.int64) * padded + rn[None, :]
    tl.store(stored, value.to(out.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < padded)[None, :])
    return dot


@triton.jit
def _finish_tile(
    acc, bias, beta, out, logits, m, n, rows, outer, padded, scale,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr,
    CENTRE: tl.constexpr,
):  # fmt: skip
    """A tile of sums → features, and their share of βᵀc as row n of ``logits``. A wide tile is done in quarters."""
    rm = m * BM + tl.arange(0, BM)
    if BN > 128:
        PART: tl.constexpr = BN // 4
        rn = n * BN + tl.arange(0, PART)
        left, right = halves(acc, BM, BN)
        first, second = halves(left, BM, BN // 2)
        third, fourth = halves(right, BM, BN // 2)
        dot = _finish_part(
            first, bias, beta, out, rm, rn, rows, outer, padded, scale, BM, PART, EPILOGUE, HAS_BIAS,
            HAS_BETA, CENTRE,
        )  # fmt: skip
        dot += _finish_part(
            second, bias, beta, out, rm, rn + PART, rows, outer, padded, scale, BM, PART, EPILOGUE, HAS_BIAS,
            HAS_BETA, CENTRE,
        )  # fmt: skip
        dot += _finish_part(
            third, bias, beta, out, rm, rn + 2 * PART, rows, outer, padded, scale, BM, PART, EPILOGUE, HAS_BIAS,
            HAS_BETA, CENTRE,
        )  # fmt: skip
        dot += _finish_part(
            fourth, bias, beta, out, rm, rn + 3 * PART, rows, outer, padded, scale, BM, PART, EPILOGUE, HAS_BIAS,
            HAS_BETA, CENTRE,
        )  # fmt: skip
    else:
        rn = n * BN + tl.arange(0, BN)
        dot = _finish_part(
            acc, bias, beta, out, rm, rn, rows, outer, padded, scale, BM, BN, EPILOGUE, HAS_BIAS, HAS_BETA, CENTRE
        )  # fmt: skip
    if HAS_BETA:
        tl.store(logits + n.to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit(do_not_specialize=["rows", "stop_every"])
def project_kernel(
    x, x_stride, weight, bias, beta, out, logits, pieces, counters, rows, inner, outer, padded, stop_every, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    CAST: tl.constexpr, SPLIT: tl.constexpr, ZEROS: tl.constexpr,
    EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, CENTRE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One BM×BN tile of x weightᵀ over ``stop_every`` steps of BK, finished or stored as a piece. BK divides ``inner``.

    CAST multiplies x by ``scale`` before rounding it to the weight's dtype; without it x already has that dtype, and
    scaling the float32 sum by a power of two is the same and more exact. ZEROS counters are zeroed for a later launch.
    """
    after_the_last(PDL)
    if ZEROS > 0:  # noqa: SIM102 (the one is known when compiling)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counters + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    m, n = grouped(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(padded, BN), GROUP)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    # Rows and columns beyond the edge repeat the last one: loads need no mask, and nothing of them is stored.
    xs = x + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * x_stride + rk[None, :]
    ws = weight + tl.minimum(rn, outer - 1).to(tl.int64)[None, :] * inner + rk[:, None]
    start = tl.program_id(1) * stop_every
    stop = tl.minimum(start + stop_every, inner // BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(start, stop):
        k = step * BK
        a = tl.load(xs + k)
        b = tl.load(ws + k)
        if CAST:
            a = (a.to(tl.float32) * scale).to(weight.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if SPLIT:
        place = pieces + (tl.program_id(1).to(tl.int64) * rows + rm[:, None]) * padded + rn[None, :]
        tl.store(place, acc, mask=(rm < rows)[:, None] & (rn < padded)[None, :])
    else:
        _finish_tile(
            acc, bias, beta, out, logits, m, n, rows, outer, padded, 1.0 if CAST else scale,
            BM, BN, EPILOGUE, HAS_BIAS, HAS_BETA, CENTRE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "count"])
def join_kernel(
    pieces, bias, beta, out, logits, rows, outer, padded, count, scale,
    BM: tl.constexpr, BN: tl.constexpr,
    EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, CENTRE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the ``count`` pieces of a tile in order and finish it."""
    after_the_last(PDL)
    m, n = tl.program_id(0), tl.program_id(1)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    place = pieces + rm[:, None].to(tl.int64) * padded + rn[None, :]
    mask = (rm < rows)[:, None] & (rn < padded)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for piece in range(count):
        acc += tl.load(place + piece * rows.to(tl.int64) * padded, mask=mask, other=0.0)
    _finish_tile(
        acc, bias, beta, out, logits, m, n, rows, outer, padded, scale, BM, BN, EPILOGUE, HAS_BIAS, HAS_BETA, CENTRE
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def copy_kernel(
    x, row_stride, col_stride, beta, out, logits, rows, size, padded, scale,
    BM: tl.constexpr, BN: tl.constexpr, HAS_BETA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """s x in rows of ``padded`` columns: linear features without a layer, and strided or foreign rows made plain."""
    after_the_last(PDL)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    place = x + rm[:, None].to(tl.int64) * row_stride + rn[None, :].to(tl.int64) * col_stride
    value = tl.load(place, mask=(rm < rows)[:, None] & (rn < size)[None, :], other=0.0).to(tl.float32) * scale
    stored = out + rm[:, None].to(tl.int64) * padded + rn[None, :]
    tl.store(stored, value.to(out.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < padded)[None, :])
    if HAS_BETA:
        dot = tl.sum(value * tl.load(beta + rn, mask=rn < size, other=0.0)[None, :], axis=1)
        tl.store(logits + tl.program_id(1).to(tl.int64) * rows + rm, dot, mask=rm < rows)


@triton.jit
def layernorm_kernel(
    z, beta, out, logits, size, padded, eps, BN: tl.constexpr, HAS_BETA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(z − mean) / √(var + eps) of one row, without affine part; reads z thrice, from the cache after the first."""
    after_the_last(PDL)
    row = tl.program_id(0)
    source = z + row.to(tl.int64) * padded
    target = out + row.to(tl.int64) * padded
    rn = tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, size, BN):
        total += tl.load(source + start + rn, mask=start + rn < size, other=0.0)
    mean = tl.sum(total, axis=0) / size
    total = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, size, BN):
        centred = tl.load(source + start + rn, mask=start + rn < size, other=0.0) - mean
        total += tl.where(start + rn < size, centred * centred, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(total, axis=0) / size + eps)
    dot = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, padded, BN):
        inside = start + rn < size
        value = (tl.load(source + start + rn, mask=inside, other=0.0) - mean) * inverse
        value = tl.where(inside, value, 0.0)
        tl.store(target + start + rn, value.to(out.dtype.element_ty), mask=start + rn < padded)
        if HAS_BETA:
            dot += value * tl.load(beta + start + rn, mask=inside, other=0.0)
    if HAS_BETA:
        tl.store(logits + row, tl.sum(dot, axis=0))


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    device: Device,
    *,
    epilogue: Any,
    scale: float = 1.0,
    beta: Tensor | None = None,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    centre: int = 0,
) -> Features:
    """epilogue(scale · x weightᵀ + bias): x (B, k), weight (n, k) → (B, n'), by default in the weight's dtype.

    k is a multiple of 64, so that every tile's depth or a half of it divides k and no load needs a mask. ``counters``,
    a power of two of int32, are zeroed on the way. ``centre``, a power of two up to 16 that divides B, takes the result
    of the first row of every so many from them all, in float32 before anything is rounded.
    """
    rows, (outer, inner) = x.shape[0], weight.shape
    padded = cdiv(outer, PAD) * PAD
    tile = heuristics.project(device, weight.element_size(), rows)
    depth = math.gcd(tile.depth, inner)
    steps = inner // depth
    tiles_n = cdiv(padded, tile.cols)
    split = heuristics.splits(tile, device, cdiv(rows, tile.rows) * tiles_n, steps)
    cast = x.dtype != weight.dtype
    out = empty(rows, padded, dtype=dtype or weight.dtype, device=x.device)
    parts = tiles_n if split == 1 else cdiv(padded, _JOIN_COLS)
    logits = None if beta is None else empty(parts, rows, dtype=torch.float32, device=x.device)
    pieces = out if split == 1 else empty(split, rows, padded, dtype=torch.float32, device=x.device)
    flags = {"EPILOGUE": epilogue.value, "HAS_BIAS": bias is not None, "HAS_BETA": beta is not None, "CENTRE": centre}
    tail = (out if bias is None else bias, out if beta is None else beta, out, out if logits is None else logits)
    launch(
        project_kernel,
        (cdiv(rows, tile.rows) * tiles_n, split),
        x, x.stride(0), weight, *tail, pieces, out if counters is None else counters, rows, inner, outer, padded,
        cdiv(steps, split), scale,
        BM=tile.rows, BN=tile.cols, BK=depth, GROUP=tile.group, CAST=cast, SPLIT=split > 1,
        ZEROS=0 if counters is None else counters.shape[0], **flags, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        launch(
            join_kernel,
            (cdiv(rows, _JOIN_ROWS), cdiv(padded, _JOIN_COLS)),
            pieces, *tail, rows, outer, padded, split, 1.0 if cast else scale,
            BM=_JOIN_ROWS, BN=_JOIN_COLS, **flags, warps=4, stages=1,
        )  # fmt: skip
    return Features(out, logits)


def copy(x: Tensor, dtype: torch.dtype, *, scale: float = 1.0, beta: Tensor | None = None) -> Features:
    """scale · x, any strides → (B, k') in ``dtype``."""
    rows, size = x.shape
    padded = cdiv(size, PAD) * PAD
    blocks = cdiv(padded, _COPY_COLS)
    out = empty(rows, padded, dtype=dtype, device=x.device)
    logits = None if beta is None else empty(blocks, rows, dtype=torch.float32, device=x.device)
    launch(
        copy_kernel,
        (cdiv(rows, _COPY_ROWS), blocks),
        x, x.stride(0), x.stride(1), out if beta is None else beta, out, out if logits is None else logits,
        rows, size, padded, scale,
        BM=_COPY_ROWS, BN=_COPY_COLS, HAS_BETA=beta is not None, warps=4, stages=1,
    )  # fmt: skip
    return Features(out, logits)


def layernorm(z: Tensor, size: int, dtype: torch.dtype, *, beta: Tensor | None = None, eps: float = 1e-5) -> Features:
    """Row layer norm of the first ``size`` columns of z (B, k') float32 → (B, k') in ``dtype``."""
    rows, padded = z.shape
    out = empty(rows, padded, dtype=dtype, device=z.device)
    logits = None if beta is None else empty(1, rows, dtype=torch.float32, device=z.device)
    launch(
        layernorm_kernel,
        (rows,),
        z, out if beta is None else beta, out, out if logits is None else logits, size, padded, eps,
        BN=_NORM_COLS, HAS_BETA=beta is not None, warps=4, stages=1,
    )  # fmt: skip
    return Features(out, logits)


def features(
    hidden: Tensor,
    feature_map: FeatureMap,
    device: Device,
    *,
    beta: Tensor | None = None,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    centre: int = 0,
) -> Features:
    """c of ``hidden`` (B ≥ 1, h) in ``dtype`` (default: the serving dtype), and partial logits where β is given.

    ``counters`` are zeroed by the first product, which is a launch before whatever counts. ``centre`` as in
    :func:`project`, for maps that end in a projection.
    """
    assert counters is None or multiplies(feature_map), "nothing would zero them"
    assert not centre or feature_map.projection is not None, "the last kernel would not centre"
    serving = feature_map.dtype
    scale = feature_map.input_scale
    layer, projection = feature_map.layer_weight, feature_map.projection
    if hidden.dtype == torch.float64:
        hidden = hidden.float()
    if layer is None and projection is None:
        return copy(hidden, dtype or serving, scale=scale, beta=beta)
    foreign = hidden.dtype != serving
    weight = _aligned(feature_map, "projection" if layer is None else "layer_weight")
    if _needs_copy(hidden, weight.shape[1], foreign):
        hidden = copy(hidden, serving, scale=scale if foreign else 1.0).c[:, : weight.shape[1]]
        scale = 1.0 if foreign else scale
    if layer is not None:
        last = projection is None
        head: dict[str, Any] = {"beta": beta, "dtype": dtype or serving} if last else {"dtype": serving}
        act = TANH if feature_map.activation == "tanh" else IDENTITY
        bias = feature_map.layer_bias
        if feature_map.layernorm:
            z = project(hidden, weight, bias, device, epilogue=act, scale=scale, dtype=torch.float32, counters=counters)
            result = layernorm(z.c, layer.shape[0], head.pop("dtype"), **head)
        else:
            result = project(hidden, weight, bias, device, epilogue=act, scale=scale, counters=counters, **head)
        counters = None
        if last:
            return result
        weight = _aligned(feature_map, "projection")
        hidden, scale = result.c[:, : weight.shape[1]], 1.0
    act = COSINE if feature_map.features == "rff" else IDENTITY
    return project(
        hidden, weight, feature_map.phase, device, epilogue=act, scale=scale, beta=beta, dtype=dtype or serving,
        counters=counters, centre=centre,
    )  # fmt: skip


def multiplies(feature_map: FeatureMap) -> bool:
    """Whether features take a product with weights, and not a copy of the rows alone."""
    return feature_map.layer_weight is not None or feature_map.projection is not None


def _needs_copy(hidden: Tensor, columns: int, foreign: bool) -> bool:
    """Whether rows are first written out plain: for 16-byte loads, unit stride, enough columns, one conversion."""
    aligned = hidden.data_ptr() % 16 == 0 and hidden.stride(0) * hidden.element_size() % 16 == 0
    many = foreign and hidden.shape[0] >= heuristics.STAGED_ROWS
    return many or hidden.stride(1) != 1 or not aligned or hidden.shape[1] != columns


def _aligned(feature_map: FeatureMap, name: str) -> Tensor:
    """A weight of the map, its rows a multiple of 64 elements long; a padded copy is made once where they are not."""
    weight: Tensor = getattr(feature_map, name)
    odd = weight.shape[1] % _ALIGN != 0
    kept = feature_map.cache.get(f"triton.{name}")
    if not odd or isinstance(kept, Tensor):
        return kept if isinstance(kept, Tensor) else weight
    padded = torch.nn.functional.pad(weight, (0, cdiv(weight.shape[1], PAD) * PAD - weight.shape[1]))
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):  # or it would hold a graph's memory
        feature_map.cache[f"triton.{name}"] = padded
    return padded
