"""Preference data made on the spot, and heads fitted on it with the torch backend."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from rmcore.head import FrozenHead, SNGPHead
from rmcore.head.fit import fit

pytest_plugins = ("support.commands", "support.models", "support.folders", "support.hub", "support.warm")

# New examples at every run find faults, and belong to whoever made the change at hand: .ci/run asks for the same ones.
settings.register_profile(
    "rmcore",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=40,
    derandomize=os.environ.get("RMCORE_EXAMPLES") == "fixed",
)
settings.load_profile("rmcore")


class Data(NamedTuple):
    """Rows, pairs of them, who won each, and the true logit of each pair."""

    hidden: Tensor
    labels: Tensor
    pairs: Tensor
    logit: Tensor


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected lives to the end: the garbage collector need not go through it, again and again.

    (Some libraries collect on purpose: accelerate does at the start of every training, half a second each.)
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first, so that no run ends with all its workers but one idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setenv("RMCORE_CACHE", "off")


@pytest.fixture(autouse=True)
def _one_thread_for_small_matrices(request) -> Iterator[None]:
    """Threads only hurt where matrices are tiny, and on a busy machine they hurt by minutes."""
    threads = torch.get_num_threads()
    if {"cli", "docs", "engine", "head", "model", "reference"} & set(request.path.parts):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Data]:
    """Gaussian rows; the true reward is smooth and not linear; labels are drawn from the true logits."""

    def make(rows=300, size=16, pairs=500, *, seed=0, scale=1.0, shift=0.0, dtype=torch.float64) -> Data:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        reward = 2 * torch.sin(x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3]
        first = torch.randint(rows, (pairs,), generator=generator)
        second = (first + torch.randint(1, rows, (pairs,), generator=generator)) % rows
        logit = reward[first] - reward[second]
        labels = (torch.rand(pairs, generator=generator, dtype=torch.float64) < logit.sigmoid()).to(dtype)
        return Data((x * scale + shift).to(dtype), labels, torch.stack([first, second], dim=1), logit)

    return make


@pytest.fixture(scope="session")
def fit_head() -> Callable[..., FrozenHead]:
    """A difference-mode head on data, in float32 unless told."""

    def make(data: Data, *, dtype=torch.float32, num_features=64, **config) -> FrozenHead:
        head = SNGPHead(data.hidden.shape[1], num_features=num_features, **config)
        if head.config.mode == "difference":
            return fit(head, data.hidden, data.labels, pairs=data.pairs, dtype=dtype, backend="torch")[0]
        labels = torch.zeros(len(data.hidden))
        labels[data.pairs[:, 0]] = data.labels.float()
        return fit(head, data.hidden, labels, dtype=dtype, backend="torch")[0]

    return make
