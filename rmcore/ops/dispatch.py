"""Which backend runs an operation: a table of orders, and :func:`explain`, which tells without running."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import BackendError, reject
from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.self_check import refusal
from rmcore.ops.sources import kernel_of
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["OPS", "Backend", "Explanation", "explain", "select"]

log = logging.getLogger(__name__)

Weights: TypeAlias = FeatureMap | HeadWeights | AttributeWeights | Tensor
Backend: TypeAlias = Literal["auto", "torch", "cpu", "triton", "cuda"]
OPS = ("score", "accumulate", "pair_variance", "power_iteration", "score_attributes")

# Fastest first, by device type, as measured (bench/results/cpu.json, gpu-*.json): on GPUs one launch with grid barriers
# for small batches, GEMM-shaped kernels for the rest (_order).
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_ALL = ("cuda", "triton", "cpu", "torch")
LATENCY_ROWS = 16
"""Up to here the one cooperative launch of cuda is the faster one."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend would run (``none`` where a named one cannot), and why each other considered would not."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: chosen", *(f"{name}: {why}" for name, why in self.reasons.items())])


def explain(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
    backend: Backend = "auto",
    *,
    rows: int | None = None,
    weights: Weights | None = None,
) -> Explanation:
    """Which backend ``op`` would run on, and why the others would not.

    Args:
        op: ``score``, ``accumulate``, ``pair_variance``, ``power_iteration`` or ``score_attributes``.
        device: of the tensors.
        dtype: of the head, or of the matrix.
        backend: as the operation would be called.
        rows: rows of the batch, where the answer depends on it.
        weights: the head (or power iteration's matrix), likewise.

    Raises InputError for an unknown operation or backend.
    """
    if op not in OPS:
        reject("op", repr(op), f"one of {', '.join(OPS)}")
    if backend not in ("auto", *_ALL):
        _reject_backend(backend)
    name, reasons = _first(op, torch.device(device), dtype, backend, rows, weights)
    return Explanation(name, reasons)


def _first(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    rows: int | None,
    weights: Weights | None,
) -> tuple[str, dict[str, str]]:
    """The first backend of the order that can run, or ``none``, and why those before it cannot."""
    order = _order(op, device, dtype, rows) if backend == "auto" else (backend,)
    reasons: dict[str, str] = {}
    for name in order:
        module = _module(name)
        why = "not part of this build" if module is None else module.unavailable(op, device, dtype)
        if why is None and rows is not None and hasattr(module, "declines"):
            why = module.declines(op, rows, weights)
        if why is None and device.type == "cuda":
            kernel = module.kernel(op, dtype, rows) if hasattr(module, "kernel") else kernel_of(op, dtype)
            why = refusal(name, kernel, device)
            if why is None:
                _settle_form(module, name, op, device)
        if why is None:
            return name, reasons
        reasons[name] = why
    return "none", reasons


def _settle_form(module: Any, name: str, op: str, device: torch.device) -> None:
    """Where a backend would serve large calls by a form that is not right on this card, have it serve the plain one."""
    kernel = module.form_kernel(op) if hasattr(module, "form_kernel") else None
    if kernel is not None and refusal(name, kernel, device) is not None:
        module.give_up(kernel, device)


def _order(op: str, device: torch.device, dtype: torch.dtype, rows: int | None) -> tuple[str, ...]:
    """Which backends to try, fastest first: on a GPU as measured on an H100, h = D = 4096 (bench/results/).

    ``score``: at 16 rows cuda takes 29.2 µs and triton 34.8, at 32 rows 47.1 and 36.5. ``power_iteration`` in 16 bits:
    34.4 and 22.8 µs; in float32 39.0 and 34.7.
    """
    order = _ORDER.get(device.type, ("torch",))
    many = op == "score" and rows is not None and rows > LATENCY_ROWS
    if device.type == "cuda" and many and _module("cuda").prefers(op, rows, dtype):
        return order
    if device.type == "cuda" and (many or (op == "power_iteration" and dtype.itemsize == 2)):
        return tuple(sorted(order, key=("triton", "cuda", "torch").index))
    return order


@functools.cache
def _module(name: str) -> Any:
    home = f"rmcore.ops.backends.{name}"
    return importlib.import_module(home) if importlib.util.find_spec(home) else None


def select(
    op: str,
    tensor: Tensor,
    dtype: torch.dtype,
    backend: Backend,
    weights: Weights | None = None,
) -> Any:
    """The backend module that runs ``op`` on ``tensor``; raises BackendError where the named one cannot."""
    if backend == "auto" and tensor.dtype == torch.float64:
        backend = "torch"  # the kernels compute in float32; who brings float64 wants it kept
    if backend != "auto" and backend not in _ALL:
        _reject_backend(backend)
    name, reasons = _first(op, tensor.device, dtype, backend, tensor.shape[0], weights)
    if name == "none":
        raise BackendError(f"backend: got {backend!r}, which cannot run {op} here: {reasons[backend]}")
    if reasons and name == "torch":
        _tell_fallback(op, tensor.device)
    return _module(name)


@functools.cache
def _tell_fallback(op: str, device: torch.device) -> None:
    """Say once a process and kind of device that ``auto`` has only torch there, unless a head's dtype is why."""
    name, reasons = _first(op, device, torch.float16, "auto", None, None)
    if name == "torch" and device.type not in _told:
        _told.add(device.type)
        why = "; ".join(f"{kernels}: {reason}" for kernels, reason in reasons.items())
        log.warning("backend 'auto' runs on torch, which is slower than rmcore's kernels (%s)", why)


_told: set[str] = set()


def _reject_backend(backend: str) -> NoReturn:
    reject("backend", repr(backend), f"one of auto, {', '.join(_ALL)}")
