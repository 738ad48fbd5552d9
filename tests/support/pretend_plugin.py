"""A plugin of pytest: tests/gpu on a GPU that is not there (``make gpu-rehearsal``).

But for what asks for a kernel itself, for minutes of a CPU, or for what torch keeps from a build without CUDA.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from support.pretend_gpu import pretending
from support.pretend_kernels import standing_in

KERNELS = ("same_whole_numbers", "same_features_in_every_batch")
LONG = (
    "full_size", "large", "results_repeat", "small_batches", "twice_the_same", "two_streams", "the_last_program",
    "every_batch_size", "edges_of_h_and_d", "test_power_iteration[4096", "test_power_iteration[700",
    "every_size_and_batch[1024", "every_size_and_batch[1003", "every_size_and_batch[72-2050", "unfolded_heads[1024",
)  # fmt: skip
NO_CUDA = ("nothing_waits", "packing")

_stack = ExitStack()


def pytest_configure() -> None:
    _stack.enter_context(pretending())
    _stack.enter_context(standing_in())


def pytest_unconfigure() -> None:
    _stack.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"asks for a kernel itself": KERNELS, "takes a CPU too long": LONG, "torch has no CUDA here": NO_CUDA}
    for item in items:
        for reason, names in reasons.items():
            if any(name in item.nodeid for name in names):
                item.add_marker(pytest.mark.skip(reason=reason))
