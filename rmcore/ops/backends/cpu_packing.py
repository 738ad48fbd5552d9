"""Weights as the CPU's kernels read them: column panels, kept in the head's ``cache`` beside the canonical tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.weights import FeatureMap, HeadWeights

try:
    from rmcore import _cpu
except ImportError:  # pragma: no cover - a build without the native module
    _cpu = None

__all__ = [
    "NAMES",
    "address_of",
    "aligned",
    "large",
    "packed_attributes",
    "packed_head",
    "packed_map",
    "padded",
    "round_up",
]

_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20

NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
"""Of the dtypes that rows come in, as the kernels call them."""
WEIGHT_NAMES = {**NAMES, torch.int8: "int8"}


@dataclass(frozen=True)
class _Packed:
    """A native view and what its pointers lead to."""

    view: Any
    owners: tuple[Tensor | _Packed | None, ...]


_packing = threading.RLock()
"""Threads that meet at a new head pack it once: a second copy would free the first under a call that reads it."""


def aligned(nbytes: int, alignment: int = _ALIGNMENT) -> Tensor:
    """An uninitialised uint8 tensor of ``nbytes`` whose address is a multiple of ``alignment``."""
    raw = torch.empty(nbytes + alignment, dtype=torch.uint8)
    start = -raw.data_ptr() % alignment
    return raw[start : start + nbytes]


def large(nbytes: int) -> Tensor:
    """The same for what is read in long runs: on huge pages where there is more than one of them to fill."""
    if nbytes < _HUGE_PAGE:
        return aligned(nbytes)
    tensor = aligned(nbytes, _HUGE_PAGE)
    _cpu.advise_huge(tensor.data_ptr(), nbytes)
    return tensor


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is no less than ``value``."""
    return -(-value // multiple) * multiple


def _panels(matrix: Tensor | None) -> Tensor | None:
    """(N, K) as panels of 64 output columns (csrc/cpu/pack.cpp)."""
    if matrix is None:
        return None
    matrix = matrix.contiguous()
    rows, cols = matrix.shape
    panels = large(round_up(rows, _cpu.PANEL) * round_up(cols, 4) * matrix.element_size())
    _cpu.pack_panels(
        matrix.data_ptr(), WEIGHT_NAMES[matrix.dtype], rows, cols, panels.data_ptr(), torch.get_num_threads()
    )
    return panels


def _factor_panels(weights: HeadWeights) -> Tensor:
    """The packed tiles of U as triangular panels (csrc/cpu/pack.cpp)."""
    tiles, count = weights.factor.contiguous(), -(-weights.num_features // _cpu.PANEL)
    panels = large(_cpu.PANEL**2 * (count * (count + 1) // 2) * tiles.element_size())
    _cpu.pack_factor(
        tiles.data_ptr(), WEIGHT_NAMES[tiles.dtype], weights.num_features, panels.data_ptr(), torch.get_num_threads()
    )
    return panels


def padded(vector: Tensor | None, size: int) -> Tensor:
    """``vector`` (zeros where None) in float32, zero-padded to whole panels."""
    padded = torch.zeros(round_up(size, _cpu.PANEL))
    if vector is not None:
        padded[:size] = vector
    return padded


def _row_sums(whole: Tensor | None) -> Tensor | None:
    """Σ of each int8 row, zero-padded to whole panels."""
    if whole is None or whole.dtype != torch.int8:
        return None
    sums = torch.zeros(round_up(whole.shape[0], _cpu.PANEL), dtype=torch.int32)
    sums[: whole.shape[0]] = whole.sum(dim=1, dtype=torch.int32)
    return sums


def _far_pairs(whole: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where two neighbours of an int8 row have one sign and add up to more than 128 (csrc/cpu/saturation.h).

    Returns where each row's begin, padded to whole panels, and where the last one's end; and the pairs: k / 2, weights.
    """
    if whole is None or whole.dtype != torch.int8:
        return None, None
    rows, columns = whole.shape
    even = torch.nn.functional.pad(whole, (0, columns % 2)).view(rows, -1, 2)
    row, pair = torch.nonzero(even.sum(2, dtype=torch.int16).abs() > 128, as_tuple=True)
    first = torch.zeros(round_up(rows, _cpu.PANEL) + 1, dtype=torch.int64)
    first[1:] = torch.bincount(row, minlength=len(first) - 1).cumsum(0)
    pairs = torch.zeros(len(pair) + _cpu.FAR_AHEAD, 4, dtype=torch.int16)
    pairs[: len(pair), :2] = pair.int().view(torch.int16).view(-1, 2)
    pairs[: len(pair), 2:] = even[row, pair]
    return first, pairs


def address_of(tensor: Tensor | None) -> int:
    """Where its first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _once(cache: dict[str, object], pack: Callable[[], _Packed]) -> _Packed:
    packed = cache.get("cpu")
    if not isinstance(packed, _Packed):
        with _packing:
            packed = cache.get("cpu")
            if not isinstance(packed, _Packed):
                packed = cache["cpu"] = pack()
    return packed


def _pack_map(feature_map: FeatureMap) -> _Packed:
    layer, projection = _panels(feature_map.layer_weight), _panels(feature_map.projection)
    size = 0 if feature_map.layer_weight is None else feature_map.layer_weight.shape[0]
    bias = None if layer is None else padded(feature_map.layer_bias, size)
    phase = None if projection is None else padded(feature_map.phase, feature_map.num_features)
    scale, sums = None, _row_sums(feature_map.projection)
    far_first, far_pairs = _far_pairs(feature_map.projection)
    if feature_map.projection_scale is not None:
        scale = padded(feature_map.projection_scale, feature_map.num_features)
    shift, balance = feature_map.hidden_shift, feature_map.hidden_scale
    view = _cpu.Map(
        dtype=WEIGHT_NAMES[feature_map.dtype],
        cosine=feature_map.features == "rff",
        tanh=feature_map.activation == "tanh",
        layernorm=feature_map.layernorm,
        hidden=feature_map.hidden_size,
        layer_size=size,
        features=feature_map.num_features,
        layer=address_of(layer),
        layer_bias=address_of(bias),
        projection=address_of(projection),
        phase=address_of(phase),
        input_scale=feature_map.input_scale,
        projection_scale=address_of(scale),
        projection_sum=address_of(sums),
        projection_far_first=address_of(far_first),
        projection_far_pairs=address_of(far_pairs),
        hidden_shift=address_of(shift),
        hidden_scale=address_of(balance),
    )
    return _Packed(view, (layer, bias, projection, phase, scale, sums, far_first, far_pairs, shift, balance))


def _pack_head(weights: HeadWeights) -> _Packed:
    feature_map = _once(weights.map.cache, lambda: _pack_map(weights.map))
    beta, factor = padded(weights.beta, weights.num_features), _factor_panels(weights)
    scale, sums, far_first, far_pairs, diagonal = None, None, None, None, None
    if weights.factor_row_scale is not None:
        diagonal = padded(weights.factor_diagonal, weights.num_features)
        scale = padded(weights.factor_row_scale, weights.num_features)
        whole = reference.unpack_lower(weights.factor, weights.num_features)
        sums, (far_first, far_pairs) = _row_sums(whole), _far_pairs(whole)
    view = _cpu.Head(
        map=feature_map.view,
        beta=beta.data_ptr(),
        factor=factor.data_ptr(),
        beta0=weights.beta0,
        factor_scale=weights.factor_scale,
        amplitude=weights.amplitude,
        factor_row_scale=address_of(scale),
        factor_row_sum=address_of(sums),
        factor_far_first=address_of(far_first),
        factor_far_pairs=address_of(far_pairs),
        factor_diagonal=address_of(diagonal),
    )
    return _Packed(view, (feature_map, beta, factor, scale, sums, far_first, far_pairs, diagonal))


def _stacked(weight: Tensor) -> Tensor:
    """(M, n, k) as (M · n', k), n' = n rounded up to whole panels."""
    padding = -weight.shape[1] % _cpu.PANEL
    return torch.nn.functional.pad(weight, (0, 0, 0, padding)).flatten(0, 1) if padding else weight.flatten(0, 1)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def _pack_attributes(weights: AttributeWeights) -> _Packed:
    value = _panels(weights.value.flatten(0, 1))
    layers = [_panels(_stacked(layer)) for layer in weights.layers]
    padding = [-layer.shape[1] % _cpu.PANEL for layer in weights.layers]
    biases = [torch.nn.functional.pad(b, (0, n)).contiguous() for b, n in zip(weights.biases, padding, strict=True)]
    last, offset = None, weights.fixed
    if weights.last is not None:
        last, offset = torch.nn.functional.pad(weights.last, (0, padding[-1])).contiguous(), weights.last_bias
    widths = torch.tensor([layer.shape[1] for layer in weights.layers], dtype=torch.int64)
    kept = [layer for layer in layers if layer is not None]
    tables = widths, _addresses(kept), _addresses(biases)
    view = _cpu.AttributeHead(
        dtype=WEIGHT_NAMES[weights.dtype],
        hidden=weights.hidden_size,
        members=weights.members,
        attributes=weights.attributes,
        per=weights.per,
        normal=weights.spread == "normal",
        softmax=weights.softmax,
        temperature=weights.temperature,
        input_scale=weights.input_scale,
        value=address_of(value),
        depth=len(kept),
        widths=address_of(tables[0] if kept else None),
        layers=address_of(tables[1] if kept else None),
        biases=address_of(tables[2] if kept else None),
        last=address_of(last),
        offset=address_of(offset),
        softmax_scale=address_of(weights.scale),
    )
    return _Packed(view, (value, *kept, *biases, last, offset, weights.scale, *tables))


def packed_map(feature_map: FeatureMap) -> Any:
    """What the kernels take for a feature map, packed at its first call."""
    return _once(feature_map.cache, lambda: _pack_map(feature_map)).view


def packed_head(weights: HeadWeights) -> Any:
    """What the kernels take for a head, packed at its first call."""
    return _once(weights.cache, lambda: _pack_head(weights)).view


def packed_attributes(weights: AttributeWeights) -> Any:
    """What ``_cpu.score_attributes`` takes for these heads, packed at their first call."""
    return _once(weights.cache, lambda: _pack_attributes(weights)).view
