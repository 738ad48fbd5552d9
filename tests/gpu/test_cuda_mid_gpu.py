"""65 to 512 rows of folded heads in one launch of the cuda backend, on a Hopper GPU: numbers, bits, graphs, strides.

``-k sanitizer`` selects the small shapes for compute-sanitizer.
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
from rmcore.ops.backends import cuda
from rmcore.ops.weights import HeadWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _served():
    """The launch is on, and every workspace full of NaN bit patterns."""
    for workspace in cuda._workspaces.values():
        workspace.fill_(0xFF)
    with cuda.mid():
        yield
    torch.cuda.synchronize()


def run(hidden: Tensor, weights: HeadWeights) -> Tensor:
    out = torch.full((4, hidden.shape[0]), math.nan, device="cuda")
    ops.score(hidden, weights, backend="cuda", out=out)
    assert "cuda_mid" in weights.cache
    return out


def check(hidden: Tensor, weights: HeadWeights) -> None:
    checks.check(run(hidden, weights), hidden, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [65, 96, 128, 129, 192, 193, 256, 257, 384, 385, 512])
def test_every_batch_size(b, dtype):
    check(rows_of(b, 1024, dtype), head(1024, 1024, dtype=dtype))


@pytest.mark.parametrize("b", [65, 130, 300])
@pytest.mark.parametrize(
    ("h", "d"), [(1, 1), (7, 15), (64, 128), (65, 129), (100, 255), (520, 1000), (1000, 520), (896, 2048)]
)
def test_edges_of_h_and_d(h, d, b):
    check(rows_of(b, h), head(h, d))


@pytest.mark.parametrize(("h", "d"), [(4096, 4096), (8192, 8192), (8192, 1024)])
@pytest.mark.parametrize("b", [65, 256, 512])
def test_full_sizes(h, d, b):
    check(rows_of(b, h), head(h, d))


@pytest.mark.parametrize("rows", [*DTYPES, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_rows(rows, dtype):
    check(rows_of(70, 640, rows), head(640, 512, dtype=dtype))


def test_strided_rows():
    weights, wide = head(512, 384), rows_of(140, 1040)
    contiguous = wide[::2, 8:520].contiguous()
    expected = run(contiguous, weights)
    assert torch.equal(run(wide[::2, 8:520], weights), expected)  # read in place
    assert torch.equal(run(wide[::2, 5:517], weights), run(wide[::2, 5:517].contiguous(), weights))  # copied
    assert torch.equal(run(contiguous.T.contiguous().T, weights), expected)
    assert torch.equal(run(contiguous[:1].expand(70, -1), weights), expected[:, :1].expand(-1, 70))


def test_input_scale_saves_massive_activations():
    weights, hidden = head(256, 256, scale=2.0**-6), rows_of(80, 256, torch.float32) * 64
    hidden[2, 3] = 300_000.0
    assert torch.isfinite(run(hidden, weights)).all()
    check(hidden, weights)


@pytest.mark.parametrize("b", [66, 200])
def test_a_nan_row_stays_alone(b):
    weights, hidden = head(512, 768), rows_of(b, 512)
    clean = run(hidden, weights)
    hidden[3, 7], hidden[b - 1, 511] = math.nan, math.inf
    dirty = run(hidden, weights)
    bad = torch.zeros(b, dtype=torch.bool, device="cuda")
    bad[[3, b - 1]] = True
    assert dirty[:, bad].isnan().all()
    assert torch.equal(dirty[:, ~bad], clean[:, ~bad])


@pytest.mark.parametrize("b", [65, 192, 256, 512])
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
    weights, hidden = head(512, 512), rows_of(200, 512)
    assert torch.equal(run(hidden, weights), run(hidden.flip(0), weights).flip(1))


def test_graph_capture_and_replay():
    weights, hidden = head(512, 1024), rows_of(100, 512)
    out = torch.full((4, 100), math.nan, device="cuda")
    run(hidden, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.score(hidden, weights, backend="cuda", out=out)
    for seed in range(3):
        hidden.copy_(rows_of(100, 512, seed=seed))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run(hidden, weights))


def test_two_streams_at_once():
    weights = [head(2048, 2048, seed=s) for s in range(2)]
    hidden = [rows_of(b, 2048, seed=b) for b in (65, 256)]
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


def test_what_it_does_not_serve_goes_the_old_way_and_says_why():
    def why(weights: HeadWeights, rows: int) -> str:
        return ops.explain("score", "cuda", torch.float16, "cuda", rows=rows, weights=weights).reasons["cuda"]

    assert "batch of 513 rows" in why(head(64, 64), 513)
    assert "folded" in why(head(64, 64, 32), 100)
    with cuda.mid(False):
        assert "is off" in why(head(64, 64), 100)
        with pytest.raises(errors.BackendError, match="batch of 100 rows"):
            ops.score(rows_of(100, 64), head(64, 64), backend="cuda")


@pytest.mark.parametrize("b", [65, 130])
def test_sanitizer_score_mid(b):
    for weights in (head(72, 200), head(67, 130), head(200, 300)):
        check(rows_of(b, weights.hidden_size), weights)
        check(rows_of(b, weights.hidden_size, torch.float32), weights)
