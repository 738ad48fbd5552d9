"""The Triton kernels in Triton's interpreter: right before any GPU has seen them.

    TRITON_INTERPRET=1 pytest tests/kernels/test_triton_interpret.py

The variable turns every Triton kernel of a process into Python, so these tests get a process of their own, which
test_triton_interpreter.py starts. bfloat16 is not tested here: the interpreter multiplies its bit patterns. fp16 goes
through the same code.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs its own process with TRITON_INTERPRET=1 set", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import triton
import triton.language as tl
import triton_checks as checks
from support.attribute_checks import ATTRIBUTE_HEADS, GATED, check_scores, make_heads, published_head

from rmcore import ops
from rmcore.kernels import common, heuristics, pair_variance, score_attributes
from rmcore.kernels.heuristics import Tile
from rmcore.ops import plans
from rmcore.ops.backends import triton as backend
from rmcore.ops.tasks import AccumulateTask

DTYPES = [torch.float16, torch.float32]
ROWS = [1, 2, 3, 7, 64, 65, 127, 129]


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with checks.poisoned_workspaces():
        yield


@pytest.fixture
def tiles(monkeypatch):
    """Replace the tables by single tiles."""

    def replace(**chosen: Tile) -> None:
        for name, tile in chosen.items():
            monkeypatch.setattr(heuristics, name, lambda *_, tile=tile: tile)

    return replace


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside, in order."""
    names: list[str] = []
    launch = triton.runtime.interpreter.GridExecutor.__call__
    with mock.patch.object(
        triton.runtime.interpreter.GridExecutor,
        "__call__",
        lambda grid, *args, **kwargs: (names.append(grid.fn.__name__), launch(grid, *args, **kwargs))[1],
    ):
        yield names


# -- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_score_at_every_edge_of_a_tile(rows, dtype):
    weights = checks.make_head(100, 300, dtype)
    checks.check_score(torch.randn(rows, 100).to(dtype), weights)


@pytest.mark.parametrize(("h", "d"), [(1, 1), (64, 128), (257, 129), (130, 513)])
def test_score_at_odd_sizes(h, d):
    for dtype in DTYPES:
        checks.check_score(torch.randn(5, h).to(dtype), checks.make_head(h, d, dtype))


PRODUCTS = {
    "wide": Tile(64, 256, 128, 4, 1, group=2),
    "wide, half steps, paired": Tile(64, 256, 64, 4, 1, paired=True),
    "narrow": Tile(128, 64, 64, 4, 1, group=1),
    "narrow, paired": Tile(128, 32, 128, 4, 1, paired=True),
    "paired, odd count": Tile(256, 128, 128, 4, 1, paired=True),
    "pieces of one tile": Tile(64, 128, 128, 4, 1, fill=1e6),
    "pieces": Tile(128, 128, 64, 4, 1, fill=7.0),
    "one piece a row": Tile(128, 128, 64, 4, 1, fill=1e-6),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_score_by_every_way_to_balance_the_triangle(name, tiles):
    tiles(product=PRODUCTS[name])
    weights = checks.make_head(64, 600, torch.float16)  # five tiles of 128, so that pairs and pieces are uneven
    checks.check_score(torch.randn(130, 64).half(), weights)


@pytest.mark.parametrize("name", ["narrow, paired", "paired, odd count", "pieces"])
def test_the_last_program_to_come_adds_up_to_the_same_bits(name, tiles):
    tiles(product=PRODUCTS[name])
    weights, hidden = checks.make_head(64, 600, torch.float16), torch.randn(70, 64).half()
    apart, together = torch.empty(4, 70), torch.full((4, 70), math.nan)
    backend.score(hidden, weights, apart)
    with heuristics.forms(tail="last"), recorded() as kernels:
        backend.score(hidden, weights, together)
    assert torch.equal(apart, together)
    assert kernels[-1] == ("piece_score_kernel" if name == "pieces" else "column_score_kernel")
    assert not {"square_kernel", "column_kernel", "piece_kernel", "score_kernel"} & set(kernels)


PROJECTS = {
    "wide": Tile(64, 256, 64, 4, 1, group=1),
    "wide, cut": Tile(64, 256, 64, 4, 1, fill=8.0),
    "cut unevenly": Tile(64, 128, 64, 4, 1, fill=10.0),
    "narrow": Tile(16, 64, 256, 4, 1, group=3),
}


@pytest.mark.parametrize("name", PROJECTS)
def test_score_by_every_way_to_cut_the_projection(name, tiles):
    tiles(project=PROJECTS[name])
    heuristics_steps = heuristics._MIN_STEPS
    heuristics._MIN_STEPS = 1
    try:
        weights = checks.make_head(448, 300, torch.float16)
        checks.check_score(torch.randn(70, 448).half(), weights)
    finally:
        heuristics._MIN_STEPS = heuristics_steps


HEADS = {
    "tanh": {"layer": 72, "activation": "tanh"},
    "layer norm": {"layer": 136, "layernorm": True},
    "tanh and layer norm": {"layer": 64, "activation": "tanh", "layernorm": True},
    "linear": {"features": "linear"},
    "linear on a layer": {"features": "linear", "layer": 90, "projection": False, "activation": "tanh"},
    "linear on a normed layer": {"features": "linear", "layer": 90, "projection": False, "layernorm": True},
    "last layer": {"features": "linear", "projection": False},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_score_of_every_kind_of_head(name, dtype):
    weights = checks.make_head(120, 200, dtype, input_scale=0.25, **HEADS[name])
    checks.check_score(torch.randn(35, 120).to(dtype), weights)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32, torch.float64])
def test_score_of_hidden_states_in_another_dtype(hidden_dtype, rows):
    for dtype in DTYPES:
        weights = checks.make_head(64, 140, dtype, input_scale=0.5)
        checks.check_score(torch.randn(rows, 64).to(hidden_dtype), weights)


def test_input_scale_brings_massive_activations_into_range():
    weights = checks.make_head(96, 140, torch.float16, input_scale=2.0**-6, spread=0.05)
    hidden = torch.randn(40, 96)
    hidden[:, 17] = 1.5e6
    weights.map.projection[:, 17] = 2.0**-20
    checks.check_score(hidden, weights)


def test_strided_rows_score_like_contiguous_ones():
    weights = checks.make_head(64, 200, torch.float16)
    wide = torch.randn(80, 150).half()
    views = [
        wide[:, :64],
        wide[:, 3:67],
        wide[::2, :64],
        wide[:, 10:138:2],
        wide[:64, :9].mT[:, :64],
        wide[:1, :64].expand(6, -1),
    ]
    for hidden in views:
        got = checks.check_score(hidden, weights)
        plain = torch.empty_like(got)
        backend.score(hidden.contiguous(), weights, plain)
        assert torch.equal(got, plain)


def test_score_in_chunks_fills_every_column(monkeypatch):
    weights = checks.make_head(64, 200, torch.float16)
    monkeypatch.setattr(backend, "WORKSPACE", 1)
    checks.check_score(torch.randn(300, 64).half(), weights)


def test_a_non_finite_row_spoils_only_itself():
    tanh = {"layer": 64, "activation": "tanh"}  # saturates: infinite rows must not come out as confident answers
    for head in ({}, tanh, {"layer": 64, "layernorm": True}, {"features": "linear", "projection": False}):
        for rows in (7, 129):
            weights = checks.make_head(64, 200, torch.float16, **head)
            hidden = torch.randn(rows, 64).half()
            clean = checks.check_score(hidden, weights)
            for bad, value in ((0, math.nan), (rows - 1, math.inf)):
                spoiled = hidden.clone()
                spoiled[bad, 5] = value
                out = torch.empty_like(clean)
                backend.score(spoiled, weights, out)
                assert not out[:, bad].isfinite().any()
                keep = torch.arange(rows) != bad
                assert torch.equal(out[:, keep], clean[:, keep])


def test_a_row_that_overflows_the_serving_dtype_is_not_finite():
    weights = checks.make_head(64, 200, torch.float16)
    hidden = torch.randn(40, 64)
    hidden[3, 7] = 1e6
    out = torch.empty(4, 40)
    backend.score(hidden, weights, out)
    assert not out[:, 3].isfinite().any()
    assert bool(out[:, :3].isfinite().all())


@pytest.mark.parametrize("name", ["tanh and layer norm", "last layer"])
def test_every_kind_of_head_ends_in_the_last_program_to_come(name):
    weights = checks.make_head(64, 140, torch.float16, input_scale=0.25, **HEADS[name])
    hidden = torch.randn(9, 64).half()
    apart = checks.check_score(hidden, weights)
    with heuristics.forms(tail="last"):
        # A row that is not finite spoils neither its neighbours nor the counters of the next call.
        spoiled = hidden.clone()
        spoiled[4, 3] = math.nan
        out = torch.empty_like(apart)
        backend.score(spoiled, weights, out)
        keep = torch.arange(9) != 4
        assert torch.equal(out[:, keep], apart[:, keep])
        assert not bool(out[:, 4].isfinite().any())
        backend.score(hidden, weights, out)
        assert torch.equal(out, apart)


# -- launch plans ----------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """The CPU stands for a GPU whose calls are planned; yields how often the long way was gone."""
    monkeypatch.setattr(plans, "_PLANNING", {"cpu": ("cuda", "triton")})
    monkeypatch.setattr(plans, "stream_of", lambda _index: 7)
    monkeypatch.setattr(backend, "_arenas", {})
    taken: list[int] = []
    long_way = backend.score
    monkeypatch.setattr(backend, "score", lambda *task: (taken.append(1), long_way(*task))[1])
    return taken


def _same(rows: torch.Tensor, weights, taken: list[int], more: int) -> None:
    want = torch.empty(4, len(rows))
    backend.score(rows, weights, want)
    before = len(taken)
    got = torch.full((4, len(rows)), math.nan)
    ops.score(rows, weights, backend="triton", out=got)
    assert torch.equal(got, want)
    assert len(taken) - before == more


PLANNED = {
    "plain": ({}, lambda wide: wide[:5, :64].half()),
    "cut in pieces": ({"input_scale": 0.5}, lambda wide: wide[:, :64].half()),
    "strided": ({}, lambda wide: wide.half()[::20, 1:65]),
    "another dtype": ({}, lambda wide: wide[:35, :64]),
    "layers": ({"layer": 72, "activation": "tanh", "layernorm": True}, lambda wide: wide[:3, :64].half()),
    "no projection": ({"features": "linear", "projection": False}, lambda wide: wide[:3, :64].half()),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_call_gives_the_same_bits_without_going_the_long_way(name, planned):
    head, rows = PLANNED[name]
    weights = checks.make_head(64, 140, torch.float16, **head)
    _same(rows(torch.randn(70, 73)), weights, planned, 1)  # the first call of a shape makes the plan
    _same(rows(torch.randn(70, 73)), weights, planned, 0)


def test_plans_of_calls_that_end_in_the_last_program_to_come(planned):
    weights = checks.make_head(64, 140, torch.float16)
    with heuristics.forms(tail="last"):
        _same(torch.randn(70, 64).half(), weights, planned, 1)
        for _ in range(2):  # the counters are zeroed every time
            _same(torch.randn(70, 64).half(), weights, planned, 0)


def test_what_a_plan_does_not_fit_goes_the_long_way(planned, monkeypatch):
    weights, rows = checks.make_head(64, 140, torch.float16), torch.randn(6, 64).half()
    _same(rows, weights, planned, 1)
    place = torch.empty(4 * 6 + 1)
    ops.score(rows, weights, backend="triton", out=place[1:].view(4, 6))  # not at a multiple of 16 bytes
    assert len(planned) == 3
    _same(rows.double(), weights, planned, 1)  # converted by torch, not by a kernel
    _same(rows.double(), weights, planned, 1)
    monkeypatch.setattr(plans, "stream_of", lambda _index: 8)  # its own workspaces
    _same(rows, weights, planned, 0)
    monkeypatch.setattr(plans, "stream_of", lambda _index: None)  # a graph is being captured
    _same(rows, weights, planned, 1)
    assert len(weights.cache["plans"]) == 2


def test_plans_share_their_memory_and_large_calls_have_none(planned, monkeypatch):
    weights = checks.make_head(64, 140, torch.float16)
    monkeypatch.setattr(plans, "_LIMIT", 3)
    for count in (1, 2, 3, 4, 5):
        _same(torch.randn(count, 64).half(), weights, planned, 1)
        assert len(weights.cache["plans"]) <= 3
    assert len(backend._arenas) == 1
    monkeypatch.setattr(backend, "PLAN_WORKSPACE", 1 << 10)
    for _ in range(2):
        _same(torch.randn(9, 64).half(), weights, planned, 1)


# -- accumulate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("paired", [False, True])
def test_accumulate(dtype, precision_dtype, paired):
    weights = checks.make_head(64, 300, dtype)
    hidden = torch.randn(130, 64).to(dtype)
    pairs = torch.randint(0, 130, (97, 2)) if paired else None
    labels = torch.rand(97 if paired else 130)
    checks.check_accumulate(hidden, labels, weights, precision_dtype=precision_dtype, pairs=pairs)


@pytest.mark.parametrize("paired", [False, True])
def test_accumulate_with_weights_and_gaussian_likelihood(paired):
    weights = checks.make_head(64, 130, torch.float16)
    hidden = torch.randn(70, 64).half()
    pairs = torch.randint(0, 70, (65, 2)) if paired else None
    n = 65 if paired else 70
    labels, sample_weight = torch.randint(0, 2, (n,)), torch.rand(n, dtype=torch.float64)
    for likelihood in ("logistic", "gaussian"):
        checks.check_accumulate(
            hidden, labels, weights, pairs=pairs, sample_weight=sample_weight, likelihood=likelihood
        )


@pytest.mark.parametrize(
    "tile",
    [
        Tile(64, 64, 64, 4, 1, fill=16.0),
        Tile(64, 256, 32, 4, 1),
        Tile(128, 256, 64, 4, 1, fill=4.0),
        Tile(128, 128, 32, 4, 1, tail=True),  # six tiles on four multiprocessors: four whole, two cut
    ],
)
def test_accumulate_by_every_shape_of_gram_tile(tile, tiles, monkeypatch):
    tiles(gram=tile)
    monkeypatch.setattr(heuristics, "_MIN_STEPS", 1)
    checks.check_accumulate(torch.randn(129, 64).half(), torch.rand(129), checks.make_head(64, 330, torch.float16))


@pytest.mark.parametrize("budget", [0, 1 << 40])
def test_accumulate_in_chunks(monkeypatch, budget):
    """Few rows at a time; in difference mode with and without room for every row's features."""
    monkeypatch.setattr(backend, "GRAM_WORKSPACE", 1)
    monkeypatch.setattr(backend, "PAIR_WORKSPACE", budget)
    weights = checks.make_head(64, 130, torch.float16)
    hidden = torch.randn(300, 64).half()
    checks.check_accumulate(hidden, torch.rand(300), weights)
    checks.check_accumulate(hidden, torch.rand(400), weights, pairs=torch.randint(0, 300, (400, 2)))


def test_no_sum_of_accumulate_runs_over_more_rows_than_tensor_cores_may_add_up(monkeypatch):
    from rmcore.kernels import gram

    taken, weigh = [], gram.weigh
    monkeypatch.setattr(backend, "GRAM_ROWS", 256)
    monkeypatch.setattr(gram, "weigh", lambda c, *rest, **more: taken.append(len(c)) or weigh(c, *rest, **more))
    checks.check_accumulate(torch.randn(300, 64).half(), torch.rand(300), checks.make_head(64, 130, torch.float16))
    assert taken == [256, 44]


def test_equal_rows_of_a_pair_add_nothing_to_the_precision():
    weights = checks.make_head(64, 130, torch.float16)
    precision, gradient = torch.zeros(130, 130), torch.zeros(130)
    pairs = torch.tensor([[0, 0], [1, 1], [0, 2]])
    hidden = torch.randn(2, 64).half()[[0, 1, 0]]
    labels = torch.tensor([0.0, 1.0, 1.0])
    total = backend.accumulate(
        AccumulateTask(hidden, labels, weights.map, weights.beta, precision, gradient, pairs, None, 0.0, "logistic")
    )
    assert not precision.any()
    assert not gradient.any()
    assert float(total) == pytest.approx(3 * math.log(0.5))


def test_accumulated_precision_is_positive_semi_definite_after_rounding():
    weights = checks.make_head(32, 256, torch.float16)
    precision, gradient = torch.zeros(256, 256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    backend.accumulate(AccumulateTask(
        torch.randn(300, 32).half(), torch.rand(300), weights.map, weights.beta, precision, gradient, None, None, 0.0,
        "logistic",
    ))  # fmt: skip
    full = precision.tril() + precision.tril(-1).mT
    assert float(torch.linalg.eigvalsh(full)[0]) > -1e-6 * float(full.diagonal().amax())


# -- pair_variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[2], [4, 4, 4], [1, 5, 0, 3, 2, 7, 2, 9], [65], [1, 1]])
def test_pair_variance(sizes, dtype):
    weights = checks.make_head(64, 300, dtype)
    hidden = torch.randn(sum(sizes), 64).to(dtype)
    # Responses to one prompt resemble each other: the difference is what must survive.
    hidden = hidden[:1] + 0.1 * hidden
    checks.check_pair_variance(hidden, sizes, weights)


def test_pair_variance_in_chunks(monkeypatch):
    monkeypatch.setattr(backend, "WORKSPACE", 1)
    weights = checks.make_head(64, 130, torch.float16)
    sizes = [8] * 31 + [7, 5, 12] + [8] * 9
    checks.check_pair_variance(torch.randn(sum(sizes), 64).half(), sizes, weights)


def test_equal_rows_give_exactly_zero():
    for dtype in DTYPES:
        weights = checks.make_head(100, 300, dtype)
        hidden = torch.randn(6, 100).to(dtype)[[0, 1, 2, 1, 0, 1]]
        g, v = backend.pair_variance(hidden, torch.tensor([6]), weights)
        i, j = torch.triu_indices(6, 6, 1)
        same = torch.tensor([0, 1, 2, 1, 0, 1])[i] == torch.tensor([0, 1, 2, 1, 0, 1])[j]
        assert not g[same].any()
        assert not v[same].any()
        assert bool((v[~same] > 0).all())


@pytest.mark.parametrize(("k", "count"), [(2, 5), (5, 3), (8, 2), (16, 1)])
def test_pair_variance_by_groups(k, count, monkeypatch):
    taken = []
    whole = pair_variance.groups
    monkeypatch.setattr(pair_variance, "groups", lambda *call: (taken.append(call[2]), whole(*call)))
    weights = checks.make_head(64, 140, torch.float16)
    hidden = torch.randn(k * count, 64).half()
    hidden[1] = hidden[0]
    with heuristics.forms(pairs="by groups"):
        g, v = checks.check_pair_variance(hidden, [k] * count, weights)
        assert taken == [k]
        checks.check_pair_variance(torch.randn(5, 64).half(), [2, 3], weights)  # of two sizes: by pairs
        assert taken == [k]
    assert g[0] == v[0] == 0
    assert heuristics.FORMS["pairs"] == "by pairs"


@pytest.mark.parametrize(("k", "count"), [(2, 5), (4, 3), (8, 9)])
def test_pair_variance_in_the_product(k, count, tiles):
    weights = checks.make_head(64, 300, torch.float16)
    hidden = torch.randn(k * count, 64).half()
    hidden[1] = hidden[0]
    if k == 8:  # several tiles of rows and of columns, one of them without a partner, and a projection in pieces
        tiles(product=Tile(64, 64, 128, 4, 1, paired=True), project=Tile(64, 128, 64, 4, 1, fill=8.0))
    with heuristics.forms(pairs="in the product"), recorded() as kernels:
        g, v = checks.check_pair_variance(hidden, [k] * count, weights)
    assert kernels[-1] == "column_pair_kernel"
    assert "centre_kernel" not in kernels
    assert g[0] == v[0] == 0


@pytest.mark.parametrize("k", [2, 3, 7])
def test_groups_of_one_size_need_no_lists_and_have_the_same_bits(k, monkeypatch):
    weights, hidden = checks.make_head(64, 140, torch.float16), torch.randn(5 * k, 64).half()
    plain = backend._pair_rows([k] * 5, hidden.device)
    assert plain.first is plain.left is plain.right is None
    bits = backend.pair_variance(hidden, torch.full((5,), k), weights)
    other = backend._pair_rows([k, k + 1], hidden.device)
    assert other.k == 0
    i, j = torch.triu_indices(k, k, 1)
    heads = torch.arange(5)[:, None] * k
    listed = pair_variance.Rows(0, heads.expand(-1, k).reshape(-1), *((heads + x).reshape(-1) for x in (i, j)))
    monkeypatch.setattr(backend, "_pair_rows", lambda *_: listed)
    again = backend.pair_variance(hidden, torch.full((5,), k), weights)
    assert all(torch.equal(a, b) for a, b in zip(bits, again, strict=True))


def test_groups_that_the_product_does_not_serve_go_by_pairs():
    hidden = torch.randn(16, 64).half()
    with heuristics.forms(pairs="in the product"), recorded() as kernels:
        for weights, sizes in (
            (checks.make_head(64, 140, torch.float16), [3, 3]),
            (checks.make_head(64, 140, torch.float16), [2, 4]),
            (checks.make_head(64, 140, torch.float16), [16]),
            (checks.make_head(64, 140, torch.float16, features="linear", projection=False), [4, 4]),
        ):
            checks.check_pair_variance(hidden[: sum(sizes)], sizes, weights)
    assert kernels.count("pair_kernel") == 4
    assert "column_pair_kernel" not in kernels


# -- power_iteration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (200, 33), (129, 1000)])
def test_power_iteration(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for iterations in (1, 2, 5):
        checks.check_power_iteration(weight, torch.randn(shape[1]), iterations)


def test_power_iteration_converges_on_sigma():
    weight = torch.randn(60, 80) + 1.0
    sigma, _ = backend.power_iteration(weight, torch.randn(80), 8)
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)


def test_power_iteration_of_a_zero_matrix_leaves_the_vector():
    vector = torch.randn(40)
    for iterations in (1, 2, 3):
        sigma, v = backend.power_iteration(torch.zeros(30, 40), vector, iterations)
        assert float(sigma) == 0
        torch.testing.assert_close(v, vector / vector.norm())


def test_power_iteration_of_strided_and_very_wide_matrices():
    checks.check_power_iteration(torch.randn(50, 40).mT, torch.randn(50), 2)
    checks.check_power_iteration(torch.randn(30, 90)[:, 5:70], torch.randn(65), 2)
    checks.check_power_iteration(torch.randn(3, 16385), torch.randn(16385), 2)


# -- all of them -----------------------------------------------------------------------------------------------------


def test_empty_inputs():
    weights = checks.make_head(64, 130, torch.float16)
    none = torch.empty(0, 64).half()
    backend.score(none, weights, torch.empty(4, 0))
    precision, gradient = torch.ones(130, 130), torch.ones(130)
    for pairs in (None, torch.empty(0, 2, dtype=torch.int64)):
        total = backend.accumulate(
            AccumulateTask(
                none, torch.empty(0), weights.map, weights.beta, precision, gradient, pairs, None, 0.0, "logistic"
            )
        )
        assert float(total) == 0
    assert bool((precision == 1).all())
    assert bool((gradient == 1).all())
    for sizes in ([], [0, 0], [1]):
        g, v = backend.pair_variance(
            torch.randn(sum(sizes), 64).half(), torch.tensor(sizes, dtype=torch.int64), weights
        )
        assert g.shape == v.shape == (0,)


def test_twice_the_same_bits():
    weights = checks.make_head(64, 300, torch.float16)
    hidden = torch.randn(130, 64).half()
    labels = torch.rand(130)
    assert torch.equal(checks.check_score(hidden, weights), checks.check_score(hidden, weights))
    first, second = (checks.check_accumulate(hidden, labels, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (checks.check_pair_variance(hidden[:30], [9, 21], weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ops_reach_the_kernels_and_say_when_they_cannot():
    weights = checks.make_head(64, 130, torch.float16)
    scores = ops.score(torch.randn(3, 64), weights, backend="triton")
    assert bool(scores.uncertainty.ge(1).all())
    assert "bfloat16" in str(backend.unavailable("score", torch.device("cpu"), torch.bfloat16))
    assert "float64" in str(backend.unavailable("power_iteration", torch.device("cpu"), torch.float64))
    assert backend.unavailable("score", torch.device("cpu"), torch.float16) is None


# -- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def _apply(x, out, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + r, mask=r < n, other=0.0)
    result = common.cos_turns(value) if WHICH == 0 else common.tanh(value)
    tl.store(out + r, result, mask=r < n)


def test_cosine_and_tanh_are_accurate():
    huge = [4194303.75, -4194303.5, 4194304.5, -4194305.0, 8388607.5, 8388609.0, -1.3e8, 1.7e30, 3e38]
    x = torch.cat([torch.linspace(-60, 60, 40001), torch.randn(5000) * 1e4, torch.tensor(huge)])
    out = torch.empty_like(x)
    _apply[(8,)](x, out, len(x), WHICH=0, BLOCK=8192)
    exact = torch.cos(2 * math.pi * (x.double() - x.double().round()))
    assert float((out - exact).abs().amax()) < 2.0**-22
    _apply[(8,)](x / 10, out, len(x), WHICH=1, BLOCK=8192)
    exact = torch.tanh((x / 10).double())
    assert float(((out - exact).abs() / exact.abs().clamp_min(1e-30)).amax()) < 3e-7
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    _apply[(1,)](odd, out, 4, WHICH=1, BLOCK=8192)
    assert math.isnan(float(out[0]))
    assert out[1:4].tolist() == [1.0, -1.0, 0.0]
    _apply[(1,)](odd, out, 4, WHICH=0, BLOCK=8192)
    assert out[:3].isnan().all()


@triton.jit
def _rows(out, n, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + t, common.triangle_row(t), mask=t < n)


def test_triangle_row_is_exact():
    """Up to the tiles of D = 131,072."""
    rows = 1024
    want = torch.repeat_interleave(torch.arange(rows), torch.arange(1, rows + 1)).int()
    got = torch.empty_like(want)
    _rows[(-(-len(want) // 65536),)](got, len(want), BLOCK=65536)
    assert torch.equal(got, want)


@pytest.mark.parametrize("op", ops.OPS)
def test_the_self_check_passes(op, monkeypatch):
    from rmcore.ops import self_check

    monkeypatch.setattr(self_check, "REPEATS", 2)
    monkeypatch.setattr(self_check, "ROWS", (1, 17, 130))
    assert self_check.check(backend, op, torch.device("cpu")) is None


# -- multi-attribute heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTRIBUTE_HEADS)
def test_attribute_heads_of_every_kind(kind):
    for dtype, h, rows in ((torch.float16, 64, 20), (torch.float32, 67, 3)):
        heads = make_heads(h, dtype, **ATTRIBUTE_HEADS[kind])
        check_scores(backend, torch.randn(rows, h), heads)
        assert backend.score_attributes(torch.randn(0, h), heads, None)[0].shape == (5, 0)


def test_attribute_heads_at_the_edges(monkeypatch):
    heads = make_heads(64, torch.float16, members=2, widths=(300, 130))
    check_scores(backend, torch.randn(5, 64), heads, torch.randn(5, 64))  # gates that read rows of their own
    check_scores(backend, torch.randn(20, 128, dtype=torch.float16)[::2, ::2], heads)
    scaled = make_heads(64, torch.float16, widths=(64,), input_scale=2.0**-10)
    check_scores(backend, torch.randn(3, 64) * 1024, scaled)
    heads, hidden = make_heads(64, torch.float16, widths=(70,)), torch.randn(260, 64)
    whole = backend.score_attributes(hidden, heads, None)
    monkeypatch.setattr(backend, "WORKSPACE", 1)  # chunks of 256 rows
    for a, b in zip(backend.score_attributes(hidden, heads, None), whole, strict=True):
        assert torch.equal(a, b)
    hidden[3] = -math.inf
    spoilt = backend.score_attributes(hidden[:8], heads, None)
    keep = torch.arange(8) != 3
    assert not bool(spoilt[0][:4, 3].isfinite().any())
    for a, b, dim in zip(spoilt, whole, (1, 0, 0), strict=True):
        others = a.movedim(dim, 0)[keep], b.movedim(dim, 0)[:8][keep]
        assert bool((others[0] - others[1]).abs().amax() < 1e-5)  # other tiles for other numbers of rows


@pytest.mark.parametrize("family", GATED)
def test_a_published_familys_gated_head(family):
    """As :class:`RewardHead` hands it over; its rows are the module's to what rounding to the dtype does."""
    dtype, rows = (torch.float32, 3) if family == "armorm" else (torch.float16, 20)
    head = published_head(family, 64).to(torch.device("cpu"), dtype)
    states = torch.randn(rows, 2, 64).to(head.dtype)
    gate = None if family == "urm-gated" else states[:, 1].contiguous()
    _, outputs, weights = check_scores(backend, states[:, 0].contiguous(), head._kernel(), gate)
    score = head._scores(outputs.view(rows, head._count, head._per), weights[:, 0])
    with torch.enable_grad():  # the layers one by one
        exact = published_head(family, 64).rows(states.float())[:, -1]
    assert float((score - exact).abs().max()) < (1e-5 if head.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("cols", [64, 256])
def test_a_wide_tile_of_attribute_heads_is_finished_in_quarters(monkeypatch, cols):
    narrow = min(cols, 128)
    monkeypatch.setattr(score_attributes, "_tile", lambda *key: Tile(64, narrow if key[-1] else cols, 64, 4, 1))
    check_scores(backend, torch.randn(65, 64), make_heads(64, torch.float16, widths=(256, 260)))
