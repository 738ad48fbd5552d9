"""Triton's interpreter is chosen for a whole process: the tests of the interpreted kernels run in some of their own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from support.warm import WarmPython


@pytest.mark.parametrize("kernels", ["interpret", "int8_interpret", "tma_interpret"])
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernels_are_right_in_the_interpreter(torch_python: WarmPython, tmp_path: Path, kernels: str) -> None:
    tests = Path(__file__).with_name(f"test_triton_{kernels}.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    some = [] if os.environ.get("RMCORE_ALL_ARCHS") == "1" else ["-m", "not slow"]
    options = ["-q", *some, "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path / 'inner'}"]
    done = torch_python.start("", *options, tests, module="pytest", env=environment | {"TRITON_INTERPRET": "1"})
    out, errors = done.communicate(800)
    assert done.returncode == 0, out + errors
    assert " passed" in out
    assert "skipped" not in out
