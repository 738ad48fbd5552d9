"""The ``cuda`` backend: latency kernels for small batches on NVIDIA GPUs from compute capability 8.0 (csrc/cuda).

``score`` is one cooperative launch for up to 64 rows, of int8 heads (cuda_int8.py) up to 16; another one, for 65 to 512
rows of folded heads on Hopper (cuda_mid.py), is off: :data:`MID`. ``power_iteration`` reads its matrix once per
iteration. Results are bit-identical from run to run. The native module is loaded on first use and
allocates nothing: weights are used where they lie (rows that do not begin at multiples of 16 bytes are copied once,
into ``weights.cache``), and the workspace comes from torch, one for each device and stream.

A launch whose thread blocks wait for one that never comes gives up after four seconds, with NaN for results. Nobody
waits for the GPU to learn that: the next call reads a word of host memory, raises and takes the backend out of service.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from rmcore._base.errors import BackendError
from rmcore.ops import plans
from rmcore.ops.backends import cuda_int8, cuda_mid
from rmcore.ops.backends.cuda_int8 import aligned as _aligned
from rmcore.ops.sources import kernel_of
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = [
    "MAX_ROWS",
    "accumulate",
    "declines",
    "kernel",
    "mid",
    "pair_variance",
    "plan",
    "power_iteration",
    "prefers",
    "score",
    "unavailable",
]

log = logging.getLogger(__name__)

MAX_ROWS = 64
"""Rows of one ``score`` call."""

STREAMED = True
"""Whether up to 16 rows of a folded head go to the streamed kernel (csrc/cuda/stream.cuh) where the device has bulk
copies; off to hold both forms side by side. Read when a head is first scored at a batch size."""

MID = False
"""Whether 65 to 512 rows of a folded head go to the persistent launch (csrc/cuda/mid.cuh), and ``auto`` asks this
backend first for them. Off: no card has said that it is right, nor that it is faster than triton."""

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_DTYPES = {"score": (torch.float16, torch.bfloat16, torch.int8), "power_iteration": tuple(_NAMES)}
_CACHE = "cuda"
_workspaces: dict[tuple[int, int], Tensor] = {}
_hung: list[str] = []
"""Barriers that thread blocks did not come to in this process: after the first the backend serves no more."""


@functools.cache
def _native() -> Any | None:
    try:
        return importlib.import_module("rmcore._cuda")
    except ImportError:
        return None


@functools.cache
def _lacking(index: int) -> str | None:
    """What device ``index`` or this build lacks to run any kernel here."""
    native = _native()
    if native is None:
        return "rmcore._cuda is not part of this build: it saw no GPU or no nvcc (RMCORE_CUDA=1 asks for it)"
    if index >= native.device_count():
        return f"no CUDA device {index} for this process"
    properties = native.properties(index)
    if properties["capability"] < (8, 0):
        return f"compute capability {'.'.join(map(str, properties['capability']))}, the kernels need 8.0"
    return None if properties["cooperative"] else "the device has no cooperative launch"


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run on weights of ``dtype`` on ``device``, or None."""
    if op not in _DTYPES:
        return f"has no {op} kernel; triton serves it"
    if _hung:
        return f"{_hung[0]}; it serves no more in this process"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    if dtype not in _DTYPES[op]:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[op])
        return f"{op} serves {names} weights, not {str(dtype).removeprefix('torch.')}"
    if _native() is None or _native().device_count() == 0:  # type: ignore[union-attr]
        return _lacking(0)
    index = torch.cuda.current_device() if device.index is None else device.index
    why = _lacking(index)
    return cuda_int8.unavailable(_native(), index) if why is None and dtype == torch.int8 else why


@contextmanager
def mid(on: bool = True) -> Iterator[None]:
    """:data:`MID` for a while, for tests and to time it beside what serves. For the whole process."""
    global MID
    before, MID = MID, on
    try:
        yield
    finally:
        MID = before


def _many(op: str, rows: int | None, dtype: torch.dtype) -> bool:
    """Whether a call is of the sizes that the persistent launch is for."""
    return op == "score" and dtype != torch.int8 and rows is not None and MAX_ROWS < rows <= cuda_mid.MOST_ROWS


def kernel(op: str, dtype: torch.dtype, rows: int | None = None) -> str:
    """Whose proof such a call needs: the persistent launch has its own."""
    return "score_mid" if prefers(op, rows, dtype) else kernel_of(op, dtype)


def prefers(op: str, rows: int | None, dtype: torch.dtype) -> bool:
    """Whether ``auto`` asks this backend before triton although the batch is no small one."""
    return MID and _many(op, rows, dtype)


def declines(op: str, rows: int, weights: HeadWeights | FeatureMap | Tensor | None) -> str | None:
    """Why a call that :func:`unavailable` allows should go elsewhere for its shape, or None.

    ``weights`` is the head for ``score`` and the matrix for ``power_iteration``.
    """
    if op == "score" and isinstance(weights, HeadWeights):
        if weights.dtype == torch.int8:
            why: str | None = _run(cuda_int8.declines, _native(), rows, weights)
            return why
        if rows > MAX_ROWS:
            return _declines_many(rows, weights)
        if weights.map.projection is None:
            return "linear features without a projection: the latency kernel starts from one"
    if op == "power_iteration" and isinstance(weights, Tensor):
        native = _native()
        widest = 0 if native is None else native.max_power_columns(weights.element_size())
        if native is not None and weights.shape[1] > widest:
            return f"matrix of {weights.shape[1]} columns: the kernel serves up to {widest} in {weights.dtype}"
        if weights.numel() == 0:
            return "empty matrix"
    return None


def _declines_many(rows: int, weights: HeadWeights) -> str | None:
    """The same for more rows than the latency kernels take."""
    why = f"batch of {rows} rows: the latency kernel serves up to {MAX_ROWS}"
    if not _many("score", rows, weights.dtype):
        return why
    if not MID:
        return f"{why}; the launch for up to {cuda_mid.MOST_ROWS} is off (cuda.MID): no GPU has run it"
    native = _native()
    found: str | None = _run(cuda_mid.declines, native, weights)
    if found is not None or native is None or weights.device.type != "cuda":
        return found
    if torch.cuda.is_current_stream_capturing():
        return None
    prepared = _run(cuda_mid.prepare, native, weights, _prepare(weights).head)
    if _run(prepared.layout, native, rows, weights.device.index or 0).columns == 0:
        return f"h = {weights.hidden_size}, D = {weights.num_features}: {rows} rows do not fit the device's clusters"
    return None


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the native module; its errors, which name the CUDA call, become BackendError."""
    try:
        return function(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        _fail(error)


def _fail(error: RuntimeError | ValueError) -> NoReturn:
    """Raise the native module's error as BackendError; after a barrier that did not open, also serve no more."""
    if isinstance(error, getattr(_native(), "BarrierTimeout", ())):
        log.error("backend cuda: %s", error)
        _hung.append(str(error))
    raise BackendError(f"backend: cuda: {error}") from error


def _workspace(device: torch.device, stream: int, size: int) -> Tensor:
    """At least ``size`` bytes that only ``stream`` uses; their contents do not matter.

    A captured graph gets its own from its own memory pool, since it may be replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    key = (device.index or 0, stream)
    found = _workspaces.get(key)
    if found is None or found.numel() < size:
        found = _workspaces[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return found


@dataclass
class _Prepared:
    """A head as the native module sees it, and the tensors that must live as long."""

    head: Any
    tensors: tuple[Tensor | None, ...]
    plans: dict[int, Any] = field(default_factory=dict)


def _capturing() -> None:
    """Raise BackendError where a graph is being captured, since a head that is new to the backend copies weights."""
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "backend: cuda: the first call with a head copies weights; score once before capturing a graph"
        )


def _prepare(weights: HeadWeights) -> _Prepared:
    found = weights.cache.get(_CACHE)
    if isinstance(found, _Prepared):
        return found
    native, m = _native(), weights.map
    if native is None or m.projection is None or m.phase is None:
        raise BackendError(f"backend: got 'cuda', which cannot run score here: {declines('score', 1, weights)}")
    _capturing()
    projection = _aligned(m.projection)
    layer = None if m.layer_weight is None else _aligned(m.layer_weight)
    phase, beta = m.phase.float().contiguous(), weights.beta.float().contiguous()
    bias = None if m.layer_bias is None else m.layer_bias.float().contiguous()
    factor = weights.factor.contiguous()
    factor = factor if factor.data_ptr() % 16 == 0 else factor.clone()
    head = _run(
        native.Head,
        dtype=_NAMES[weights.dtype],
        hidden_size=m.hidden_size,
        num_features=m.num_features,
        layer_size=0 if layer is None else layer.shape[0],
        projection=projection.data_ptr(),
        projection_pitch=projection.stride(0),
        phase=phase.data_ptr(),
        layer=0 if layer is None else layer.data_ptr(),
        layer_pitch=0 if layer is None else layer.stride(0),
        layer_bias=0 if bias is None else bias.data_ptr(),
        beta=beta.data_ptr(),
        factor=factor.data_ptr(),
        tanh=m.activation == "tanh",
        layernorm=m.layernorm,
        linear=m.features == "linear",
        input_scale=m.input_scale,
        beta0=weights.beta0,
        factor_scale=weights.factor_scale,
        amplitude=weights.amplitude,
    )
    # Of threads that meet at a new head the first one's copy stays, and is what all of them use.
    kept = weights.cache.setdefault(_CACHE, _Prepared(head, (projection, layer, phase, bias, beta, factor)))
    assert isinstance(kept, _Prepared)
    return kept


def _bucket(rows: int) -> int:
    """What a batch is padded to."""
    return 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64


def _kernel(weights: HeadWeights, rows: int, index: int | None) -> tuple[Callable[..., None], Any, Any]:
    """The native function that scores such a batch, the head it takes, and how it is laid out."""
    native = _native()
    if native is None:
        raise BackendError(f"backend: got 'cuda', which cannot run score here: {_lacking(0)}")
    if weights.dtype == torch.int8:
        if "cuda_int8" not in weights.cache:
            _capturing()
        whole: cuda_int8.Prepared = _run(cuda_int8.prepare, native, weights)
        return native.score_int8, whole.head, _run(whole.layout, native, rows, index or 0)
    prepared, bucket = _prepare(weights), _bucket(rows)
    if rows > MAX_ROWS:
        if "cuda_mid" not in weights.cache:
            _capturing()
        maps: cuda_mid.Prepared = _run(cuda_mid.prepare, native, weights, prepared.head)
        return native.score_mid, maps.head, _run(maps.layout, native, rows, index or 0)
    plan = prepared.plans.get(bucket)
    if plan is None:
        plan = prepared.plans[bucket] = _run(native.ScorePlan, prepared.head, bucket, index, STREAMED)
    return native.score, prepared.head, plan


def score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p. See :func:`rmcore.ops.score`."""
    rows = hidden.shape[0]
    if rows == 0:
        return
    reason = declines("score", rows, weights)
    if reason is not None:
        raise BackendError(f"backend: got 'cuda', which cannot run this score: {reason}")
    hidden = hidden.detach()
    if hidden.dtype not in _NAMES:
        hidden = hidden.float()
    if rows > MAX_ROWS:
        hidden = cuda_mid.serving_rows(hidden, weights)
    elif hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    device = hidden.device
    function, head, plan = _kernel(weights, rows, device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _workspace(device, stream, plan.workspace_bytes)
    _run(
        function,
        head,
        plan,
        hidden.data_ptr(),
        _NAMES[hidden.dtype],
        hidden.stride(0) if rows > 1 else 0,
        rows,
        out.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        device.index or 0,
        stream,
    )


def plan(hidden: Tensor, weights: HeadWeights) -> plans.Launch | None:
    """The launch of such a call without what its shape has already answered; None where it would not be the same."""
    rows, index = hidden.shape[0], hidden.device.index or 0
    if hidden.dtype not in _NAMES or not rows or hidden.stride(1) != 1:
        return None  # such rows are copied first
    if rows > MAX_ROWS and not cuda_mid.in_place(hidden, weights):
        return None
    return _replay(*_kernel(weights, rows, index), hidden, index)


def _replay(run: Callable[..., None], head: Any, layout: Any, like: Tensor, index: int) -> plans.Launch:
    """``run``, a native score, for rows like ``like`` on device ``index``, in the workspace that a call has left."""
    rows, name, bytes_needed = like.shape[0], _NAMES[like.dtype], layout.workspace_bytes
    stride = like.stride(0) if rows > 1 else 0

    def launch(hidden: Tensor, weights: HeadWeights, out: Tensor) -> bool:
        stream = plans.stream_of(index)
        if stream is None or _hung:
            return False
        memory = _workspaces.get((index, stream))
        if memory is None or memory.numel() < bytes_needed:
            return False
        address, size = memory.data_ptr(), memory.numel()
        source, target = hidden.data_ptr(), out.data_ptr()
        try:
            run(head, layout, source, name, stride, rows, target, address, size, index, stream)
        except (RuntimeError, ValueError) as error:
            _fail(error)
        return True

    return launch


def power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ(W) and the new right vector, in the vector's dtype. See :func:`rmcore.ops.power_iteration`."""
    native, device = _native(), weight.device
    reason = declines("power_iteration", 0, weight)
    if native is None or reason is not None:
        raise BackendError(f"backend: got 'cuda', which cannot run this power_iteration: {reason or _lacking(0)}")
    m, h = weight.shape
    matrix = _aligned(weight.detach())
    start = vector.detach().to(device=device, dtype=torch.float32).contiguous()
    plan = _run(native.PowerPlan, m, h, matrix.element_size(), device.index)
    result = torch.empty(h + 1, dtype=torch.float32, device=device)
    sigma, new = result[h], result[:h]
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _workspace(device, stream, plan.workspace_bytes)
    _run(
        native.power_iteration,
        plan,
        _NAMES[weight.dtype],
        matrix.data_ptr(),
        matrix.stride(0) if m > 1 else matrix.shape[1],
        m,
        h,
        start.data_ptr(),
        iterations,
        sigma.data_ptr(),
        new.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        device.index,
        stream,
    )
    return sigma.to(vector.dtype), new.to(vector.dtype)


def accumulate(task: AccumulateTask) -> NoReturn:
    """Not a latency problem: always raises. See :func:`unavailable`."""
    raise BackendError(f"backend: cuda {unavailable('accumulate', task.hidden.device, task.feature_map.dtype)}")


def pair_variance(hidden: Tensor, group_sizes: Tensor, weights: HeadWeights) -> NoReturn:
    """Not a latency problem: always raises. See :func:`unavailable`."""
    raise BackendError(f"backend: cuda {unavailable('pair_variance', hidden.device, weights.dtype)}")
