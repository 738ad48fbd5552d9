r"""Multi-attribute reward heads: M value heads, their gates and their disagreement (design 6).

    o = V x        z ← act(W_l z + b_l), l = 1 … L, z = x        w = last z + offset        (each of M heads)
    r = Σ_k w_k μ_k        s = Σ_k w_k² σ_k²        mean r, mean s, var r, max r − min r, max √(Σ_k σ_k⁴)

====  ====================================================================================================
in    x (B, h) fp16/bf16/fp32, and rows that gates read where they are others; V (M A per, h), W_l (M, n_l, n_{l−1})
      serving dtype; last (M, A, n_L), biases float32
out   summary (5, B), o (B, M, A per), w (B, M, A), float32
bytes 2 (B h + M (A per h + Σ n_l n_{l−1}) + 2 B Σ_{l<L} n_l), FLOP 2 B M (…) with the same sum. One head with two
      layers of h = 4096 in 16 bits: 67 MB, 22 µs at 3.0 TB/s; at B = 4096 275 GFLOP, 345 µs at 798 TFLOP/s
====  ====================================================================================================

A launch a layer, and one to finish. The first multiplies x with all value heads and all first layers at once, so rows
are read once however many heads there are. Activations of a gate's last hidden layer are never stored: their tile meets
``last`` in float32 and leaves A sums a row, which the last launch adds in order. SELU is λ (max(z, 0) + α (e^min(z, 0)
− 1)); z − z is added to every activation: both saturate below, and what is infinite must not become a confident answer.
"""

import math
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import cdiv, empty, grouped, halves, launch, power_of_two
from .features import _ALIGN, PAD, _needs_copy, copy
from .heuristics import Device, Tile

_SELU = tl.constexpr(1.0507009873554805)  # λ
_SELU_LOW = tl.constexpr(1.7580993408473766)  # λ α
_FINISH_ROWS = 16
_WIDE = ("sm90", "interpreter")
"""Devices whose compiled layers fit a tile of 256 columns (tests/kernels/compile_triton.py)."""


class Heads(Protocol):
    """What is read of the heads; ``rmcore.ops.AttributeWeights`` is one."""

    @property
    def value(self) -> Tensor: ...  # (M, A per, h)
    @property
    def spread(self) -> str: ...  # normal or quantiles
    @property
    def per(self) -> int: ...
    @property
    def fixed(self) -> Tensor | None: ...  # (M, A)
    @property
    def layers(self) -> tuple[Tensor, ...]: ...
    @property
    def biases(self) -> tuple[Tensor, ...]: ...
    @property
    def last(self) -> Tensor | None: ...
    @property
    def last_bias(self) -> Tensor | None: ...
    @property
    def softmax(self) -> bool: ...
    @property
    def temperature(self) -> float: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def input_scale(self) -> float: ...
    @property
    def cache(self) -> dict[str, object]: ...


class Layer(NamedTuple):
    """One launch: ``values`` rows of value heads, then ``gates`` times ``width`` rows; zeros fill up whole tiles."""

    weight: Tensor  # (values + gates width, k)
    bias: Tensor  # (values + gates width,) float32
    values: int
    gates: int
    width: int


class Packed(NamedTuple):
    """The launches, and the output layer (M, A, width) of the gates; its offsets are the fixed weights without one."""

    layers: list[Layer]
    last: Tensor | None
    offset: Tensor


@triton.jit
def _activation(z, RELU: tl.constexpr):
    if RELU:
        return tl.maximum(z, 0.0) + (z - z)
    return _SELU * tl.maximum(z, 0.0) + _SELU_LOW * (tl.exp(tl.minimum(z, 0.0)) - 1.0) + (z - z)


@triton.jit
def _finish(
    acc, to, rm, at, rows, columns, values, width, members, attributes,
    BM: tl.constexpr, BN: tl.constexpr, RELU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sums of columns at … at + BN → outputs of value heads, a gate's activations, or what those add to its weights."""
    outputs, bias, out, last, parts = to
    rn = at + tl.arange(0, BN)
    column = at - values
    valued, gated = tl.where(column < 0, rows, 0), tl.where(column < 0, 0, rows)  # of whichever it is, all rows
    place = outputs + rm[:, None].to(tl.int64) * columns + rn[None, :]
    tl.store(place, acc, mask=(rm < valued)[:, None] & (rn < columns)[None, :])
    z = _activation(acc + tl.load(bias + rn)[None, :], RELU)
    if LAST:
        member = tl.maximum(column, 0) // width
        within = tl.maximum(column, 0) - member * width
        sums = parts + (((within // BN).to(tl.int64) * rows + rm) * members + member) * attributes
        weights = last + member.to(tl.int64) * attributes * width + within + tl.arange(0, BN)
        for a in range(attributes):
            tl.store(sums + a, tl.sum(z * tl.load(weights + a * width)[None, :], axis=1), mask=rm < gated)
    else:
        stored = out + rm[:, None].to(tl.int64) * (members * width) + (rn - values)[None, :]
        tl.store(stored, z.to(out.dtype.element_ty), mask=(rm < gated)[:, None])


@triton.jit(do_not_specialize=["rows", "values"])
def gate_kernel(
    x, x_stride, x_member, weight, bias, outputs, out, last, parts, rows, inner, columns, values, width, gates, members,
    attributes, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    CAST: tl.constexpr, RELU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One BM×BN tile of x weightᵀ: outputs of value heads, or a gate's layer. BK divides ``inner``, BN ``width``.

    CAST multiplies x by ``scale`` before rounding it to the weight's dtype; without it the sum is scaled. ``x_member``:
    columns of x from one gate's input to the next one's, 0 where all read the same. LAST: the layer goes into sums with
    ``last``, (tiles of a gate, B, M, A), and is not stored.
    """
    tiles = values + gates * width
    m, n = grouped(tl.program_id(0), tl.cdiv(rows, BM), tiles // BN, GROUP)
    rm = m * BM + tl.arange(0, BM)
    rn = n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    member = tl.maximum(n * BN - values, 0) // width
    # Rows beyond the edge repeat the last one: loads need no mask, and nothing of them is stored.
    xs = x + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * x_stride + (member * x_member + rk)[None, :]
    ws = weight + rn.to(tl.int64)[None, :] * inner + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(inner // BK):
        k = step * BK
        a = tl.load(xs + k)
        b = tl.load(ws + k)
        if CAST:
            a = (a.to(tl.float32) * scale).to(weight.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if not CAST:
        acc *= scale
    to = outputs, bias, out, last, parts
    at = n * BN
    if BN > 128:  # in quarters, which take fewer registers
        PART: tl.constexpr = BN // 4
        left, right = halves(acc, BM, BN)
        one, two = halves(left, BM, BN // 2)
        three, four = halves(right, BM, BN // 2)
        _finish(one, to, rm, at, rows, columns, values, width, members, attributes, BM, PART, RELU, LAST)
        _finish(two, to, rm, at + PART, rows, columns, values, width, members, attributes, BM, PART, RELU, LAST)
        _finish(three, to, rm, at + 2 * PART, rows, columns, values, width, members, attributes, BM, PART, RELU, LAST)
        _finish(four, to, rm, at + 3 * PART, rows, columns, values, width, members, attributes, BM, PART, RELU, LAST)
    else:
        _finish(acc, to, rm, at, rows, columns, values, width, members, attributes, BM, BN, RELU, LAST)


@triton.jit(do_not_specialize=["rows", "tiles", "members", "attributes", "per"])
def attributes_kernel(
    outputs, parts, offset, softmax_scale, summary, weights, rows, tiles, members, attributes, per, temperature,
    BM: tl.constexpr, BA: tl.constexpr, NORMAL: tl.constexpr, SOFTMAX: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Sums and outputs of BM rows → weights, each head's reward and variance, and the summary of all heads."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    ra = tl.arange(0, BA)
    here = (rm < rows)[:, None] & (ra < attributes)[None, :]
    row = rm[:, None].to(tl.int64)
    zeros = tl.zeros((BM,), dtype=tl.float32)
    mean, variance, norm, spoilt = zeros, zeros, zeros, zeros
    first, total, squares = zeros, zeros, zeros  # of rewards less the first, which keeps their differences exact
    low, high = zeros, zeros
    for member in range(members):
        gate = offset + member * attributes + ra
        w = tl.load(gate, mask=ra < attributes, other=0.0)[None, :] + tl.zeros((BM, BA), dtype=tl.float32)
        for tile in range(tiles):
            place = ((tile * rows.to(tl.int64) + row) * members + member) * attributes + ra[None, :]
            w += tl.load(parts + place, mask=here, other=0.0)
        if SOFTMAX:
            w = tl.where((ra < attributes)[None, :], w / temperature, float("-inf"))
            w = tl.exp(w - tl.max(w, axis=1, keep_dims=True))
            w = w / tl.sum(w, axis=1, keep_dims=True)
            if SCALED:
                w *= tl.load(softmax_scale + member)
        w = tl.where((ra < attributes)[None, :], w, 0.0)
        tl.store(weights + (row * members + member) * attributes + ra[None, :], w, mask=here)
        place = outputs + ((row * members + member) * attributes + ra[None, :]) * per
        reward, own, size = zeros, zeros, zeros
        if NORMAL:
            sigma = tl.where(here, tl.exp(tl.load(place + 1, mask=here, other=0.0)), 0.0)
            square = sigma * sigma
            reward = tl.sum(w * tl.load(place, mask=here, other=0.0), axis=1)
            own = tl.sum(w * w * square, axis=1)
            size = tl.sqrt(tl.sum(square * square, axis=1))
        else:
            for j in range(per):
                reward += tl.sum(w * tl.load(place + j, mask=here, other=0.0), axis=1)
            reward = reward / per
            for j in range(per):
                apart = tl.sum(w * tl.load(place + j, mask=here, other=0.0), axis=1) - reward
                own += apart * apart
            own = own / per
            size = zeros + float("nan")
        first = tl.where(member == 0, reward, first)
        low = tl.where((member == 0) | (reward < low), reward, low)
        high = tl.where((member == 0) | (reward > high), reward, high)
        norm = tl.where((size > norm) | (size != size), size, norm)
        mean += reward
        variance += own
        total += reward - first
        squares += (reward - first) * (reward - first)
        spoilt += reward - reward
    spread = tl.maximum(squares - total * total / members, 0.0)
    epistemic = spread / tl.maximum(members - 1, 1) + spoilt
    inside = rm < rows
    tl.store(summary + rm, mean / members, mask=inside)
    tl.store(summary + rows + rm, variance / members, mask=inside)
    tl.store(summary + 2 * rows + rm, epistemic, mask=inside)
    tl.store(summary + 3 * rows + rm, high - low + spoilt, mask=inside)
    tl.store(summary + 4 * rows + rm, norm, mask=inside)


def score(
    hidden: Tensor, gate_hidden: Tensor | None, heads: Heads, summary: Tensor, outputs: Tensor, weights: Tensor,
    device: Device,
) -> None:  # fmt: skip
    """Fill summary (5, B), outputs (B, M A per) and weights (B, M A), which are contiguous; B ≥ 1."""
    members, rows = heads.value.shape[0], hidden.shape[0]
    columns = members * heads.value.shape[1]
    attributes = heads.value.shape[1] // heads.per
    packed = _packed(heads)
    first, deeper = packed.layers[0], packed.layers[1:]
    element = first.weight.element_size()
    depth = len(packed.layers) if first.gates else 0
    tiles = packed.layers[-1].width // _tile(device, element, rows, True).cols if depth else 0
    parts = empty(max(tiles, 1), rows, members, attributes, dtype=torch.float32, device=hidden.device)

    def run(layer: Layer, x: Tensor, x_member: int, scale: float, last: bool) -> Tensor:
        cut = _tile(device, element, rows, last)
        out = outputs  # where nothing of the layer is stored
        if layer.gates and not last:
            out = empty(rows, members * layer.width, dtype=layer.weight.dtype, device=hidden.device)
        inner, cast = layer.weight.shape[1], x.dtype != layer.weight.dtype
        launch(
            gate_kernel, (cdiv(rows, cut.rows) * ((layer.values + layer.gates * layer.width) // cut.cols),),
            x, x.stride(0), x_member, layer.weight, layer.bias, outputs, out,
            outputs if packed.last is None else packed.last, parts, rows, inner, columns, layer.values, layer.width,
            layer.gates, members, attributes, scale,
            BM=cut.rows, BN=cut.cols, BK=math.gcd(cut.depth, inner), GROUP=cut.group, CAST=cast,
            RELU=heads.softmax, LAST=last, warps=cut.warps, stages=cut.stages,
        )  # fmt: skip
        return out

    x, scale = _plain(hidden, first.weight, heads.input_scale)
    if gate_hidden is None:
        x = run(first, x, 0, scale, depth == 1)
    else:  # rows of their own: a launch each
        run(first._replace(gates=0), x, 0, scale, False)
        x, scale = _plain(gate_hidden, first.weight, heads.input_scale)
        gates = first._replace(weight=first.weight[first.values :], bias=first.bias[first.values :], values=0)
        x = run(gates, x, 0, scale, depth == 1)
    for k, layer in enumerate(deeper):
        x = run(layer, x, packed.layers[k].width, 1.0, k + 2 == depth)
    launch(
        attributes_kernel, (cdiv(rows, _FINISH_ROWS),),
        outputs, parts, packed.offset, packed.offset if heads.scale is None else heads.scale, summary, weights,
        rows, tiles, members, attributes, heads.per, heads.temperature,
        BM=_FINISH_ROWS, BA=power_of_two(attributes), NORMAL=heads.spread == "normal",
        SOFTMAX=heads.softmax and depth > 0, SCALED=heads.scale is not None,
        warps=2 if device.kind in ("sm80", "portable") else 4, stages=1,  # Triton 3.6 spills 16 bytes of 4 on sm_80
    )  # fmt: skip


def _tile(device: Device, element: int, rows: int, last: bool) -> Tile:
    """The tile of a layer: a plain product's, or one that leaves activation and last sums more registers: narrower in
    16 bits; in 32 of more threads, or less deep.
    """
    tile = heuristics.project(device, element, rows)
    if element == 4:
        return tile._replace(warps=8) if tile.rows < 64 else heuristics.product(device, element, rows)
    if last and tile.rows > 64 and device.kind not in ("sm90", "sm100", "interpreter"):
        return heuristics.product(device, element, 64)
    narrow = tile.cols > 128 and (last or device.kind not in _WIDE)
    return heuristics.product(device, element, 512) if narrow else tile


def _plain(hidden: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, float]:
    """Rows as wide as the weights', with 16-byte loads, and what is left to multiply them with."""
    if hidden.dtype == torch.float64:
        hidden = hidden.float()
    foreign = hidden.dtype != weight.dtype
    if not _needs_copy(hidden, weight.shape[1], foreign):
        return hidden, scale
    plain = copy(hidden, weight.dtype, scale=scale if foreign else 1.0).c[:, : weight.shape[1]]
    return plain, 1.0 if foreign else scale


def _packed(heads: Heads) -> Packed:
    """The heads as the launches take them, made once. What needs no zeros beside it is not copied."""
    kept = heads.cache.get("triton")
    if isinstance(kept, Packed):
        return kept
    members, _, size = heads.value.shape
    values = heads.value.flatten(0, 1)
    inner = size if size % _ALIGN == 0 else _whole(size)
    layers = []
    for k, (weight, bias) in enumerate(zip(heads.layers, heads.biases, strict=True)):
        width = _whole(weight.shape[1])
        rows, offset = _padded(weight, width, inner).flatten(0, 1), _padded(bias, width).flatten()
        before = 0
        if k == 0:
            rows, offset, before = _behind(values, rows, offset)
        layers.append(Layer(rows, offset, before, members, width))
        inner = width
    if not layers:
        nothing = values.new_zeros(0, inner)
        rows, offset, before = _behind(values, nothing, nothing.new_zeros(0, dtype=torch.float32))
        layers.append(Layer(rows, offset, before, 0, PAD))
    last = None if heads.last is None else _padded(heads.last, inner)
    offsets = heads.fixed if heads.last is None else heads.last_bias
    assert offsets is not None
    made = Packed(layers, last, offsets)
    if not (values.is_cuda and torch.cuda.is_current_stream_capturing()):  # or it would hold a graph's memory
        heads.cache["triton"] = made
    return made


def _whole(size: int) -> int:
    return cdiv(size, PAD) * PAD


def _padded(tensor: Tensor, *sizes: int) -> Tensor:
    """With zeros up to these last sizes."""
    ends = tuple(zip(sizes, tensor.shape[-len(sizes) :], strict=True))
    if all(size == held for size, held in ends):
        return tensor
    return torch.nn.functional.pad(tensor, [n for size, held in reversed(ends) for n in (0, size - held)])


def _behind(values: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, int]:
    """A first layer behind the value heads: the rows of both, their bias, and where the layer begins."""
    before = _whole(values.shape[0])
    head = _padded(values, before, rows.shape[1])
    return torch.cat([head, rows]), torch.cat([bias.new_zeros(before), bias]), before
