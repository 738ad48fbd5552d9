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
- Each thread that calls keeps up to 16 MB of workspace for its next call.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmcore.ops import plans
from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights
from rmcore.ops.backends.cpu_packing import (
    NAMES,
    address_of,
    aligned,
    large,
    packed_attributes,
    packed_head,
    packed_map,
    padded,
    round_up,
)
from rmcore.ops.pair_layout import PairLayout
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import SERVING_DTYPES, HeadWeights

try:
    from rmcore import _cpu
except ImportError as error:  # pragma: no cover - a build without the native module
    _cpu = None
    _missing = str(error)

__all__ = ["accumulate", "pair_variance", "plan", "power_iteration", "score", "score_attributes", "unavailable"]

_FEATURE_BYTES = 1 << 29
"""Pairs mode keeps c of this many bytes at a time; beyond it the pairs are taken in runs, and rows once per run."""
_KEPT_BYTES = 16 << 20
"""The most that a thread keeps for its next call: 384 rows (a chunk of ``score``) at h = D = 4096 take 13 MB."""
_kept = threading.local()


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


def _rows(hidden: Tensor) -> tuple[Tensor, tuple[int, str, int, int, int]]:
    """``hidden`` as the kernels take it. What comes back first must outlive the call."""
    if hidden.dtype not in NAMES:
        hidden = hidden.float()
    row_stride, col_stride = hidden.stride()
    return hidden, (hidden.data_ptr(), NAMES[hidden.dtype], hidden.shape[0], row_stride, col_stride)


def _run(kernel: Callable[..., int]) -> None:
    """``kernel`` with the workspace it asks for, the one of this thread's last call where that is large enough."""
    address, size, _ = getattr(_kept, "workspace", (0, 0, None))
    needed = kernel(workspace=address, workspace_bytes=size)
    if address and needed <= size:
        return  # it has run
    memory = large(max(needed, 1))
    address, size = memory.data_ptr(), memory.numel()
    kernel(workspace=address, workspace_bytes=size)
    if needed <= _KEPT_BYTES:
        _kept.workspace = address, size, memory


def score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p. See :func:`rmcore.ops.score`."""
    hidden, rows = _rows(hidden)
    _run(functools.partial(_cpu.score, packed_head(weights), *rows, out.data_ptr(), torch.get_num_threads()))


def plan(hidden: Tensor, weights: HeadWeights) -> plans.Launch | None:
    """The same call for rows of this shape without what the shape has already answered; None for other dtypes."""
    name = NAMES.get(hidden.dtype)
    if name is None:
        return None
    head, kernel, count = packed_head(weights), _cpu.score, hidden.shape[0]
    row_stride, col_stride = hidden.stride()

    def launch(hidden: Tensor, _weights: HeadWeights, out: Tensor) -> bool:
        rows = hidden.data_ptr(), name, count, row_stride, col_stride
        _run(functools.partial(kernel, head, *rows, out.data_ptr(), torch.get_num_threads()))
        return True

    return launch


def accumulate(task: AccumulateTask) -> Tensor:
    """Add ΦᵀWΦ (lower triangle) and Φᵀ(y−p) in place, return Σ log-likelihood. See :func:`rmcore.ops.accumulate`."""
    pairs, weight = task.pairs, task.sample_weight
    if pairs is None:
        return _accumulate(task)
    total = torch.zeros((), dtype=torch.float64)
    stride = round_up(task.feature_map.num_features, _cpu.PANEL)
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
    stride = round_up(d, _cpu.PANEL)
    features = aligned(4 * rows[2] * stride).view(torch.float32).view(rows[2], stride)
    _run(functools.partial(_cpu.features, view, *rows, features.data_ptr(), stride, torch.get_num_threads()))
    return features


def _accumulate(task: AccumulateTask) -> Tensor:
    view, d = packed_map(task.feature_map), task.feature_map.num_features
    total = torch.zeros((), dtype=torch.float64)
    hidden, rows = _rows(task.hidden)  # held until the end: rows point into it
    pairs = None if task.pairs is None else task.pairs.contiguous()
    features = None if pairs is None else _pair_features(view, rows, d)
    padded_beta = padded(task.beta * task.feature_map.feature_scale, d)
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
            sample_weight=address_of(sample_weight),
            features=address_of(features),
            features_stride=0 if features is None else features.shape[1],
            pairs=address_of(pairs),
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
                packed_head(weights),
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
            NAMES[weight.dtype],
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
            packed_attributes(weights),
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
