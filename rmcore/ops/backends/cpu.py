"""The ``cpu`` backend: fused, multi-threaded kernels over ``rmcore._cpu`` (csrc/cpu), ISA chosen at run time.

What to know as a caller:

- Threads follow ``torch.get_num_threads()`` at each call. Results do not depend on it: every sum has one order. A row's
  scores (a group's pairs) do not depend on what else is in the call; the sums of ``accumulate`` do, in their rounding.
  Results depend on the instruction set (``RMCORE_CPU_ISA``).
- bf16 heads on a CPU with AVX-512 bf16 dot products multiply hidden rows and c rounded to bf16; float32 and fp16 rows
  are taken in two bf16 terms where 2 h ≤ D, which costs little there. On every other CPU, and for fp16 and fp32 heads
  everywhere, rows and c stay float32. So fp16 is the accurate 16-bit head here and bf16 the fast one.
- int8 heads round hidden rows and c to whole numbers too, with a factor a row, on every CPU. Their sums are exact
  integers, by 8-bit dot products (AVX-512 VNNI), or by 8- and 16-bit multiplications: every CPU finds the same.
- float64 rows are computed in float32; for float64 arithmetic use the ``torch`` backend.
- The first call with a head packs its weights into column panels kept in ``cache``: the head then exists twice in
  memory, canonical and packed.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights
from rmcore.ops.pair_layout import PairLayout
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import SERVING_DTYPES, FeatureMap, HeadWeights

try:
    from rmcore import _cpu
except ImportError as error:  # pragma: no cover - a build without the native module
    _cpu = None
    _missing = str(error)

__all__ = ["accumulate", "pair_variance", "power_iteration", "score", "score_attributes", "unavailable"]

_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20
_FEATURE_BYTES = 1 << 29
"""Pairs mode keeps c of this many bytes at a time; beyond it the pairs are taken in runs, and rows once per run."""

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
_WEIGHT_NAMES = {**_NAMES, torch.int8: "int8"}


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here for weights in ``dtype`` on ``device``, or None."""
    if _cpu is None:
        return f"rmcore._cpu was not built ({_missing})"
    if not hasattr(_cpu, op):
        return "rmcore._cpu is from an older build; install again"
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in SERVING_DTYPES:
        return f"no kernel for {dtype} weights"
    return None


# -- packed weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """A native view and what its pointers lead to."""

    view: Any
    owners: tuple[Tensor | _Packed | None, ...]


_packing = threading.RLock()
"""Threads that meet at a new head pack it once: a second copy would free the first under a call that reads it."""


def _aligned(nbytes: int, alignment: int = _ALIGNMENT) -> Tensor:
    """An uninitialised uint8 tensor of ``nbytes`` whose address is a multiple of ``alignment``."""
    raw = torch.empty(nbytes + alignment, dtype=torch.uint8)
    start = -raw.data_ptr() % alignment
    return raw[start : start + nbytes]


def _large(nbytes: int) -> Tensor:
    # Panels are read in long runs: on huge pages where there is more than one of them to fill.
    if nbytes < _HUGE_PAGE:
        return _aligned(nbytes)
    tensor = _aligned(nbytes, _HUGE_PAGE)
    _cpu.advise_huge(tensor.data_ptr(), nbytes)
    return tensor


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _panels(matrix: Tensor | None) -> Tensor | None:
    """(N, K) as panels of 64 output columns (csrc/cpu/pack.cpp)."""
    if matrix is None:
        return None
    matrix = matrix.contiguous()
    rows, cols = matrix.shape
    panels = _large(_round_up(rows, _cpu.PANEL) * _round_up(cols, 4) * matrix.element_size())
    _cpu.pack_panels(
        matrix.data_ptr(), _WEIGHT_NAMES[matrix.dtype], rows, cols, panels.data_ptr(), torch.get_num_threads()
    )
    return panels


def _factor_panels(weights: HeadWeights) -> Tensor:
    """The packed tiles of U as triangular panels (csrc/cpu/pack.cpp)."""
    tiles, count = weights.factor.contiguous(), -(-weights.num_features // _cpu.PANEL)
    panels = _large(_cpu.PANEL**2 * (count * (count + 1) // 2) * tiles.element_size())
    _cpu.pack_factor(
        tiles.data_ptr(), _WEIGHT_NAMES[tiles.dtype], weights.num_features, panels.data_ptr(), torch.get_num_threads()
    )
    return panels


def _padded(vector: Tensor | None, size: int) -> Tensor:
    """``vector`` (zeros where None) in float32, zero-padded to whole panels."""
    padded = torch.zeros(_round_up(size, _cpu.PANEL))
    if vector is not None:
        padded[:size] = vector
    return padded


def _row_sums(whole: Tensor | None) -> Tensor | None:
    """Σ of each int8 row, zero-padded to whole panels."""
    if whole is None or whole.dtype != torch.int8:
        return None
    sums = torch.zeros(_round_up(whole.shape[0], _cpu.PANEL), dtype=torch.int32)
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
    first = torch.zeros(_round_up(rows, _cpu.PANEL) + 1, dtype=torch.int64)
    first[1:] = torch.bincount(row, minlength=len(first) - 1).cumsum(0)
    pairs = torch.zeros(len(pair) + _cpu.FAR_AHEAD, 4, dtype=torch.int16)
    pairs[: len(pair), :2] = pair.int().view(torch.int16).view(-1, 2)
    pairs[: len(pair), 2:] = even[row, pair]
    return first, pairs


def _address(tensor: Tensor | None) -> int:
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
    bias = None if layer is None else _padded(feature_map.layer_bias, size)
    phase = None if projection is None else _padded(feature_map.phase, feature_map.num_features)
    scale, sums = None, _row_sums(feature_map.projection)
    far_first, far_pairs = _far_pairs(feature_map.projection)
    if feature_map.projection_scale is not None:
        scale = _padded(feature_map.projection_scale, feature_map.num_features)
    shift, balance = feature_map.hidden_shift, feature_map.hidden_scale
    view = _cpu.Map(
        dtype=_WEIGHT_NAMES[feature_map.dtype],
        cosine=feature_map.features == "rff",
        tanh=feature_map.activation == "tanh",
        layernorm=feature_map.layernorm,
        hidden=feature_map.hidden_size,
        layer_size=size,
        features=feature_map.num_features,
        layer=_address(layer),
        layer_bias=_address(bias),
        projection=_address(projection),
        phase=_address(phase),
        input_scale=feature_map.input_scale,
        projection_scale=_address(scale),
        projection_sum=_address(sums),
        projection_far_first=_address(far_first),
        projection_far_pairs=_address(far_pairs),
        hidden_shift=_address(shift),
        hidden_scale=_address(balance),
    )
    return _Packed(view, (layer, bias, projection, phase, scale, sums, far_first, far_pairs, shift, balance))


def _pack_head(weights: HeadWeights) -> _Packed:
    feature_map = _once(weights.map.cache, lambda: _pack_map(weights.map))
    beta, factor = _padded(weights.beta, weights.num_features), _factor_panels(weights)
    scale, sums, far_first, far_pairs, diagonal = None, None, None, None, None
    if weights.factor_row_scale is not None:
        diagonal = _padded(weights.factor_diagonal, weights.num_features)
        scale = _padded(weights.factor_row_scale, weights.num_features)
        whole = reference.unpack_lower(weights.factor, weights.num_features)
        sums, (far_first, far_pairs) = _row_sums(whole), _far_pairs(whole)
    view = _cpu.Head(
        map=feature_map.view,
        beta=beta.data_ptr(),
        factor=factor.data_ptr(),
        beta0=weights.beta0,
        factor_scale=weights.factor_scale,
        amplitude=weights.amplitude,
        factor_row_scale=_address(scale),
        factor_row_sum=_address(sums),
        factor_far_first=_address(far_first),
        factor_far_pairs=_address(far_pairs),
        factor_diagonal=_address(diagonal),
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
        dtype=_WEIGHT_NAMES[weights.dtype],
        hidden=weights.hidden_size,
        members=weights.members,
        attributes=weights.attributes,
        per=weights.per,
        normal=weights.spread == "normal",
        softmax=weights.softmax,
        temperature=weights.temperature,
        input_scale=weights.input_scale,
        value=_address(value),
        depth=len(kept),
        widths=_address(tables[0] if kept else None),
        layers=_address(tables[1] if kept else None),
        biases=_address(tables[2] if kept else None),
        last=_address(last),
        offset=_address(offset),
        softmax_scale=_address(weights.scale),
    )
    return _Packed(view, (value, *kept, *biases, last, offset, weights.scale, *tables))


def _map(feature_map: FeatureMap) -> Any:
    return _once(feature_map.cache, lambda: _pack_map(feature_map)).view


def _head(weights: HeadWeights) -> Any:
    return _once(weights.cache, lambda: _pack_head(weights)).view


# -- calls -----------------------------------------------------------------------------------------------------------


def _rows(hidden: Tensor) -> tuple[Tensor, tuple[int, str, int, int, int]]:
    """``hidden`` as the kernels take it. What comes back first must outlive the call."""
    if hidden.dtype not in _NAMES:
        hidden = hidden.float()
    row_stride, col_stride = hidden.stride()
    return hidden, (hidden.data_ptr(), _NAMES[hidden.dtype], hidden.shape[0], row_stride, col_stride)


def _run(kernel: Callable[..., int]) -> None:
    """``kernel`` with the workspace it asks for."""
    workspace = _large(max(kernel(workspace=0, workspace_bytes=0), 1))
    kernel(workspace=workspace.data_ptr(), workspace_bytes=workspace.numel())


def score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p. See :func:`rmcore.ops.score`."""
    hidden, rows = _rows(hidden)
    _run(functools.partial(_cpu.score, _head(weights), *rows, out.data_ptr(), torch.get_num_threads()))


def accumulate(task: AccumulateTask) -> Tensor:
    """Add ΦᵀWΦ (lower triangle) and Φᵀ(y−p) in place, return Σ log-likelihood. See :func:`rmcore.ops.accumulate`."""
    pairs, weight = task.pairs, task.sample_weight
    if pairs is None:
        return _accumulate(task)
    total = torch.zeros((), dtype=torch.float64)
    stride = _round_up(task.feature_map.num_features, _cpu.PANEL)
    rows_at_once = max(_FEATURE_BYTES // (4 * stride), 2)
    if task.hidden.shape[0] <= rows_at_once:
        return total + _accumulate(task) if task.data else total
    step = rows_at_once // 2
    for start in range(0, task.data, step):
        run = slice(start, start + step)
        members, local = pairs[run].unique(return_inverse=True)
        total += _accumulate(
            task._replace(
                hidden=task.hidden[members],
                labels=task.labels[run],
                pairs=local,
                sample_weight=None if weight is None else weight[run],
            )
        )
    return total


def _pair_features(view: Any, rows: tuple[int, str, int, int, int], d: int) -> Tensor:
    """c of every row in float32, (rows, D rounded up to whole panels): what pairs are differences of."""
    stride = _round_up(d, _cpu.PANEL)
    features = _aligned(4 * rows[2] * stride).view(torch.float32).view(rows[2], stride)
    _run(functools.partial(_cpu.features, view, *rows, features.data_ptr(), stride, torch.get_num_threads()))
    return features


def _accumulate(task: AccumulateTask) -> Tensor:
    view, d = _map(task.feature_map), task.feature_map.num_features
    total = torch.zeros((), dtype=torch.float64)
    hidden, rows = _rows(task.hidden)  # held until the end: rows point into it
    pairs = None if task.pairs is None else task.pairs.contiguous()
    features = None if pairs is None else _pair_features(view, rows, d)
    padded_beta = _padded(task.beta * task.feature_map.feature_scale, d)
    labels = task.labels.float().contiguous()
    sample_weight = None if task.sample_weight is None else task.sample_weight.float().contiguous()
    gram, slope = task.precision.contiguous(), task.gradient.contiguous()
    _run(
        functools.partial(
            _cpu.accumulate,
            view,
            *rows,
            beta=padded_beta.data_ptr(),
            beta0=task.beta0,
            logistic=task.logistic,
            feature_scale=task.feature_map.feature_scale,
            labels=labels.data_ptr(),
            sample_weight=_address(sample_weight),
            features=_address(features),
            features_stride=0 if features is None else features.shape[1],
            pairs=_address(pairs),
            pair_count=0 if pairs is None else pairs.shape[0],
            precision=gram.data_ptr(),
            precision_double=gram.dtype == torch.float64,
            gradient=slope.data_ptr(),
            gradient_double=slope.dtype == torch.float64,
            log_likelihood=total.data_ptr(),
            threads=torch.get_num_threads(),
        )
    )
    if gram.data_ptr() != task.precision.data_ptr():
        task.precision.copy_(gram)
    if slope.data_ptr() != task.gradient.data_ptr():
        task.gradient.copy_(slope)
    del hidden
    return total


def pair_variance(hidden: Tensor, group_sizes: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """Logits and variances of all pairs i < j of every group. See :func:`rmcore.ops.pair_variance`."""
    hidden, rows = _rows(hidden)
    sizes = group_sizes.contiguous()
    pairs = PairLayout(sizes).pairs
    logits, variances = torch.empty(pairs), torch.empty(pairs)
    if pairs:
        _run(
            functools.partial(
                _cpu.pair_variance,
                _head(weights),
                *rows,
                sizes.data_ptr(),
                sizes.numel(),
                logits.data_ptr(),
                variances.data_ptr(),
                torch.get_num_threads(),
            )
        )
    return logits, variances


def power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ(W) and the new right vector, in float32 arithmetic. See :func:`rmcore.ops.power_iteration`."""
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    v = vector.to(torch.float32, copy=True).contiguous()
    sigma = torch.full((), math.nan)
    _run(
        functools.partial(
            _cpu.power_iteration,
            weight.data_ptr(),
            _NAMES[weight.dtype],
            weight.shape[0],
            weight.shape[1],
            weight.stride(0),
            iterations,
            v.data_ptr(),
            sigma.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return sigma.to(vector.dtype), v.to(vector.dtype)


def score_attributes(
    hidden: Tensor, weights: AttributeWeights, gate_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(5, N) summary, (N, M, A · per) outputs, (N, M, A) weights. See :func:`rmcore.ops.score_attributes`."""
    hidden, rows = _rows(hidden)
    gate, gate_rows = (None, (0, "", 0, 0, 0)) if gate_hidden is None else _rows(gate_hidden)
    n, m, a = len(hidden), weights.members, weights.attributes
    summary = torch.empty(len(SUMMARY), n)
    outputs, attribute_weights = torch.empty(n, m, a * weights.per), torch.empty(n, m, a)
    _run(
        functools.partial(
            _cpu.score_attributes,
            _once(weights.cache, lambda: _pack_attributes(weights)).view,
            *rows,
            gate_data=gate_rows[0],
            gate_row_stride=gate_rows[3],
            gate_col_stride=gate_rows[4],
            summary=summary.data_ptr(),
            outputs=outputs.data_ptr(),
            weights=attribute_weights.data_ptr(),
            threads=torch.get_num_threads(),
        )
    )
    del gate
    return summary, outputs, attribute_weights
