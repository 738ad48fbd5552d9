"""When CMake builds rmcore._cuda, by configuring alone: a GPU is seen, or somebody asks; one line says which."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHOICE = Path(__file__).parents[2] / "csrc" / "cuda_choice.cmake"
CMAKE = shutil.which("cmake")
PROJECT = f"""
cmake_minimum_required(VERSION 3.24)
project(choice LANGUAGES NONE)
include("{CHOICE.as_posix()}")
rmcore_choose_cuda(BUILD)
message(STATUS "BUILD=${{BUILD}}")
"""
GPU_FILES = bool([*Path("/proc/driver/nvidia/gpus").glob("*"), *Path("/dev").glob("nvidia[0-9]*")])

pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def configure(
    folder: Path, *, gpu: bool, nvcc: bool = True, environment: str | None = None, define: str | None = None
) -> tuple[int, str]:
    """(exit status, output) of cmake where nvidia-smi lists a GPU or none, and nvcc is there or not."""
    assert CMAKE is not None
    (folder / "CMakeLists.txt").write_text(PROJECT, encoding="utf-8")
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + ("echo 'GPU 0: NVIDIA H100 (UUID: x)'\n" if gpu else "exit 9\n"), encoding="utf-8")
    smi.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "RMCORE_CUDA"}
    if environment is not None:
        variables["RMCORE_CUDA"] = environment
    options = [f"-DRMCORE_NVIDIA_SMI={smi}", f"-DCMAKE_CUDA_COMPILER={'/fake/nvcc' if nvcc else 'NOTFOUND'}"]
    options += [] if define is None else [f"-DRMCORE_CUDA={define}"]
    command = [CMAKE, "-S", str(folder), "-B", str(folder / "build"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=120)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.skipif(GPU_FILES, reason="this machine has a GPU")
def test_nvcc_without_a_gpu_builds_nothing_and_says_how_to_ask(tmp_path):
    status, output = configure(tmp_path, gpu=False)
    assert status == 0
    assert "BUILD=FALSE" in output
    assert "building without rmcore._cuda: no GPU seen (RMCORE_CUDA=1 builds it all the same)" in output


@pytest.mark.parametrize(
    ("arguments", "built", "says"),
    [
        ({"gpu": True}, True, "building with rmcore._cuda: a GPU is seen (RMCORE_CUDA=0 leaves it out)"),
        ({"gpu": False, "environment": "1"}, True, "with rmcore._cuda: environment RMCORE_CUDA=1"),
        ({"gpu": True, "environment": "0"}, False, "without rmcore._cuda: environment RMCORE_CUDA=0"),
        ({"gpu": False, "define": "ON"}, True, "with rmcore._cuda: -DRMCORE_CUDA=ON"),
        ({"gpu": True, "define": "OFF", "environment": "1"}, False, "without rmcore._cuda: -DRMCORE_CUDA=OFF"),
        ({"gpu": True, "define": "AUTO", "environment": "0"}, True, "a GPU is seen"),
        ({"gpu": True, "environment": ""}, True, "a GPU is seen"),
        ({"gpu": True, "nvcc": False}, False, "a GPU is seen, but nvcc is not found (CUDACXX names it)"),
    ],
)
def test_who_asks_is_heard_and_named(tmp_path, arguments, built, says):
    status, output = configure(tmp_path, **arguments)
    assert status == 0, output
    assert f"BUILD={str(built).upper()}" in output
    assert says in output
    assert output.count("rmcore: building") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpu": True, "environment": "1", "nvcc": False}, "environment RMCORE_CUDA=1, but nvcc is not found"),
        ({"gpu": True, "environment": "maybe"}, "environment RMCORE_CUDA=maybe: expected ON, OFF, 1, 0 or AUTO"),
    ],
)
def test_what_cannot_be_done_stops_the_build(tmp_path, arguments, says):
    status, output = configure(tmp_path, **arguments)
    assert status != 0
    assert says in " ".join(output.split())
