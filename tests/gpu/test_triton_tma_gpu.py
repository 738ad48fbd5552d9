"""The persistent forms of the large products on a GPU: numbers against float64, bits, graphs, plans, strips."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextvars import Context
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_checks as checks

from rmcore import ops
from rmcore.ops.backends import triton as backend
from rmcore.ops.backends import triton_tma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
FORMS = triton_tma.FORMS[1:]


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with checks.poisoned_workspaces():
        yield
    torch.cuda.synchronize()


@pytest.fixture(params=FORMS)
def form(request) -> Iterator[str]:
    """A form, taken from one row on."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the forms have tables for Hopper alone")
    with triton_tma.choosing(triton_tma.Large(request.param, 1)):
        yield request.param


def rows_of(count: int, h: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(count, h, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_score_at_every_row_of_the_tables_and_odd_sizes(form, dtype):
    for h, d in ((384, 600), (392, 403), (8, 129)):
        weights = checks.make_head(h, d, dtype, device="cuda")
        for rows in (1, 65, 129, 513, 1025):
            checks.check_score(rows_of(rows, h, dtype), weights)


def test_few_programs_have_many_tiles_each_and_the_bits_of_all(form):
    weights, hidden = checks.make_head(384, 600, torch.float16, device="cuda"), rows_of(2000, 384)
    found = []
    for programs in (0, 1, 7, 64):
        out = torch.full((4, 2000), math.nan, device="cuda")
        with triton_tma.choosing(triton_tma.Large(form, 1, programs)):
            for _ in range(3):
                backend.score(hidden, weights, out)
                found.append(out.clone())
    assert all(torch.equal(out, found[0]) for out in found)


def test_more_rows_than_a_strip(form):
    weights, hidden = checks.make_head(64, 300, torch.float16, device="cuda"), rows_of(4500, 64)
    checks.check_score(hidden, weights)


def test_rows_of_any_strides_and_dtype(form):
    weights, wide = checks.make_head(64, 300, torch.float16, device="cuda"), rows_of(600, 256)
    for hidden in (wide[:, 64:128], wide[::2, 8:72], wide[:, 3:67], wide[:, 10:138:2], wide[:, :64].float()):
        checks.check_score(hidden, weights)


def test_accumulate_is_right_and_repeatable(form):
    weights = checks.make_head(72, 300, torch.float16, device="cuda")
    labels = torch.randint(2, (17000,), device="cuda").float()
    hidden = rows_of(17000, 72)
    first = checks.check_accumulate(hidden, labels, weights)
    again = checks.check_accumulate(hidden, labels, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pairs = torch.randint(2000, (1500, 2), device="cuda")
    checks.check_accumulate(hidden[:2000], labels[:1500], weights, pairs=pairs, precision_dtype=torch.float64)


def test_a_captured_graph_replays_on_new_data(form):
    weights, hidden = checks.make_head(384, 600, torch.float16, device="cuda"), rows_of(700, 384)
    out = torch.empty(4, 700, device="cuda")
    backend.score(hidden, weights, out)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.score(hidden, weights, out)
    hidden.copy_(rows_of(700, 384))
    out.fill_(math.nan)
    graph.replay()
    want = torch.empty(4, 700, device="cuda")
    backend.score(hidden, weights, want)
    assert torch.equal(out, want)


def test_planned_calls_where_nobody_has_set_an_allocator_give_the_same_bits(form):
    """In an empty context, as a new thread has it, Triton knows no memory for descriptors: ours comes along."""
    weights, hidden = checks.make_head(384, 600, torch.float16, device="cuda"), rows_of(700, 384)
    calls = [
        Context().run(ops.score, hidden, weights, backend="triton") for _ in range(4)
    ]  # the long way, then planned
    first, *others = (torch.stack(tuple(scores)) for scores in calls)
    assert all(torch.equal(first, other) for other in others)
    want = torch.empty(4, 700, device="cuda")
    backend.score(hidden, weights, want)
    assert torch.equal(first, want)
