"""The Triton kernels on a GPU: numbers against float64 at every row of the tables, bits, graphs, streams, big heads."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_checks as checks
from support.attribute_checks import ATTRIBUTE_HEADS, check_scores, make_heads

from rmcore import ops
from rmcore.kernels import heuristics
from rmcore.ops.backends import triton as backend
from rmcore.ops.tasks import AccumulateTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One below, at and above every limit of the tables, and beyond the last one.
ROWS = [1, 2, 3, 7, 16, 17, 33, 64, 65, 127, 129, 257, 513, 1025]


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with checks.poisoned_workspaces():
        yield
    torch.cuda.synchronize()


def rows_of(count: int, h: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, h, device="cuda").to(dtype)


def test_it_runs_here():
    for dtype in DTYPES:
        assert backend.unavailable("score", torch.device("cuda", 0), dtype) is None
    assert "cpu" in str(backend.unavailable("score", torch.device("cpu"), torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_at_every_row_of_the_tables(dtype):
    weights = checks.make_head(384, 900, dtype, device="cuda")
    for rows in ROWS if dtype == torch.float16 else ROWS[::3]:
        checks.check_score(rows_of(rows, 384, dtype), weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_at_odd_sizes(dtype):
    for h, d in ((1, 1), (100, 300), (257, 129)):
        weights = checks.make_head(h, d, dtype, device="cuda")
        for rows in (5, 130):
            checks.check_score(rows_of(rows, h, dtype), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "head",
    [
        {"layer": 136, "activation": "tanh"},
        {"layer": 136, "activation": "tanh", "layernorm": True},
        {"features": "linear"},
        {"features": "linear", "layer": 90, "projection": False, "layernorm": True},
        {"features": "linear", "projection": False},
    ],
    ids=lambda head: "-".join(head),
)
def test_score_of_every_kind_of_head(head, dtype):
    weights = checks.make_head(128, 200, dtype, device="cuda", input_scale=0.25, **head)
    for rows in (5, 130):
        checks.check_score(rows_of(rows, 128, dtype), weights)


@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_score_of_hidden_states_in_another_dtype(hidden_dtype):
    for dtype in (torch.float16, torch.bfloat16):
        weights = checks.make_head(128, 200, dtype, device="cuda", input_scale=0.5)
        for rows in (5, 30, 130):
            checks.check_score(rows_of(rows, 128, hidden_dtype), weights)


def test_strided_rows_score_like_contiguous_ones():
    weights = checks.make_head(64, 200, torch.float16, device="cuda")
    wide = rows_of(80, 150, torch.float16)
    for hidden in (
        wide[:, :64],
        wide[:, 3:67],
        wide[::2, :64],
        wide[:, 10:138:2],
        wide[:64, :9].mT,
        wide[:1, :64].expand(6, -1),
    ):
        got = checks.check_score(hidden, weights)
        plain = torch.empty_like(got)
        backend.score(hidden.contiguous(), weights, plain)
        assert torch.equal(got, plain)


def test_a_non_finite_row_spoils_only_itself():
    weights = checks.make_head(128, 300, torch.float16, device="cuda")
    for rows in (3, 20, 65, 600, 1100):
        hidden = rows_of(rows, 128, torch.float16)
        clean = checks.check_score(hidden, weights)
        bad = rows // 2
        for value in (math.nan, math.inf):
            spoiled = hidden.clone()
            spoiled[bad, 5] = value
            out = torch.empty_like(clean)
            backend.score(spoiled, weights, out)
            keep = torch.arange(rows, device="cuda") != bad
            assert not bool(out[:, bad].isfinite().any())
            assert torch.equal(out[:, keep], clean[:, keep])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paired", [False, True])
def test_accumulate(dtype, paired):
    weights = checks.make_head(128, 700, dtype, device="cuda")
    hidden = rows_of(1000, 128, dtype)
    pairs = torch.randint(0, 1000, (777, 2), device="cuda") if paired else None
    n = 777 if paired else 1000
    labels = torch.rand(n, device="cuda")
    for precision_dtype in (torch.float32, torch.float64):
        checks.check_accumulate(hidden, labels, weights, precision_dtype=precision_dtype, pairs=pairs)
    sample_weight = torch.rand(n, device="cuda")
    checks.check_accumulate(hidden, labels, weights, pairs=pairs, sample_weight=sample_weight, likelihood="gaussian")


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_variance(dtype):
    weights = checks.make_head(128, 500, dtype, device="cuda")
    for sizes in ([2], [4] * 40, [1, 5, 0, 3, 2, 7, 2, 9] * 20):
        hidden = rows_of(sum(sizes), 128, dtype)
        checks.check_pair_variance(hidden[:1] + 0.1 * hidden, sizes, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(dtype):
    weights = checks.make_head(100, 300, dtype, device="cuda")
    names = torch.arange(6).repeat(20)
    hidden = rows_of(6, 100, dtype)[names.cuda()]
    g, v = backend.pair_variance(hidden, torch.tensor([len(names)]), weights)
    i, j = torch.triu_indices(len(names), len(names), 1)
    same = (names[i] == names[j]).cuda()
    assert not g[same].any()
    assert not v[same].any()
    assert bool((v[~same] > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_iteration(dtype):
    for shape in ((7, 130), (200, 33), (1000, 5120), (513, 16384)):
        weight = rows_of(*shape, dtype)
        for iterations in (1, 3):
            checks.check_power_iteration(weight, torch.randn(shape[1], device="cuda"), iterations)
    sigma, v = backend.power_iteration(torch.zeros(30, 40, device="cuda"), torch.ones(40, device="cuda"), 2)
    assert float(sigma) == 0
    torch.testing.assert_close(v, torch.full_like(v, 1 / math.sqrt(40)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_heads(dtype):
    weights = checks.make_head(4096, 4096, dtype, device="cuda")
    for rows in (1, 64, 129, 256, 1024, 4096):
        hidden = rows_of(rows, 4096, dtype)
        first = checks.check_score(hidden, weights)
        for _ in range(3):
            again = torch.empty_like(first)
            backend.score(hidden, weights, again)
            assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_program_to_come_finds_what_all_others_have_stored(dtype):
    """Fifty calls, each with poisoned workspaces: a sum taken too early would be NaN, or move from call to call."""
    for h, d in ((384, 900), (4096, 4096)):
        weights = checks.make_head(h, d, dtype, device="cuda")
        for rows in (1, 16, 33, 64, 129, 300, 1025):
            hidden = rows_of(rows, h, dtype)
            with heuristics.forms(tail="last"):
                first = checks.check_score(hidden, weights)
                for _ in range(50):
                    again = torch.full_like(first, float("nan"))
                    backend.score(hidden, weights, again)
                    assert torch.equal(first, again)


def test_a_captured_graph_counts_anew_at_every_replay():
    weights, hidden = checks.make_head(512, 1024, torch.float16, device="cuda"), rows_of(40, 512, torch.float16)
    out, want = torch.empty(4, 40, device="cuda"), torch.empty(4, 40, device="cuda")
    with heuristics.forms(tail="last"):
        backend.score(hidden, weights, want)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.score(hidden, weights, out)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_variance_in_the_product(dtype):
    weights = checks.make_head(128, 500, dtype, device="cuda")
    for k in (2, 4, 8):
        for groups in (1, 9, 64, 130):
            hidden = rows_of(groups * k, 128, dtype)
            with heuristics.forms(pairs="in the product"):
                first = checks.check_pair_variance(hidden[:1] + 0.1 * hidden, [k] * groups, weights)
                for _ in range(20):
                    again = backend.pair_variance(hidden[:1] + 0.1 * hidden, torch.full((groups,), k), weights)
                    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_large_accumulate_is_repeatable():
    weights = checks.make_head(1024, 4096, torch.float16, device="cuda")
    hidden, labels = rows_of(20000, 1024, torch.float16), torch.rand(20000, device="cuda")
    first = checks.check_accumulate(hidden, labels, weights)
    second = checks.check_accumulate(hidden, labels, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_waits_for_the_gpu():
    weights = checks.make_head(128, 300, torch.float16, device="cuda")
    hidden, labels = rows_of(130, 128, torch.float16), torch.rand(130, device="cuda")
    precision, gradient = torch.zeros(300, 300, device="cuda"), torch.zeros(300, device="cuda")
    pairs = torch.randint(0, 130, (70, 2), device="cuda")
    out = torch.empty(4, 130, device="cuda")
    matrix, vector = torch.randn(50, 60, device="cuda"), torch.randn(60, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the GPU now raises
    try:
        backend.score(hidden, weights, out)
        for index, y in ((None, labels), (pairs, labels[:70])):
            backend.accumulate(
                AccumulateTask(hidden, y, weights.map, weights.beta, precision, gradient, index, None, 0.0, "logistic")
            )
        for sizes in (torch.full((13,), 10), torch.tensor([3, 7] * 13)):
            backend.pair_variance(hidden, sizes, weights)
        backend.power_iteration(matrix, vector, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graphs_replay_on_new_data():
    weights = checks.make_head(128, 300, torch.float16, device="cuda")
    hidden, labels = rows_of(130, 128, torch.float16), torch.rand(130, device="cuda")
    precision, gradient = torch.zeros(300, 300, device="cuda"), torch.zeros(300, device="cuda")
    out = torch.empty(4, 130, device="cuda")
    sizes = torch.full((13,), 10)
    ragged = torch.tensor([3, 7] * 13)
    matrix, vector = torch.randn(50, 60, device="cuda"), torch.randn(60, device="cuda")

    def everything() -> list[torch.Tensor]:
        backend.score(hidden, weights, out)
        precision.zero_()
        gradient.zero_()
        total = backend.accumulate(
            AccumulateTask(hidden, labels, weights.map, weights.beta, precision, gradient, None, None, 0.0, "logistic")
        )
        same, mixed = (backend.pair_variance(hidden, s, weights) for s in (sizes, ragged))
        sigma, v = backend.power_iteration(matrix, vector, 3)
        return [out, precision, gradient, total, *same, *mixed, sigma, v]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for _ in range(2):
        hidden.copy_(rows_of(130, 128, torch.float16))
        matrix.copy_(torch.randn(50, 60, device="cuda"))
        graph.replay()
        replayed = [t.clone() for t in captured]
        eager = [t.clone() for t in everything()]
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_two_streams_do_not_disturb_each_other():
    weights = checks.make_head(512, 900, torch.float16, device="cuda")
    batches = [rows_of(300, 512, torch.float16) for _ in range(6)]
    want = [torch.empty(4, 300, device="cuda") for _ in batches]
    for hidden, out in zip(batches, want, strict=True):
        backend.score(hidden, weights, out)
    got = [torch.empty_like(out) for out in want]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for turn, (hidden, out) in enumerate(zip(batches, got, strict=True)):
        with torch.cuda.stream(streams[turn % 2]):
            backend.score(hidden, weights, out)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_ops_choose_it_for_large_batches():
    weights = checks.make_head(128, 300, torch.float16, device="cuda")
    hidden = rows_of(200, 128, torch.float16)
    assert ops.explain("score", "cuda", torch.float16, rows=200, weights=weights).backend == "triton"
    named = ops.score(hidden, weights, backend="triton")
    chosen = ops.score(hidden, weights)
    assert all(torch.equal(a, b) for a, b in zip(named, chosen, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attribute_heads_at_every_row_of_the_tables(dtype):
    for kind, options in ATTRIBUTE_HEADS.items():
        heads = make_heads(384, dtype, **options).to("cuda")
        for rows in ROWS if kind == "selu" else ROWS[::4]:
            hidden = rows_of(rows, 384, dtype)
            first = check_scores(backend, hidden, heads)
            for _ in range(5):
                again = backend.score_attributes(hidden, heads, None)
                assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))
    gated = make_heads(384, dtype, **ATTRIBUTE_HEADS["softmax"]).to("cuda")
    check_scores(backend, rows_of(70, 384, dtype), gated, rows_of(70, 384, dtype))
