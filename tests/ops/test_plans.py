"""Launch plans of the cuda backend, with a native module that only notes what it is asked."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmcore import ops
from rmcore._base.errors import BackendError, InputError
from rmcore.ops import dispatch, plans, self_check
from rmcore.ops.backends import cuda

CPU = torch.device("cpu")


class Native:
    """Counts how a call came to its launch."""

    class BarrierTimeout(RuntimeError):  # noqa: N818 (the native module's name)
        pass

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def Head(self, **fields: Any) -> Any:  # noqa: N802
        return SimpleNamespace(**fields)

    def ScorePlan(self, head: Any, rows: int, device: int, streamed: bool) -> Any:  # noqa: N802
        return SimpleNamespace(rows=rows, workspace_bytes=1000 * rows)

    def score(self, *arguments: Any) -> None:
        if self.error is not None:
            raise self.error
        self.launches.append(arguments)


@pytest.fixture
def native(monkeypatch) -> Native:
    made = Native()
    monkeypatch.setattr(cuda, "_native", lambda: made)
    monkeypatch.setattr(cuda, "_hung", [])
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(cuda, "unavailable", lambda op, device, dtype: cuda._hung[0] if cuda._hung else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(plans, "_PLANNING", {"cpu": ("cuda", "triton")})
    monkeypatch.setattr(plans, "stream_of", lambda _index: 7)
    monkeypatch.setitem(dispatch._ORDER, "cpu", ("cuda", "torch"))
    return made


@pytest.fixture
def long_way(monkeypatch) -> list[int]:
    """A number for each call that was not planned."""
    taken: list[int] = []
    score = cuda.score
    monkeypatch.setattr(cuda, "score", lambda *task: (taken.append(1), score(*task))[1])
    return taken


def head() -> Any:
    return self_check._weights(CPU, torch.float16)


def rows(count: int, **kind: Any) -> torch.Tensor:
    return torch.randn(count, self_check._H).to(**({"dtype": torch.float16} | kind))


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_planned_call_asks_for_the_launch_that_the_long_way_asks_for(native, long_way, count, dtype):
    weights, hidden, out = head(), rows(count, dtype=dtype), torch.empty(4, count)
    for _ in range(3):
        ops.score(hidden, weights, out=out)
    assert len(long_way) == 1
    first, second, third = native.launches
    assert first == second == third
    other, place = rows(count, dtype=dtype), torch.empty(4, count)
    ops.score(other, weights, out=place)
    moved = {2: other.data_ptr(), 6: place.data_ptr()}
    assert native.launches[-1] == tuple(moved.get(k, value) for k, value in enumerate(first))
    assert len(long_way) == 1


def test_every_property_that_decides_has_a_plan_of_its_own(native, long_way):
    weights, wide = head(), torch.randn(20, self_check._H + 8).half()
    h = self_check._H
    kinds = [wide[:5, :h], wide[:6, :h], wide[::2, :h], wide[:5, 1 : h + 1], wide[:5, :h].float(), wide[:5, :h].clone()]
    for hidden in kinds:
        ops.score(hidden, weights)
        ops.score(hidden, weights, backend="cuda")
    assert len(long_way) == 2 * len(kinds)
    for hidden in kinds:
        ops.score(hidden, weights)
        ops.score(hidden, weights, backend="cuda")
    assert len(long_way) == 2 * len(kinds)


def test_what_a_plan_does_not_fit_goes_the_long_way(native, long_way, monkeypatch):
    weights, hidden = head(), rows(5)
    ops.score(hidden, weights)
    monkeypatch.setattr(plans, "stream_of", lambda _index: 8)  # nothing is set aside for that stream yet
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=8))
    for _ in range(2):
        ops.score(hidden, weights)
    assert len(long_way) == 2
    monkeypatch.setattr(plans, "stream_of", lambda _index: None)  # a graph is being captured
    ops.score(hidden, weights)
    assert len(long_way) == 3
    strided = torch.randn(self_check._H, 5).half().mT  # copied first, so no launch is like another
    for _ in range(2):
        ops.score(strided, weights)
    assert len(long_way) == 5


@pytest.mark.parametrize(
    "wrong", [{"hidden": torch.zeros(5, 3).half()}, {"out": torch.empty(4, 4)}, {"out": torch.empty(4, 5).half()}]
)
def test_a_plan_lets_nothing_pass_that_does_not_fit(native, wrong):
    weights, hidden, out = head(), rows(5), torch.empty(4, 5)
    ops.score(hidden, weights, out=out)
    with pytest.raises(InputError):
        ops.score(**({"hidden": hidden, "weights": weights, "out": out} | wrong))


def test_a_launch_that_gave_up_ends_planned_calls_too(native, monkeypatch):
    weights, hidden = head(), rows(5)
    ops.score(hidden, weights)
    native.error = Native.BarrierTimeout("thread block 3 did not come")
    with pytest.raises(BackendError, match="cuda: thread block 3"):
        ops.score(hidden, weights)
    native.error = None
    count = len(native.launches)
    scores = ops.score(hidden, weights)  # torch
    assert bool(torch.stack(scores).isfinite().all())
    assert len(native.launches) == count


def test_a_copy_of_a_head_starts_without_plans(native):
    weights = head()
    ops.score(rows(5), weights)
    assert len(weights.cache[plans._CACHE]) == 1
    kept = {plans._CACHE: weights.cache[plans._CACHE]}  # the native head beside it cannot be copied at all
    assert copy.deepcopy(kept) == {plans._CACHE: {}}
    assert pickle.loads(pickle.dumps(kept)) == {plans._CACHE: {}}
    assert plans._CACHE not in weights.clone().cache
