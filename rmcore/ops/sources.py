"""Digests of GPU kernels: what was measured on a card is known again by them, whoever built or installed it.

``cuda``: of csrc/cuda, put into the module by its build (csrc/cuda/sources_digest.cmake). ``triton``: of the files of
``rmcore.kernels`` that an operation launches from, and those that they import, so that a new kernel says nothing
against its neighbours.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["CUDA_ALONE", "LAUNCHED", "build", "kernel_of", "sources", "triton_sources"]

LAUNCHED = {
    "score": ("features", "launches", "score_tail", "variance"),
    "score_int8": ("features_int8", "launches", "score_int8"),
    "accumulate": ("features", "gram"),
    "pair_variance": ("features", "pair_tail", "pair_variance", "variance"),
    "power_iteration": ("power_iteration",),
    "score_attributes": ("score_attributes",),
    "score_persistent": ("features_tma", "launch_tma", "launches", "variance", "variance_tma"),
    "score_specialized": ("features_tma", "launch_tma", "launches", "variance", "variance_tma"),
    "accumulate_persistent": ("features", "features_tma", "gram", "gram_tma", "launch_tma"),
    "accumulate_specialized": ("features", "features_tma", "gram", "gram_tma", "launch_tma"),
}
"""The files of ``rmcore.kernels`` that the ``triton`` backend launches an operation from; see :func:`kernel_of`. The
last four are other forms of large calls (rmcore/ops/backends/triton_tma.py), which serve where they are chosen."""

_OF_CUDA = {"score_int8": "SOURCES_INT8", "score_mid": "SOURCES_MID"}
"""Digests of those kernels of ``cuda`` that have files of their own. ``score_mid`` is ``score`` of 65 to 512 rows there
(:func:`rmcore.ops.backends.cuda.kernel`); no other backend has it."""

CUDA_ALONE = ("score_mid",)
"""Kernels beside :data:`LAUNCHED` that need a proof of their own."""


def kernel_of(op: str, dtype: torch.dtype) -> str:
    """Whose proof an operation needs on weights of ``dtype``: int8 heads have kernels of their own."""
    return f"{op}_int8" if dtype == torch.int8 and f"{op}_int8" in LAUNCHED else op


@functools.cache
def sources(backend: str, op: str) -> str:
    """A digest of what computes ``op`` on a GPU backend; empty where it is not installed or does not know it.

    ``op``: a name of :data:`LAUNCHED` or :data:`CUDA_ALONE`.
    """
    with suppress(ImportError):
        if backend == "cuda":
            return str(getattr(importlib.import_module("rmcore._cuda"), _OF_CUDA.get(op, "SOURCES"), ""))
        if op in CUDA_ALONE:
            return ""
        return triton_sources(Path(str(importlib.import_module("rmcore.kernels.common").__file__)).parent, op)
    return ""


@functools.cache
def build(backend: str, op: str) -> str:
    """The same for what runs here, to the byte: of ``cuda`` the compiled module, which another compiler makes anew."""
    if backend != "cuda":
        return sources(backend, op)
    with suppress(ImportError):
        return hashlib.sha256(Path(str(importlib.import_module("rmcore._cuda").__file__)).read_bytes()).hexdigest()
    return ""


def triton_sources(folder: Path, op: str) -> str:
    """The digest of ``op``'s files and those they import, in a folder of kernels."""
    found: dict[str, bytes] = {}
    wanted = list(LAUNCHED[op])
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = (folder / f"{name}.py").read_bytes()
            wanted += _neighbours(found[name])
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{hashlib.sha256(found[name]).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def _neighbours(text: bytes) -> Iterator[str]:
    """Files of the folder that one of them imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
