"""Launch plans of ``score``: what a call's shape, strides, dtype and device decide is decided once.

Choosing a backend, checking shapes, preparing weights and laying out workspaces takes longer in Python than a kernel
does. So after a call has gone that way, its backend may give a :data:`Launch` for calls like it: one function that
starts the kernels with this call's pointers. It is kept beside the head (``weights.cache``) and looked up by all that
it depends on; where that has changed in a way the key does not show (another stream, a graph being captured) it refuses
and the call goes the long way again. The results are those of the long way, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rmcore.ops.weights import HeadWeights

__all__ = ["Launch", "find", "keep", "key_of", "stream_of"]

Launch: TypeAlias = Callable[[Tensor, HeadWeights, Tensor], bool]
"""(hidden, weights, out) → whether it has launched; where it has not, nothing was done."""

_CACHE = "plans"
_LIMIT = 256
"""Plans of a head; at the next one all are forgotten, and made again as they are needed."""

_PLANNING = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
"""Backends whose calls are planned, by the kind of device: in Triton's interpreter a CPU has no streams."""


class _Plans(dict[tuple[object, ...], Launch]):
    """A head's plans. They hold addresses of its tensors, so a copy of the head starts with none."""

    def __deepcopy__(self, _memo: object) -> _Plans:
        return _Plans()

    def __reduce__(self) -> tuple[type[_Plans], tuple[()]]:
        return _Plans, ()


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# Each of torch's public functions for these takes ten times as long; where torch has no such internals they serve.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


def stream_of(index: int) -> int | None:
    """The current stream of device ``index``; None where it is not the current device, or a graph is being captured.

    A captured graph takes its memory from its own pool, which a plan's workspace is not part of.
    """
    return None if _current_device() != index or _capturing() else _raw_stream(index)


def key_of(hidden: Tensor, backend: str) -> tuple[object, ...] | None:
    """What a plan depends on; None for calls that are not planned."""
    if type(hidden) is not Tensor or hidden.device.type not in _PLANNING:
        return None
    aligned = hidden.data_ptr() % 16 == 0
    return backend, hidden.shape, hidden.stride(), hidden.dtype, hidden.device, aligned


def find(weights: HeadWeights, key: tuple[object, ...]) -> Launch | None:
    """The plan for calls with this key, if there is one."""
    plans: Any = weights.cache.get(_CACHE)
    return None if plans is None else plans.get(key)


def _never(hidden: Tensor, weights: HeadWeights, out: Tensor) -> bool:
    return False


def keep(weights: HeadWeights, key: tuple[object, ...], hidden: Tensor, module: Any) -> None:
    """Ask the backend that has just served such a call for a plan, where it makes any; keep what it gives."""
    if hidden.device.type == "cuda" and stream_of(hidden.device.index or 0) is None:
        return
    plans = module.__name__.rpartition(".")[2] in _PLANNING[hidden.device.type]
    launch: Launch = (module.plan(hidden, weights) if plans else None) or _never
    kept: Any = weights.cache.setdefault(_CACHE, _Plans())
    if len(kept) >= _LIMIT:
        kept.clear()
    kept[key] = launch
