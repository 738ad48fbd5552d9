"""A GPU that is not there, made of the CPU: every tensor has a device, and operations across devices are refused.

So that the Python which runs on a GPU alone has run somewhere before. A tensor "on cuda" is one of the CPU that says
so; what torch with CUDA refuses (a tensor of the CPU beside one of the GPU, a generator of the other device) raises.
Streams and events do nothing, and a captured graph computes anew at every replay. What is not here are kernels:
:mod:`support.pretend_kernels` has others in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "H200", "OnGpu", "pretending"]

DEVICE = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=139 << 30
)

_COPIES = {"copy_", "to", "type_as", "cpu", "cuda", "set_", "data_ptr"}
_JOINS = {"cat", "stack", "matmul", "mm", "bmm", "addmm", "addmm_", "einsum", "linear", "__matmul__", "equal"}
"""Where not even a number of the CPU may stand beside tensors of the GPU."""


class OnGpu(Tensor):
    """A tensor of the CPU whose ``device`` is :data:`DEVICE`."""


class Generator(torch.Generator):
    """Of either device."""

    device = torch.device("cpu")

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.device = torch.device(device)
        return made


class Graph:
    """What was called while it was captured, to be called again; in the same memory."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            for before, after in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != after.data_ptr():
                    before.copy_(after)


class Pretending(TorchFunctionMode):
    """Gives results the device of what they were made from, or asked for; refuses what mixes devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return _attribute(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(t, OnGpu) for t in tensors)
        _refuse_mixtures(name, args, tensors, there)
        target, args, kwargs = _placed(name, args, kwargs, tensors)
        goes_there = there if target is None else target.type == "cuda"
        generator = kwargs.get("generator")
        if isinstance(generator, Generator) and (generator.device.type == "cuda") != goes_there:
            raise RuntimeError(
                f"Expected a '{DEVICE.type if goes_there else 'cpu'}' device type for generator ({name})"
            )
        if name in ("numpy", "__array__", "share_memory_") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            if there:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
            return args[0].clone()
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            if target is not None and name in _COPIES and made is args[0] and isinstance(made, OnGpu) != goes_there:
                made = made.clone()
        if Graph.recording is not None and goes_there:
            Graph.recording.calls.append((func, args, kwargs, made))
        return tree_map(lambda t: _on(t, goes_there) if type(t) in (Tensor, OnGpu) else t, made)


def _on(tensor: Tensor, there: bool) -> Tensor:
    wanted = OnGpu if there else Tensor
    return tensor if type(tensor) is wanted else tensor.as_subclass(wanted)


def _device_of(tensor: Tensor) -> torch.device:
    return DEVICE if isinstance(tensor, OnGpu) else torch.device("cpu")


def _attribute(func: Any, args: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*args)
    there, name = isinstance(args[0], OnGpu), func.__self__.__name__
    if name == "device" and there:
        return DEVICE
    if name in ("is_cuda", "is_cpu"):
        return there == (name == "is_cuda")
    return _on(found, there) if type(found) in (Tensor, OnGpu) else found


def _refuse_mixtures(name: str, args: Any, tensors: list[Tensor], there: bool) -> None:
    if not there or name in _COPIES:
        return
    strangers = [t for t in tensors if not isinstance(t, OnGpu) and (t.dim() > 0 or name in _JOINS)]
    if name in ("__getitem__", "__setitem__"):  # indices may lie on the CPU where what they index does not
        strangers = [] if isinstance(args[0], OnGpu) else strangers
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")


def _placed(name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
    """Where the result shall be, if the call says so, and the call as it is made on the CPU."""
    target = kwargs.get("device")
    if name == "to":
        others = [a for a in args[1:] if isinstance(a, str | torch.device | Tensor)]
        if others:
            other = others[0]
            target = _device_of(other) if isinstance(other, Tensor) else other
            args = tuple("cpu" if isinstance(a, str | torch.device) else a for a in args)
    if name in ("cuda", "cpu"):
        target = name
    target = None if target is None else torch.device(target)
    if target is not None and target.type == "cuda":
        if target.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        if kwargs.pop("pin_memory", False):
            raise RuntimeError("only dense CPU tensors can be pinned")
    if "device" in kwargs and (target is None or target.type != "meta"):
        kwargs["device"] = None if target is None else "cpu"
    return target, args, kwargs


def _cuda(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.to(DEVICE)


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _end: _Event) -> float:
        return 0.25


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def _capturing(graph: Graph, **_: Any) -> Iterator[None]:
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None


@contextmanager
def pretending(properties: SimpleNamespace = H200) -> Iterator[None]:
    """torch has one GPU inside, with these properties."""
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: _Stream(),
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": _capturing,
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: Graph.recording is not None,
        "_lazy_init": lambda: None,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(Tensor, "cuda", _cuda))
        stack.enter_context(Pretending())
        yield
