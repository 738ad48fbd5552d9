"""The cuda backend without a GPU: it imports, counts no devices and says why it cannot run."""

from __future__ import annotations

import ctypes
import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmcore import ops
from rmcore._base import errors
from rmcore.ops.backends import cuda, cuda_mid
from rmcore.ops.quantize import quantize_projection
from rmcore.ops.weights import FeatureMap, HeadWeights

CUDA = torch.device("cuda", 0)


def head(h=8, d=16, features="rff"):
    generator = torch.Generator().manual_seed(0)
    feature_map = FeatureMap(
        features=features,
        projection=torch.randn(d, h, generator=generator).half() if features == "rff" else None,
        phase=torch.zeros(d) if features == "rff" else None,
        layer_weight=None,
        layer_bias=None,
        activation="none",
        layernorm=False,
        hidden_size=h,
        num_features=d,
        dtype=torch.float16,
    )
    factor = torch.eye(d, dtype=torch.float64)
    return HeadWeights.build(feature_map, torch.ones(d, dtype=torch.float64), 0.0, factor, math.pi / 8)


@pytest.mark.parametrize("op", ["accumulate", "pair_variance"])
def test_throughput_operations_are_left_to_triton(op):
    assert "triton" in cuda.unavailable(op, CUDA, torch.float16)


def test_unavailable_names_what_is_missing():
    assert "on cpu" in cuda.unavailable("score", torch.device("cpu"), torch.float16)
    assert "not float32" in cuda.unavailable("score", CUDA, torch.float32)
    assert "not float64" in cuda.unavailable("power_iteration", CUDA, torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("op", ["score", "power_iteration"])
def test_without_a_device_it_says_so(op):
    reason = cuda.unavailable(op, CUDA, torch.float16)
    assert "no CUDA device" in reason or "not part of this build" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_module_imports_and_reports_zero_devices():
    native = pytest.importorskip("rmcore._cuda")
    assert native.device_count() == 0
    with pytest.raises(RuntimeError, match=r"^cudaGetDeviceProperties: .* \(\d+\)$"):
        native.properties(0)


def test_shapes_it_declines():
    assert cuda.declines("score", 64, head()) is None
    assert str(cuda.declines("score", 65, head())).startswith("batch of 65 rows: the latency kernel serves up to 64;")
    assert cuda.declines("score", 513, head()) == "batch of 513 rows: the latency kernel serves up to 64"
    assert "projection" in cuda.declines("score", 1, head(h=16, features="linear"))


def int8_head(h=40, d=64):
    fields: Any = quantize_projection(torch.randn(d, h).double() / h, torch.rand(d).double(), torch.randn(20, h))
    feature_map = FeatureMap(
        features="rff", layer_weight=None, layer_bias=None, activation="none", layernorm=False, hidden_size=h,
        num_features=d, dtype=torch.int8, **fields,
    )  # fmt: skip
    factor = torch.randn(d, d).tril().double()
    return HeadWeights.build(feature_map, torch.ones(d, dtype=torch.float64), 0.25, factor, math.pi / 8)


class Int8Native(SimpleNamespace):
    """As much of the native module as int8 heads need, on a device that is not there."""

    def __init__(self, capability=(9, 0), slots=9):
        super().__init__(calls=[], score_int8=lambda *arguments: self.calls.append(arguments))
        self.properties = lambda _index: {"capability": capability, "cooperative": 1}
        self.device_count = lambda: 1
        self.Int8Head = lambda **fields: fields
        self.Int8Plan = lambda _head, rows, _device: SimpleNamespace(slots=slots, workspace_bytes=1024, rows=rows)


def test_int8_heads_are_declined_where_their_kernel_does_not_serve(monkeypatch):
    monkeypatch.setattr(cuda, "_native", lambda: SimpleNamespace(device_count=lambda: 1, properties=lambda _: {
        "capability": (9, 0), "cooperative": 1,
    }))  # fmt: skip
    cuda._lacking.cache_clear()
    assert "older build" in str(cuda.unavailable("score", CUDA, torch.int8))
    monkeypatch.setattr(cuda, "_native", lambda: Int8Native((8, 0)))
    cuda._lacking.cache_clear()
    assert cuda.unavailable("score", CUDA, torch.float16) is None
    assert cuda.unavailable("score", CUDA, torch.int8) == "int8 heads need compute capability 9.0"
    monkeypatch.setattr(cuda, "_native", Int8Native)
    cuda._lacking.cache_clear()
    assert cuda.unavailable("score", CUDA, torch.int8) is None
    assert cuda.declines("score", 16, int8_head()) is None
    assert "of int8 heads the latency kernel serves up to 16" in str(cuda.declines("score", 17, int8_head()))
    cuda._lacking.cache_clear()


def test_an_int8_head_goes_to_the_native_module_as_it_lies(monkeypatch):
    native, weights = Int8Native(), int8_head()
    monkeypatch.setattr(cuda, "_native", lambda: native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    hidden, out = torch.randn(3, 80).half()[:, ::2], torch.empty(4, 3)
    cuda.score(hidden, weights, out)
    (head, plan, _, dtype, stride, rows, target, _, size, device, stream), m = native.calls[0], weights.map
    assert (dtype, stride, rows, target, device, stream) == ("float16", 40, 3, out.data_ptr(), 0, 7)
    assert plan.rows == 8
    assert size >= plan.workspace_bytes
    assert head["projection_pitch"] == 48  # rows of 40 bytes end in zeros up to a multiple of 16
    kept = weights.cache["cuda_int8"].tensors
    assert torch.equal(kept[0][:, :40], m.projection)
    assert not bool(kept[0][:, 40:].any())
    assert head["projection"] == kept[0].data_ptr()
    for name, tensor in (
        ("projection_scale", m.projection_scale), ("phase", m.phase), ("beta", weights.beta),
        ("factor", weights.factor), ("factor_scales", weights.factor_row_scale),
        ("diagonal", weights.factor_diagonal), ("hidden_shift", m.hidden_shift), ("hidden_balance", m.hidden_scale),
    ):  # fmt: skip
        assert head[name] == tensor.data_ptr(), name
    assert (head["beta0"], head["amplitude"], head["hidden_size"]) == (0.25, math.pi / 8, 40)


def test_65_to_512_rows_are_off_until_a_card_has_proven_them():
    assert cuda.MID is False
    weights = head()
    assert "is off" in str(cuda.declines("score", 65, weights))
    assert not cuda.prefers("score", 65, torch.float16)
    with cuda.mid():
        assert cuda.declines("score", 65, weights) is None
        assert cuda.declines("score", 513, weights) == "batch of 513 rows: the latency kernel serves up to 64"
        unfolded = replace(weights.map, layer_weight=torch.eye(8).half(), layer_bias=torch.zeros(8))
        assert "folded" in str(cuda.declines("score", 65, replace(weights, map=unfolded)))
        asked = {rows: cuda.prefers("score", rows, torch.float16) for rows in (64, 65, 512, 513)}
        assert asked == {64: False, 65: True, 512: True, 513: False}
        assert not cuda.prefers("score", 65, torch.int8)
        assert not cuda.prefers("power_iteration", 65, torch.float16)
        # What is proven of the latency kernels says nothing of it.
        assert cuda.kernel("score", torch.float16, 65) == "score_mid"
        assert cuda.kernel("score", torch.float16, 64) == cuda.kernel("score", torch.float16) == "score"
        assert cuda.kernel("score", torch.int8, 65) == "score_int8"
    assert cuda.MID is False
    assert cuda.kernel("score", torch.float16, 65) == "score"


def test_65_to_512_rows_are_handed_over_in_the_heads_dtype_from_multiples_of_16_bytes(monkeypatch):
    calls: list[Any] = []
    native = SimpleNamespace(
        device_count=lambda: 1, properties=lambda _: {"capability": (9, 0), "cooperative": 1},
        Head=lambda **fields: fields, MidHead=lambda given: ("maps", given),
        MidPlan=lambda _head, rows, _device: SimpleNamespace(columns=128, workspace_bytes=1024, rows=rows),
        score_mid=lambda *given: calls.append((given, rows_at(given))),
    )  # fmt: skip

    def rows_at(given: Any) -> Tensor:
        """What the addresses say, while the rows are alive."""
        address, stride, rows = given[2], given[4], given[5]
        raw = (ctypes.c_char * (2 * stride * rows)).from_address(address)
        return torch.frombuffer(raw, dtype=torch.float16).view(rows, stride)[:, :8].clone()

    monkeypatch.setattr(cuda, "_native", lambda: native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weights, wide = head(), torch.randn(140, 24).half()
    scaled = replace(weights, map=replace(weights.map, input_scale=0.25))
    with cuda.mid():
        for hidden in (wide[:70, :8], wide[::2, 8:16], wide[::2, 3:11], wide[:70, :16:2], wide[:1, :8].expand(70, -1)):
            for rows in (hidden, hidden.float(), hidden.double()):
                out = torch.empty(4, 70)
                cuda.score(rows, weights, out)
                given, read = calls.pop()
                assert given[0][0] == "maps"
                assert given[1].rows == given[5] == 70
                assert given[2] % 16 == 0
                assert given[3] == "float16"
                assert given[4] % 8 == 0
                assert given[6] == out.data_ptr()
                assert torch.equal(read, hidden)
                assert cuda_mid.in_place(rows, weights) == (given[2] == rows.data_ptr())
        cuda.score(wide[:70, :8], scaled, out)
        assert torch.equal(calls.pop()[1], wide[:70, :8] / 4)


def test_an_explicit_backend_raises_on_cpu_tensors():
    with pytest.raises(errors.BackendError, match="on cpu"):
        ops.score(torch.zeros(1, 8), head(), backend="cuda")


def test_aligned_copies_only_what_it_must():
    matrix = torch.randn(6, 16).half()
    assert cuda._aligned(matrix) is matrix
    wide = torch.randn(6, 24).half()[:, :16]
    assert cuda._aligned(wide) is wide
    for odd in (torch.randn(5, 13).half(), torch.randn(16, 5).half().T, torch.randn(4, 17).half()[:, 1:]):
        copy = cuda._aligned(odd)
        assert copy.stride(0) % 8 == 0
        assert copy.stride(1) == 1
        assert torch.equal(copy[:, : odd.shape[1]], odd)
        assert not copy[:, odd.shape[1] :].any()


def test_a_launch_that_gave_up_is_told_at_the_next_call_and_ends_the_backends_service(monkeypatch, caplog):
    class BarrierTimeout(RuntimeError):  # noqa: N818 (the native module's name)
        pass

    def launch():
        raise BarrierTimeout("thread block 3 did not come to grid barrier 1 of an earlier score within 4 s")

    monkeypatch.setattr(cuda, "_native", lambda: SimpleNamespace(BarrierTimeout=BarrierTimeout))
    monkeypatch.setattr(cuda, "_hung", [])
    with caplog.at_level(logging.ERROR), pytest.raises(errors.BackendError, match="thread block 3 did not come"):
        cuda._run(launch)
    assert "thread block 3" in caplog.text
    assert "thread block 3" in cuda.unavailable("score", CUDA, torch.float16)
    explained = ops.explain("score", "cuda", torch.float16, "cuda")
    assert explained.backend == "none"
    assert "serves no more" in explained.reasons["cuda"]


def test_another_error_of_a_launch_is_an_error_and_no_more(monkeypatch):
    monkeypatch.setattr(cuda, "_hung", [])
    with pytest.raises(errors.BackendError, match="cuda: cudaLaunch"):
        cuda._run(lambda: (_ for _ in ()).throw(RuntimeError("cudaLaunchCooperativeKernel: too many blocks (720)")))
    assert cuda._hung == []
