"""Launches of kernels that make tensor descriptors: each program writes its own to memory that a launch brings along.

Triton asks its allocator for that memory, a context variable that starts empty in every thread. Here it is set for the
time of the call alone, so a caller's own allocator stays what it was. The memory is torch's, on the current stream:
what is launched on it later comes after, and a captured graph takes it from its own pool.
"""

from collections.abc import Callable
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of the current device; torch's lies at multiples of 512 bytes, and a descriptor asks for 128."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def with_memory(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """``function(*args, **kwargs)``, whose launches may have descriptors."""

    def run() -> _T:
        triton.set_allocator(_allocate)
        return function(*args, **kwargs)

    return copy_context().run(run)
