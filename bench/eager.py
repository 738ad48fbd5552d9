"""eager: the host's microseconds before kernels start: a score's, the long way and planned, and triton's others.

With a GPU the calls are real: batches of them, timed to the last one's return, not to the kernels' end. Without one,
and beside the real figures, the same Python runs on CPU tensors against launchers that return at once, so that what is
measured is the Python alone: Triton's own with kernels compiled for a GPU that is not there, the ``cuda`` and ``cpu``
backends' with a native module that ignores its arguments. Least of many short rounds: other work on the machine only
adds.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend, HeadWeights, plans

from .harness import synchronize
from .peers import make_problem, ours
from .setup import Row, Setup

__all__ = ["eager", "host_us", "measure", "operations"]

ROUNDS, CALLS = 40, 25
GOALS_US = {"cuda": 10.0, "triton": 20.0}
ROWS = {"cpu": (1, 64), "cuda": (1, 16, 64), "triton": (1, 64, 256)}


def host_us(
    call: Callable[[], object], device: torch.device, *, rounds: int | None = None, calls: int = CALLS
) -> float:
    """Microseconds of ``call`` on the host: the least mean of ``calls`` calls, far fewer than a queue holds."""
    call()
    best = float("inf")
    for _ in range(rounds or ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - began)
    synchronize(device)
    return 1e6 * best / calls


def eager(setup: Setup) -> Iterator[Row]:
    """The backends with kernels, at small batches."""
    names: tuple[Backend, ...] = ("cpu", "cuda", "triton")
    for name in names:
        for row in measure(name, setup.device, min(setup.sizes[0][1], 1024), setup.note):
            yield {
                "suite": "eager",
                "variant": f"rmcore {name}, {row['way']}",
                "median_s": 1e-6 * row["host_us"],
                **row,
            }
    for row in operations(setup.device, min(setup.sizes[0][1], 1024)):
        variant = f"rmcore triton {row['op']}, {row['way']}"
        yield {"suite": "eager", "variant": variant, "median_s": 1e-6 * row["host_us"], "rows": 64, **row}


def measure(name: Backend, device: torch.device, size: int, note: Callable[[str], None]) -> Iterator[Row]:
    """Rows of a backend: ``way`` is long or planned, ``driver`` real or none (launchers that return at once).

    The Python does not depend on ``size``; copying the head to the CPU does.
    """
    weights = ours(make_problem(size, size, device, torch.float16))
    for rows in ROWS[name]:
        hidden = torch.randn(rows, size, device=device).half()
        if device.type == "cuda" and ops.explain("score", device, backend=name).backend == name:
            yield from _both(name, "real", hidden, weights)
        with _stubbed(name) as why:
            if why is None:
                yield from _both(name, "none", hidden.cpu(), weights.to("cpu"))
            else:
                note(f"eager {name}: {why}")


OPERATIONS = ("power_iteration", "pair_variance", "accumulate")


def operations(device: torch.device, size: int, names: tuple[str, ...] = OPERATIONS) -> Iterator[Row]:
    """The other operations of triton: ``way`` is looked up (Triton's own) or direct (``common.launch``'s)."""
    from rmcore.kernels import common

    with ExitStack() as stack:
        if device.type != "cuda" and stack.enter_context(_stubbed("triton")) is not None:
            return
        problem = make_problem(size, size, device, torch.float16)
        weights, sizes = ours(problem), torch.full((8,), 8)
        hidden, labels = torch.randn(64, size, device=device).half(), torch.ones(64, device=device)
        precision, gradient, beta = (torch.zeros(*s, device=device) for s in ((size, size), (size,), (size,)))
        matrix, vector = torch.randn(size, size, device=device).half(), torch.randn(size, device=device)
        calls: dict[str, Callable[[], object]] = {
            "power_iteration": lambda: ops.power_iteration(matrix, vector, 1, backend="triton"),
            "pair_variance": lambda: ops.pair_variance(hidden, sizes, weights, backend="triton"),
            "accumulate": lambda: ops.accumulate(
                hidden, labels, weights.map, beta, precision=precision, gradient=gradient, backend="triton"
            ),
        }
        for op, call in ((name, calls[name]) for name in names):
            for way, direct in (("looked up", False), ("direct", True)):
                with mock.patch.object(common, "DIRECT", [direct]):
                    us = host_us(call, device, calls=10)
                yield {"op": op, "way": way, "driver": "real" if device.type == "cuda" else "none", "host_us": us}


def _both(name: Backend, driver: str, hidden: Tensor, weights: HeadWeights) -> Iterator[Row]:
    call = functools.partial(ops.score, hidden, weights, backend=name)
    with mock.patch.object(plans, "key_of", return_value=None):
        long_us = host_us(call, hidden.device)
    planned_us = host_us(call, hidden.device)
    launch = plans.find(weights, plans.key_of(hidden, name) or ())
    if launch is None or not launch(hidden, weights, torch.empty(4, len(hidden), device=hidden.device)):
        raise RuntimeError(f"eager: the {name} backend made no plan, so both figures are of the long way")
    common = {"dtype": "float16", "driver": driver, "rows": len(hidden)}
    common |= {"goal_us": GOALS_US[name]} if name in GOALS_US else {}
    yield {**common, "way": "long", "host_us": long_us}
    yield {**common, "way": "planned", "host_us": planned_us}


# -- launchers that return at once -------------------------------------------------------------------------------------


def _replace(of: Any, name: str, by: object) -> Any:
    # Plain functions, not mocks: those take microseconds themselves.
    return mock.patch.object(of, name, by, create=True)


@contextmanager
def _stubbed(name: str) -> Iterator[str | None]:
    """The backend takes CPU tensors and launches nothing; yields why it cannot be made to."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_replace(plans, "_PLANNING", {"cpu": ("cpu", "cuda", "triton")}))
        enter(_replace(plans, "_raw_stream", lambda _index: 0))
        enter(_replace(plans, "_current_device", lambda: 0))
        enter(_replace(plans, "_capturing", lambda: False))
        yield {"cpu": _stub_cpu, "cuda": _stub_cuda, "triton": _stub_triton}[name](enter)


def _stub_cpu(enter: Callable[[Any], Any]) -> str | None:
    from rmcore.ops.backends import cpu

    if why := cpu.unavailable("score", torch.device("cpu"), torch.float16):
        return why
    enter(_replace(cpu, "_cpu", SimpleNamespace(score=lambda *_, workspace, workspace_bytes: 0)))
    return None


def _stub_cuda(enter: Callable[[Any], Any]) -> str | None:
    from rmcore.ops.backends import cuda

    native = SimpleNamespace(
        Head=lambda **fields: fields,
        ScorePlan=lambda *_: SimpleNamespace(workspace_bytes=1 << 16),
        score=lambda *_: None,
    )
    enter(_replace(cuda, "_native", lambda: native))
    enter(_replace(cuda, "unavailable", lambda *_: None))
    enter(_replace(cuda, "_workspaces", {}))
    enter(_replace(torch.cuda, "is_current_stream_capturing", lambda: False))
    enter(_replace(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=0)))
    return None


class _Driver:
    """As much of a Triton driver as binding and compiling ask for: a Hopper that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _stub_triton(enter: Callable[[Any], Any]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    import triton
    from triton.compiler import CompiledKernel

    from rmcore.kernels.heuristics import Device
    from rmcore.ops.backends import triton as backend

    enter(_replace(triton.runtime.driver, "_active", _Driver()))
    enter(_replace(CompiledKernel, "_init_handles", lambda _self: None))
    enter(_replace(CompiledKernel, "run", lambda *_: None))
    enter(_replace(CompiledKernel, "function", 0))
    enter(_replace(backend, "_device", lambda _device: Device("sm90", 132)))
    enter(_replace(backend, "_arenas", {}))
    enter(_replace(backend, "unavailable", lambda *_: None))
    return None
