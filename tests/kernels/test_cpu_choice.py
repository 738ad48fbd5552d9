"""Where nothing can be compiled rmcore is installed without its CPU kernels, and says so: by configuring alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc"
CMAKE = shutil.which("cmake")
NINJA = shutil.which("ninja")

pytestmark = pytest.mark.skipif(CMAKE is None or NINJA is None, reason="no cmake or no ninja")


def configure(folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    """(exit status, output) of cmake on rmcore's own sources."""
    assert CMAKE is not None
    clean = {k: v for k, v in os.environ.items() if k not in ("RMCORE_CUDA", "CXX", "CC")} | variables
    command = [
        CMAKE,
        "-S",
        str(SOURCE),
        "-B",
        str(folder / "build"),
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={NINJA}",
        *options,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=clean, timeout=120)
    return run.returncode, " ".join((run.stdout + run.stderr).split())


@pytest.fixture(params=["no compiler on the path", "a compiler that is not there", "a compiler that fails"])
def broken(request, tmp_path: Path) -> dict[str, str]:
    """An environment in which no C++ can be compiled."""
    if request.param == "no compiler on the path":
        tools = tmp_path / "bin"
        tools.mkdir()
        return {"PATH": str(tools)}
    if request.param == "a compiler that is not there":
        return {"CXX": str(tmp_path / "g++")}
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\nexit 1\n")
    fails.chmod(0o755)
    return {"CXX": str(fails)}


def test_without_a_compiler_it_is_built_without_kernels_and_says_so(broken: dict[str, str], tmp_path: Path) -> None:
    assert CMAKE is not None
    status, output = configure(tmp_path, **broken)
    assert status == 0, output
    assert "rmcore: building without rmcore._cpu: no C++ compiler that works is found (CXX names one)" in output
    assert "run on torch" in output
    for step in (
        ["--build", str(tmp_path / "build")],
        ["--install", str(tmp_path / "build"), "--prefix", str(tmp_path)],
    ):
        assert subprocess.run([CMAKE, *step], capture_output=True, check=False, timeout=60).returncode == 0
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("options", "variables", "told"),
    [
        (["-DRMCORE_CPU=ON"], {}, "-DRMCORE_CPU=ON, but no C++ compiler that works is found"),
        (["-DRMCORE_CUDA=ON"], {}, "RMCORE_CUDA asks for rmcore._cuda, but no C++ compiler"),
        ([], {"RMCORE_CUDA": "1"}, "RMCORE_CUDA asks for rmcore._cuda, but no C++ compiler"),
        (["-DRMCORE_CPU=maybe"], {}, "expected ON, OFF or AUTO"),
    ],
)
def test_who_insists_is_told_what_is_missing(options, variables, told, tmp_path: Path) -> None:
    status, output = configure(tmp_path, *options, CXX=str(tmp_path / "g++"), **variables)
    assert status != 0
    assert told in output
