"""``auto`` that has only torch left says so, once."""

from __future__ import annotations

import logging

import pytest
import torch

from rmcore import ops
from rmcore.ops import dispatch
from rmcore.ops.backends import cpu


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """As in a process that has not said anything yet."""
    monkeypatch.setattr(dispatch, "_told", set())
    dispatch._tell_fallback.cache_clear()
    yield
    dispatch._tell_fallback.cache_clear()


def test_a_build_without_kernels_is_told_once(fresh, make_data, fit_head, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_missing", "no module", raising=False)
    head = fit_head(make_data(), num_features=32)
    caplog.clear()
    dispatch._told.clear()
    dispatch._tell_fallback.cache_clear()
    for _ in range(3):
        ops.score(torch.zeros(2, 16), head.weights)
    ops.power_iteration(torch.ones(3, 3), torch.ones(3))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "backend 'auto' runs on torch" in caplog.text
    assert "cpu: rmcore._cpu was not built" in caplog.text


def test_who_asks_for_torch_or_brings_float64_is_told_nothing(fresh, make_data, fit_head, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_missing", "no module", raising=False)
    head = fit_head(make_data(), num_features=32)
    ops.score(torch.zeros(2, 16), head.weights, backend="torch")
    ops.score(torch.zeros(2, 16, dtype=torch.float64), head.weights)
    assert not caplog.records


@pytest.mark.skipif(cpu._cpu is None, reason="rmcore._cpu is not built")
def test_a_dtype_that_no_kernel_has_is_no_fallback_of_the_build(fresh, caplog) -> None:
    dispatch.select("score", torch.zeros(1, 4), torch.float64, "auto")
    assert not caplog.records
