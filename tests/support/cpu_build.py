"""A pytest plugin (``-p support.cpu_build``): the CPU kernels of another build in place of those installed.

``RMCORE_CPU_BUILD`` names the module: one with sanitizers (``make sanitize``), or with AVX-512 emulated (``make
test-avx512``). Buffers that the backend hands to the kernels end where they end: the slack that aligning costs would
hide what is read behind them.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch


def _take_place(path: str) -> None:
    spec = importlib.util.spec_from_file_location("rmcore._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rmcore._cpu"] = module
    spec.loader.exec_module(module)


def _exactly(nbytes: int, alignment: int = 64) -> torch.Tensor:
    made = torch.empty(nbytes, dtype=torch.uint8)
    if made.data_ptr() % alignment:
        raw = torch.empty(nbytes + alignment, dtype=torch.uint8)
        made = raw[-raw.data_ptr() % alignment :][:nbytes]
    return made


_take_place(os.environ["RMCORE_CPU_BUILD"])

from rmcore.ops.backends import cpu, cpu_packing  # noqa: E402  (import the module that has just taken its place)

assert cpu._cpu is cpu_packing._cpu is sys.modules["rmcore._cpu"]
cpu.aligned = cpu_packing.aligned = _exactly
cpu._KEPT_BYTES = 0  # of a workspace that an earlier call made larger, a byte too many would be within
