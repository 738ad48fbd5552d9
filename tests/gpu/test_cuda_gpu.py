"""The cuda backend on a GPU: numbers against float64, determinism, isolation, graphs, streams, errors.

``-k sanitizer`` selects the small shapes for compute-sanitizer (memcheck, racecheck).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import cuda_checks as checks
from cuda_checks import head, rows_of

from rmcore import ops
from rmcore._base import errors
from rmcore.ops import reference
from rmcore.ops.backends import cuda
from rmcore.ops.weights import HeadWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _backend_runs():
    reason = cuda.unavailable("score", torch.device("cuda", torch.cuda.current_device()), torch.float16)
    if reason is not None:
        pytest.fail(f"the cuda backend must run on this machine: {reason}")


@pytest.fixture(autouse=True)
def _poisoned_workspaces():
    """Every test starts with workspaces full of NaN bit patterns."""
    for workspace in cuda._workspaces.values():
        workspace.fill_(0xFF)
    yield
    torch.cuda.synchronize()


def run(hidden: Tensor, weights: HeadWeights) -> Tensor:
    out = torch.full((4, hidden.shape[0]), math.nan, device="cuda")
    ops.score(hidden, weights, backend="cuda", out=out)
    return out


def check(hidden: Tensor, weights: HeadWeights) -> None:
    checks.check(run(hidden, weights), hidden, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64])
def test_every_batch_size(b, dtype):
    check(rows_of(b, 1024, dtype), head(1024, 1024, dtype=dtype))


@pytest.mark.parametrize("b", [1, 5, 16, 17, 64])
@pytest.mark.parametrize(
    ("h", "d"), [(1, 1), (7, 15), (8, 16), (31, 17), (33, 127), (100, 129), (520, 1000), (1000, 520), (896, 2048)]
)
def test_edges_of_h_and_d(h, d, b):
    check(rows_of(b, h), head(h, d))


@pytest.mark.parametrize(("h", "d"), [(4096, 4096), (8192, 8192), (2048, 8192), (8192, 1024), (5120, 6144)])
@pytest.mark.parametrize("b", [1, 16, 64])
def test_full_sizes(h, d, b):
    check(rows_of(b, h), head(h, d))


@pytest.mark.parametrize("rows", [*DTYPES, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_rows(rows, dtype):
    check(rows_of(6, 640, rows), head(640, 512, dtype=dtype))


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize(("h", "m", "d", "b"), [(96, 64, 160, 4), (75, 51, 99, 30), (1024, 1024, 2048, 64)])
def test_unfolded_heads(h, m, d, b, layernorm, activation):
    check(rows_of(b, h), head(h, d, m, layernorm=layernorm, activation=activation))


@pytest.mark.parametrize("b", [4, 40])
def test_strided_rows(b):
    weights = head(512, 384)
    wide = rows_of(2 * b, 1040)
    contiguous = wide[::2, 8:520].contiguous()
    expected = run(contiguous, weights)
    assert torch.equal(run(wide[::2, 8:520], weights), expected)  # read in place
    assert torch.equal(run(wide[::2, 5:517], weights), run(wide[::2, 5:517].contiguous(), weights))  # converted
    assert torch.equal(run(contiguous.T.contiguous().T, weights), expected)
    assert torch.equal(run(contiguous[:1].expand(b, -1), weights), expected[:, :1].expand(-1, b))


def test_input_scale_saves_massive_activations():
    weights = head(256, 256, scale=2.0**-6)
    hidden = rows_of(5, 256, torch.float32) * 64
    hidden[2, 3] = 300_000.0
    assert torch.isfinite(run(hidden, weights)).all()
    check(hidden, weights)


@pytest.mark.parametrize("b", [12, 20, 60])
def test_a_nan_row_stays_alone(b):
    weights, hidden = head(512, 768), rows_of(b, 512)
    clean = run(hidden, weights)
    hidden[3, 7], hidden[b - 1, 511] = math.nan, math.inf
    dirty = run(hidden, weights)
    bad = torch.zeros(b, dtype=torch.bool, device="cuda")
    bad[[3, b - 1]] = True
    assert dirty[:, bad].isnan().all()
    assert torch.equal(dirty[:, ~bad], clean[:, ~bad])


@pytest.mark.parametrize("b", [1, 16, 33, 64])
def test_results_repeat_bit_for_bit(b):
    weights, hidden = head(2048, 2048), rows_of(b, 2048)
    first = run(hidden, weights)
    for value in (0x00, 0xFF, 0x7F):
        for workspace in cuda._workspaces.values():
            workspace.fill_(value)
        assert torch.equal(run(hidden, weights), first)
    for _ in range(200):
        assert torch.equal(run(hidden, weights), first)


def test_a_row_does_not_depend_on_its_neighbours():
    weights, hidden = head(512, 512), rows_of(64, 512)
    assert torch.equal(run(hidden, weights), run(hidden.flip(0), weights).flip(1))


def test_empty_batch():
    assert run(rows_of(0, 64), head(64, 64)).shape == (4, 0)


def capture(function) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@pytest.mark.parametrize("b", [1, 64])
@pytest.mark.parametrize("m", [0, 512])
def test_graph_capture_and_replay(b, m):
    weights, hidden = head(512, 1024, m, layernorm=m > 0), rows_of(b, 512)
    out = torch.full((4, b), math.nan, device="cuda")
    graph = capture(lambda: ops.score(hidden, weights, backend="cuda", out=out))
    for seed in range(5):
        hidden.copy_(rows_of(b, 512, seed=seed))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run(hidden, weights))


def test_two_streams_at_once():
    weights = [head(2048, 2048, seed=s) for s in range(2)]
    hidden = [rows_of(b, 2048, seed=b) for b in (9, 64)]
    expected = [run(x, w) for x, w in zip(hidden, weights, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(run(hidden[i], weights[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(r, expected[i]) for r in results[i])


def test_arguments_are_checked():
    weights = head(64, 64)
    with pytest.raises(errors.BackendError, match="batch of 65 rows"):
        ops.score(rows_of(65, 64), weights, backend="cuda")
    with pytest.raises(errors.BackendError, match="not float32"):
        ops.score(rows_of(1, 64, torch.float32), head(64, 64, dtype=torch.float32), backend="cuda")
    native = cuda._native()
    plan = native.PowerPlan(8, 8, 2, 0)
    memory = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    arguments = [plan, "float16", memory.data_ptr(), 8, 8, 8, memory.data_ptr(), 1, memory.data_ptr()]
    with pytest.raises(ValueError, match="workspace: got 16 bytes"):
        native.power_iteration(*arguments, memory.data_ptr(), memory.data_ptr(), 16, 0, 0)
    with pytest.raises(RuntimeError, match=r"^cuda\w+: .* \(\d+\)$"):
        native.properties(10_000)
    check(rows_of(3, 64), weights)  # an error leaves nothing behind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "h"),
    [(1, 1), (1, 4096), (5, 37), (64, 300), (131, 4096), (132, 4104), (1000, 1000), (4096, 4096), (700, 8192)],
)
def test_power_iteration(m, h, dtype):
    generator = torch.Generator("cuda").manual_seed(m)
    weight = (torch.randn(m, h, generator=generator, device="cuda") / math.sqrt(h)).to(dtype)
    vector = torch.randn(h, generator=generator, device="cuda")
    for iterations in (1, 4):
        sigma, v = ops.power_iteration(weight, vector, iterations, backend="cuda")
        expected_sigma, expected = reference.power_iteration(weight.double(), vector.double(), iterations)
        # Products of stored values are exact enough; what is left is float32 summation over h, then over m.
        tolerance = 2.0**-24 * 8 * math.sqrt(max(m, h)) * iterations
        torch.testing.assert_close(sigma.double(), expected_sigma, rtol=tolerance, atol=0)
        assert (v.double() - expected).norm() <= tolerance
        again, w = ops.power_iteration(weight, vector, iterations, backend="cuda")
        assert torch.equal(again, sigma)
        assert torch.equal(w, v)


def test_power_iteration_of_views_zero_and_wide():
    vector = torch.randn(64, device="cuda")
    wide = torch.randn(40, 100, device="cuda").half()
    view = wide[:, 3:67]
    sigma, v = ops.power_iteration(view, vector, 3, backend="cuda")
    other, w = ops.power_iteration(view.contiguous(), vector, 3, backend="cuda")
    assert torch.equal(sigma, other)
    assert torch.equal(v, w)
    sigma, v = ops.power_iteration(torch.zeros(40, 64, device="cuda"), vector, 3, backend="cuda")
    assert sigma == 0
    torch.testing.assert_close(v, vector / vector.norm())
    with pytest.raises(errors.BackendError, match="columns"):
        ops.power_iteration(torch.zeros(2, 16400, device="cuda"), torch.ones(16400, device="cuda"), backend="cuda")


def test_power_iteration_in_a_graph():
    weight, vector = torch.randn(512, 640, device="cuda"), torch.randn(640, device="cuda")
    results: list[tuple[Tensor, Tensor]] = []
    graph = capture(lambda: results.append(ops.power_iteration(weight, vector, 2, backend="cuda")))
    weight.copy_(torch.randn(512, 640, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    sigma, v = ops.power_iteration(weight, vector, 2, backend="cuda")
    assert torch.equal(results[-1][0], sigma)
    assert torch.equal(results[-1][1], v)


@pytest.mark.parametrize("streamed", [True, False])
def test_small_batches_both_ways(streamed, monkeypatch):
    """Up to 16 rows of a folded head: by the streamed kernel, and by the one that serves all other calls."""
    monkeypatch.setattr(cuda, "STREAMED", streamed)
    for h, d in ((1, 1), (33, 127), (520, 1000), (1025, 1100), (2048, 512), (4096, 2048)):
        for dtype in DTYPES:
            weights = head(h, d, dtype=dtype)
            for b in (1, 3, 8, 9, 16):
                hidden = rows_of(b, h + 5, dtype)
                check(hidden[:, :h], weights)
                check(hidden[:, 2 : h + 2], weights)  # not aligned to 16 bytes
                check(hidden.float()[:, :h], weights)
                first = run(hidden[:, :h], weights)
                assert all(torch.equal(first, run(hidden[:, :h], weights)) for _ in range(5))
            assert {plan.streamed for plan in weights.cache["cuda"].plans.values()} == {streamed}


@pytest.mark.parametrize("b", [1, 16, 40])
def test_sanitizer_score(b):
    """Whole and split shares, a converted and an in-place batch, a head that does not fold."""
    for weights in (head(72, 200), head(67, 130), head(64, 100, 48, layernorm=True)):
        check(rows_of(b, weights.hidden_size), weights)
        check(rows_of(b, weights.hidden_size, torch.float32), weights)


def test_sanitizer_score_split():
    check(rows_of(40, 2048), head(2048, 512))


@pytest.mark.parametrize(("m", "h"), [(37, 100), (9, 4200)])
def test_sanitizer_power_iteration(m, h):
    weight, vector = torch.randn(m, h, device="cuda").half(), torch.randn(h, device="cuda")
    sigma, _ = ops.power_iteration(weight, vector, 2, backend="cuda")
    expected, _ = reference.power_iteration(weight.double(), vector.double(), 2)
    torch.testing.assert_close(sigma.double(), expected, rtol=1e-5, atol=0)
