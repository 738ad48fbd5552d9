"""Plain torch where a GPU's kernels would run, for :mod:`support.pretend_gpu`.

Of the ``cuda`` backend the native module is replaced: what it is handed are addresses, pitches and names, and its
numbers come from the memory there, so that a wrong one shows. Of ``triton`` the operations are, and, with
:func:`launches`, the launch of every kernel, which only asks whether each tensor is on the GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from support.pretend_gpu import Graph, OnGpu
from torch import Tensor

from rmcore.ops import whole_numbers
from rmcore.ops.backends import cuda, triton
from rmcore.ops.backends import torch as plain
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["launches", "native", "standing_in"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WORKSPACE = 4096


def _memory(address: int, dtype: torch.dtype, *shape: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """What lies at an address, as a tensor of the CPU."""
    strides = strides or tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    raw = (ctypes.c_char * max(count * dtype.itemsize, 1)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=max(count, 1)).as_strided(shape, strides)


def _vector(address: int, size: int) -> Tensor | None:
    return _memory(address, torch.float32, size) if address else None


def _tiles(address: int, dtype: torch.dtype, d: int) -> Tensor:
    n = -(-d // 128)
    return _memory(address, dtype, n * (n + 1) // 2, 128, 128)


def _weights(f: SimpleNamespace) -> HeadWeights:
    """A head from what ``native.Head`` was told."""
    dtype, width = _DTYPES[f.dtype], f.layer_size or f.hidden_size
    layer = None
    if f.layer:
        layer = _memory(f.layer, dtype, f.layer_size, f.hidden_size, strides=(f.layer_pitch, 1))
    feature_map = FeatureMap(
        "linear" if f.linear else "rff",
        _memory(f.projection, dtype, f.num_features, width, strides=(f.projection_pitch, 1)),
        _vector(f.phase, f.num_features), layer, _vector(f.layer_bias, f.layer_size),
        "tanh" if f.tanh else "none", f.layernorm, f.hidden_size, f.num_features, dtype, f.input_scale,
    )  # fmt: skip
    beta = _vector(f.beta, f.num_features)
    assert beta is not None
    tiles = _tiles(f.factor, dtype, f.num_features)
    return HeadWeights(feature_map, beta, f.beta0, tiles, f.factor_scale, f.amplitude)


def _int8_weights(f: SimpleNamespace) -> HeadWeights:
    d, h = f.num_features, f.hidden_size
    feature_map = FeatureMap(
        "rff", _memory(f.projection, torch.int8, d, h, strides=(f.projection_pitch, 1)), _vector(f.phase, d),
        None, None, "none", False, h, d, torch.int8, f.input_scale, projection_scale=_vector(f.projection_scale, d),
        hidden_shift=_vector(f.hidden_shift, h), hidden_scale=_vector(f.hidden_balance, h),
    )  # fmt: skip
    beta = _vector(f.beta, d)
    assert beta is not None
    return HeadWeights(
        feature_map, beta, f.beta0, _tiles(f.factor, torch.int8, d), f.factor_scale, f.amplitude,
        _vector(f.factor_scales, d), _vector(f.diagonal, d),
    )  # fmt: skip


def _scored(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """g, v, u, p (4, B) in float64; of int8 heads from the kernels' whole numbers."""
    if weights.dtype == torch.int8:
        found = whole_numbers.score(hidden, weights)
    else:
        found = torch.empty(4, len(hidden), dtype=torch.float64, device=hidden.device)
        scale = weights.map.input_scale  # rows in another dtype are rounded to the head's
        plain.score((hidden.double() * scale).to(weights.dtype).double() / scale, weights, found)
    return torch.where(hidden.double().sum(1).isfinite(), found, torch.full_like(found, math.nan))


def _native_score(f: Any, plan: Any, hidden: int, dtype: str, stride: int, rows: int, out: int, *rest: int) -> None:
    workspace, size, device, _stream = rest
    assert workspace
    assert device == 0
    if size < plan.workspace_bytes:
        raise ValueError(f"workspace: got {size} bytes, expected {plan.workspace_bytes}")
    there = _memory(hidden, _DTYPES[dtype], rows, f.hidden_size, strides=(stride, 1))
    weights = _int8_weights(f) if hasattr(f, "diagonal") else _weights(f)
    _memory(out, torch.float32, 4, rows).copy_(_scored(there, weights))
    _recorded(_native_score, f, plan, hidden, dtype, stride, rows, out, *rest)


def _native_mid(f: Any, *rest: Any) -> None:
    """Of rows that were scaled before."""
    _native_score(SimpleNamespace(**{**vars(f), "input_scale": 1.0}), *rest)


def _native_power(
    plan: Any, dtype: str, matrix: int, pitch: int, m: int, h: int, start: int, count: int, sigma: int, new: int,
    workspace: int, size: int, device: int, stream: int,
) -> None:  # fmt: skip
    if size < plan.workspace_bytes:
        raise ValueError(f"workspace: got {size} bytes, expected {plan.workspace_bytes}")
    weight = _memory(matrix, _DTYPES[dtype], m, h, strides=(pitch, 1)).double()
    value, vector = plain.power_iteration(weight, _memory(start, torch.float32, h).double(), count)
    _memory(sigma, torch.float32, 1).copy_(value)
    _memory(new, torch.float32, h).copy_(vector)
    _recorded(
        _native_power, plan, dtype, matrix, pitch, m, h, start, count, sigma, new, workspace, size, device, stream
    )


def _recorded(function: Any, *args: Any) -> None:
    if Graph.recording is not None:
        Graph.recording.calls.append((function, args, {}, None))


def _properties(index: int) -> dict[str, Any]:
    if index:
        raise RuntimeError("cudaGetDeviceProperties: invalid device ordinal (101)")
    return {"capability": (9, 0), "cooperative": True}


def native() -> Any:
    """Instead of ``rmcore._cuda``."""

    def plan(head: Any, rows: int, device: int, streamed: bool = True) -> SimpleNamespace:
        assert device in (None, 0)
        streamed = streamed and rows <= 16 and not getattr(head, "layer_size", 0)
        facts = {"slots": 8, "columns": 128, "groups": 1, "clusters": 32, "shared_bytes": 1 << 17}
        return SimpleNamespace(workspace_bytes=WORKSPACE, streamed=streamed, **facts)

    return SimpleNamespace(
        device_count=lambda: 1,
        properties=_properties,
        max_power_columns=lambda _bytes: 16384,
        BarrierTimeout=type("BarrierTimeout", (RuntimeError,), {}),
        Head=lambda **f: SimpleNamespace(**f),
        Int8Head=lambda **f: SimpleNamespace(**f),
        ScorePlan=plan,
        Int8Plan=plan,
        MidHead=lambda head: head,
        MidPlan=plan,
        PowerPlan=lambda *_: SimpleNamespace(workspace_bytes=WORKSPACE),
        score=_native_score,
        score_int8=_native_score,
        score_mid=_native_mid,
        power_iteration=_native_power,
    )


def _score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    if len(hidden):
        out.copy_(_scored(hidden, weights))


def _pair_variance(hidden: Tensor, sizes: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    g, v = plain.pair_variance(hidden.double(), sizes, weights)
    return g.float(), v.float()


def _power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    sigma, v = plain.power_iteration(weight.double(), vector.double(), iterations)
    return sigma.to(vector.dtype), v.to(vector.dtype)


def _accumulate(task: Any) -> Tensor:
    total = plain.accumulate(task)
    return total.double()


def _score_attributes(hidden: Tensor, weights: Any, gate: Tensor | None) -> Any:
    found = plain.score_attributes(hidden.double(), weights, None if gate is None else gate.double())
    return tuple(part.float() for part in found)


@contextmanager
def standing_in() -> Iterator[None]:
    """Both GPU backends run; every kernel's work is done by plain torch."""
    module = native()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(cuda, "_native", return_value=module))
        enter(mock.patch.object(cuda, "_workspaces", {}))
        enter(mock.patch.object(triton, "_interpreted", return_value=False))
        for operation in (_score, _pair_variance, _power_iteration, _accumulate, _score_attributes):
            enter(mock.patch.object(triton, operation.__name__[1:], operation))
        enter(mock.patch.object(triton, "plan", return_value=None))
        cuda._lacking.cache_clear()
        yield
    cuda._lacking.cache_clear()


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched, on nothing. A tensor that is not on the GPU raises, as it does there."""
    from rmcore.kernels import common

    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **_: Any) -> None:
        name = kernel.fn.__name__
        assert all(isinstance(n, int) and 0 < n < 2**31 for n in grid), f"{name}: a grid of {grid}"
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and not isinstance(argument, OnGpu):
                raise ValueError(f"{name}: pointer argument {place} cannot be accessed from Triton (cpu tensor?)")
        names.append(name)

    folder = Path(str(common.__file__)).parent
    files = [importlib.import_module(f"rmcore.kernels.{path.stem}") for path in folder.glob("*.py")]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton, "_interpreted", return_value=False))
        for file in files:
            if hasattr(file, "launch"):
                stack.enter_context(mock.patch.object(file, "launch", launch))
        triton._device.cache_clear()
        yield names
    triton._device.cache_clear()
