"""The persistent forms of the large products in Triton's interpreter, which reads through descriptors as a GPU does.

Run like test_triton_interpret.py, by test_triton_interpreter.py; those marked slow by ``make compile-gate``. The
interpreter takes ``warp_specialize`` and ``flatten`` for ordinary loops: what the compiler makes of them is asked in
compile_triton.py, and only a GPU can say whether that is right.
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
import triton_checks as checks

from rmcore.kernels import features_tma, gram_tma, heuristics, heuristics_tma, launches, variance_tma
from rmcore.kernels.heuristics import Tile
from rmcore.ops import plans, self_check
from rmcore.ops.backends import triton as backend
from rmcore.ops.backends import triton_tma

FORMS = heuristics_tma.FORMS
DEVICE = heuristics.Device("interpreter", 4)


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with checks.poisoned_workspaces():
        yield


@pytest.fixture(params=FORMS)
def form(request) -> Iterator[str]:
    """A form, taken from one row on, by three programs."""
    with triton_tma.choosing(triton_tma.Large(request.param, 1, 3)):
        yield request.param


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


def tiles(monkeypatch, **chosen: Tile) -> None:
    """Replace the tables by single tiles."""
    for name, tile in chosen.items():
        monkeypatch.setattr(heuristics_tma, name, lambda *_, tile=tile, **__: tile)


# -- score -----------------------------------------------------------------------------------------------------------


SLOW_ROWS = [pytest.param(rows, marks=pytest.mark.slow) for rows in (2, 63, 64, 127, 128, 257)]


@pytest.mark.parametrize("rows", [1, 65, 129, *SLOW_ROWS])
def test_score_at_every_edge_of_a_tile(form, rows):
    weights = checks.make_head(104, 300, torch.float16)
    with recorded() as kernels:
        out = checks.check_score(torch.randn(rows, 104).half(), weights)
    special = form == "specialized" and rows > 64  # a tile of 64 rows has no half for each consumer
    assert kernels == [
        "project_tma_kernel", f"column_{'specialized' if special else 'persistent'}_kernel", "score_kernel",
    ]  # fmt: skip
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("h", "d"),
    [(8, 1), (136, 257), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((64, 128), (264, 513), (72, 255)))],
)
def test_score_at_sizes_that_are_no_whole_tiles(form, h, d):
    """h that is no whole step, D that is no whole tile: what the descriptors fill in is 0, and counts for nothing."""
    checks.check_score(torch.randn(70, h).half(), checks.make_head(h, d, torch.float16))


@pytest.mark.parametrize("programs", [1, 5, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7, 1000))])
def test_programs_fewer_than_tiles_as_many_and_more(form, programs, monkeypatch):
    """Two tiles of rows and three of U's tiles: six tasks of the product. The bits are the same whoever does what."""
    tiles(monkeypatch, project=Tile(64, 128, 64, 4, 1, group=1), product=Tile(128, 128, 64, 4, 1))
    weights, hidden = checks.make_head(72, 300, torch.float16), torch.randn(130, 72).half()
    with triton_tma.choosing(triton_tma.Large(form, 1, 0)):
        monkeypatch.setattr(backend, "_device", lambda _: heuristics.Device("interpreter", 4))
        want = checks.check_score(hidden, weights)
        monkeypatch.setattr(backend, "_device", lambda _: heuristics.Device("interpreter", programs))
        got = torch.full((4, 130), math.nan)
        backend.score(hidden, weights, got)
    assert torch.equal(got, want)


SHAPES = {
    "wide, deep": (Tile(128, 256, 128, 4, 1), Tile(256, 128, 128, 4, 1)),
    "narrow, shallow": (Tile(64, 64, 32, 4, 1, group=2), Tile(128, 128, 32, 4, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_tiles_of_other_shapes(form, name, monkeypatch):
    project, product = SHAPES[name]
    tiles(monkeypatch, project=project, product=product)
    checks.check_score(torch.randn(130, 200).half(), checks.make_head(200, 600, torch.float16))


def test_strips_of_rows_are_scored_as_by_one_launch(form, monkeypatch):
    tiles(monkeypatch, product=Tile(128, 128, 64, 4, 1))
    weights, hidden = checks.make_head(64, 200, torch.float16), torch.randn(300, 64).half()
    whole = torch.empty(4, 300)
    backend.score(hidden, weights, whole)
    monkeypatch.setattr(heuristics_tma, "STRIP_ROWS", 128)
    with recorded() as kernels:
        got = checks.check_score(hidden, weights)
    assert sum(name.startswith("column_") for name in kernels) == 3
    assert torch.equal(got, whole)


def test_rows_of_any_strides_and_dtype(form):
    """What no descriptor can reach is copied first; what one can is read where it lies."""
    weights, wide = checks.make_head(64, 150, torch.float16), torch.randn(140, 256).half()
    straight, copied = ["project_tma_kernel"], ["copy_kernel", "project_tma_kernel"]
    for hidden, way in (
        (wide[:, 64:128], straight),
        (wide[::2, 8:72], straight),
        (wide[:70, 3:67], copied),
        (wide[:70, 10:138:2], copied),
        (wide[:1, :64].expand(70, -1), copied),
        (wide[:70, :64].float(), copied),
        (wide[:70, :64].double(), copied),
    ):
        with recorded() as kernels:
            got = checks.check_score(hidden, weights)
        assert kernels[: len(way)] == way
        plain = torch.full_like(got, math.nan)
        backend.score(hidden.contiguous().half(), weights, plain)
        assert torch.equal(got, plain)


def test_input_scales_beside_rows_of_either_dtype(form):
    weights = checks.make_head(64, 100, torch.float16, input_scale=0.25)
    for dtype in (torch.float16, torch.float32):
        checks.check_score(4 * torch.randn(70, 64).to(dtype), weights)


def test_a_non_finite_row_spoils_only_itself(form):
    weights, hidden = checks.make_head(104, 140, torch.float16), torch.randn(70, 104).half()
    clean = checks.check_score(hidden, weights)
    for bad in (math.nan, math.inf):
        spoilt = hidden.clone()
        spoilt[2, 103] = bad
        got = torch.empty(4, 70)
        backend.score(spoilt, weights, got)
        keep = torch.arange(70) != 2
        assert torch.equal(got[:, keep], clean[:, keep])
        assert not bool(got[:, 2].isfinite().any())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ({"layer": 64, "activation": "tanh"}, torch.float16),
        ({"features": "linear"}, torch.float16),
        ({"projection": False}, torch.float16),
        ({}, torch.float32),
    ],
    ids=["layer", "linear", "no projection", "float32"],
)
def test_other_heads_go_the_plain_way(form, kind, dtype):
    with recorded() as kernels:
        checks.check_score(torch.randn(70, 64).to(dtype), checks.make_head(64, 100, dtype, **kind))
    assert not any("tma" in name or "persistent" in name or "specialized" in name for name in kernels)


def test_rows_of_weights_that_no_descriptor_reaches_go_the_plain_way(form):
    """h = 100: rows of 200 bytes, which begin at no multiple of 16."""
    weights = checks.make_head(100, 100, torch.float16)
    assert "multiples of 16 bytes" in str(features_tma.refusal(weights.map, DEVICE))
    with recorded() as kernels:
        checks.check_score(torch.randn(70, 100).half(), weights)
    assert "project_kernel" in kernels
    assert "sm80" in str(features_tma.refusal(weights.map, heuristics.Device("sm80", 108)))


def test_few_rows_and_what_was_given_up_go_the_plain_way(form):
    weights, hidden = checks.make_head(64, 100, torch.float16), torch.randn(70, 64).half()
    on = torch.device("cpu")
    with triton_tma.choosing(triton_tma.Large(form, 71)):
        assert triton_tma.form_of("score", 70, weights.map, DEVICE, on) == "plain"
        assert triton_tma.form_of("score", 71, weights.map, DEVICE, on) == form
        assert triton_tma.kernel_of_form("score") == f"score_{form}"
        assert triton_tma.kernel_of_form("pair_variance") is None
    backend.give_up(f"score_{form}", on)
    try:
        with recorded() as kernels:
            checks.check_score(hidden, weights)
        assert "project_kernel" in kernels
        assert triton_tma.form_of("accumulate", 71, weights.map, DEVICE, on) == form
    finally:
        triton_tma._given_up.clear()


def test_a_plan_launches_the_same(form, monkeypatch):
    monkeypatch.setattr(plans, "stream_of", lambda _index: 0)
    monkeypatch.setattr(launches, "hooked", lambda: False)
    weights, hidden = checks.make_head(104, 120, torch.float16), torch.randn(70, 104).half()
    plan = backend.plan(hidden, weights)
    assert plan is not None
    assert plan.memory is not None  # type: ignore[attr-defined]
    with triton_tma.choosing(triton_tma.Large()):
        other = backend.plan(hidden, weights)
        assert other is not None
        assert other.memory is None  # type: ignore[attr-defined]
    for seed in (1, 2):
        fresh = torch.randn(70, 104, generator=torch.Generator().manual_seed(seed)).half()
        out, want = torch.full((4, 70), math.nan), torch.empty(4, 70)
        with recorded() as kernels:
            assert plan(fresh, weights, out)
        assert "project_tma_kernel" in kernels
        backend.score(fresh, weights, want)
        assert torch.equal(out, want)


# -- accumulate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 129, *(pytest.param(n, marks=pytest.mark.slow) for n in (127, 128, 300))])
def test_accumulate_at_every_edge_of_a_step(form, rows):
    weights = checks.make_head(72, 300, torch.float16)
    labels = torch.randint(2, (rows,)).float()
    with recorded() as kernels:
        checks.check_accumulate(torch.randn(rows, 72).half(), labels, weights)
    assert kernels == ["project_tma_kernel", "weigh_kernel", f"gram_{form}_kernel", "add_kernel"]


def test_accumulate_of_pairs_and_weights_into_float64(form):
    weights, hidden = checks.make_head(64, 140, torch.float16), torch.randn(40, 64).half()
    pairs = torch.randint(40, (70, 2))
    checks.check_accumulate(hidden, torch.randint(2, (70,)).float(), weights, pairs=pairs)
    checks.check_accumulate(
        hidden, torch.randint(2, (40,)).float(), weights,
        precision_dtype=torch.float64, sample_weight=torch.rand(40), likelihood="gaussian",
    )  # fmt: skip


GRAMS = {
    "square": Tile(128, 128, 128, 4, 1),
    "last wave cut": Tile(128, 256, 64, 4, 1, tail=True),
    "all cut": Tile(128, 256, 64, 4, 1, fill=9.0),
}


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("square", 1),
        ("last wave cut", 5),
        ("all cut", 4),
        *(pytest.param(name, n, marks=pytest.mark.slow) for name in GRAMS for n in (2, 15, 40)),
    ],
)
def test_the_gram_matrix_by_fewer_programs_than_tiles_as_many_and_more(form, name, programs, monkeypatch):
    """150 rows and 300 features: no whole steps and no whole tiles; some pieces would have no step at all."""
    monkeypatch.setattr(heuristics, "_MIN_STEPS", 1)
    tiles(monkeypatch, gram=GRAMS[name])
    phi = torch.randn(150, 512).half()
    phi[:, 300:] = 0
    before = torch.randn(300, 300)
    got, again = before.clone(), before.clone()
    device = heuristics.Device("interpreter", programs)
    for precision in (got, again):
        gram_tma.gram(phi, precision, device, form, scale=0.5)
    exact = before.double() + 0.5 * (phi.double().mT @ phi.double())[:300, :300].tril()
    assert torch.equal(got, again)
    assert torch.equal(got.triu(1), before.triu(1))
    bound = 8 * checks.EPS * float(phi.double().square().sum(0).amax())
    assert float((got - exact).abs().amax()) < bound


def test_squares_are_those_of_the_plain_form_to_rounding(form):
    c = torch.randn(130, 512).half()
    c[:, 400:] = 0
    factor = torch.randn(10, 128, 128).half() / 20
    parts = variance_tma.squares(c, factor, 400, heuristics.Device("interpreter", 3), form)
    from rmcore.kernels import variance

    plain = variance.squares(c, factor, 400, DEVICE)
    assert parts.shape == (4, 130)
    torch.testing.assert_close(parts.sum(0), plain.sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", ["score", "accumulate"])
def test_the_self_check_passes(form, op, monkeypatch):
    monkeypatch.setattr(self_check, "REPEATS", 2)
    monkeypatch.setattr(self_check, "ROWS", (17, 130))
    with recorded() as kernels:
        assert self_check.check(backend, f"{op}_{form}", torch.device("cpu")) is None
    assert "project_tma_kernel" in kernels
