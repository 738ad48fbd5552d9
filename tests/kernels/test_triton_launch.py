"""Kernels started without Triton's own look-up are the very ones it would have found, with the very arguments."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are Python there"),
]
if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["rows"])
    def small_kernel(a, b, stride, rows, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr):
        r = tl.arange(0, BLOCK)
        value = tl.load(a + r * stride, mask=r < rows, other=0.0).to(tl.float32) * scale
        tl.store(b + r, value * 2 if TWICE else value, mask=r < rows)


@pytest.fixture
def started(monkeypatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """(compiled kernel, arguments of its launcher), one for each launch, on a Hopper that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _device: 5, get_current_target=lambda: target
    )
    target = GPUTarget("cuda", 90, 32)
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(CompiledKernel, "run", lambda self, *args: calls.append((self, args)))
    return calls


def test_a_direct_start_is_the_launch_that_triton_would_make(started, monkeypatch):
    from rmcore.kernels import common

    monkeypatch.setattr(common, "_known", {})
    flat, half = torch.zeros(256), torch.zeros(256).half()
    cases = [
        (flat, flat, 16, 16, 0.5, 16, False),
        (flat[1:], flat, 16, 17, 0.5, 16, False),  # not at a multiple of 16 bytes
        (flat[4:], flat, 16, 1, 0.5, 16, False),  # at one
        (half, flat, 16, 16, 0.5, 16, False),
        (flat, flat, 1, 16, 1.0, 16, False),
        (flat, flat, 17, 16, 0.5, 16, False),
        (flat, flat, 1 << 33, 16, 0.5, 16, False),  # 64 bits
        (flat, flat, 16, 16, 0.5, 32, False),
        (flat, flat, 16, 16, 0.5, 16, True),
    ]
    for a, b, stride, rows, scale, block, twice in cases * 2:
        options = {"BLOCK": block, "TWICE": twice, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        common.launch(small_kernel, (3, 2), a, b, stride, rows, scale, BLOCK=block, TWICE=twice, warps=4, stages=1)
        want = small_kernel.run(a, b, stride, rows, scale, grid=(3, 2), warmup=True, **options)
        compiled, arguments = started[-1]
        assert compiled.hash == want.hash
        assert arguments[:4] == (3, 2, 1, 5)
        assert arguments[9:] == (a.data_ptr(), b.data_ptr(), stride, rows, scale, block, twice)
    assert len(started) == 2 * len(cases)
    assert len({compiled.hash for compiled, _ in started}) == len(cases) - 1  # ``flat[4:]`` is as good as ``flat``
    assert len(common._known) >= len(cases) - 1


def test_who_wants_to_hear_of_launches_does(started, monkeypatch):
    from rmcore.kernels import common

    heard = []
    monkeypatch.setattr(common, "_start", lambda *_: pytest.fail("started past the hook"))
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        a = torch.zeros(32)
        common.launch(small_kernel, (1,), a, a, 16, 16, 0.5, BLOCK=16, TWICE=False, warps=4, stages=1)
    finally:
        hook.remove(heard.append)
    assert len(started) == 1
