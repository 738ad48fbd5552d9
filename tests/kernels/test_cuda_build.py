"""The CUDA kernels for every architecture of a release: no spills, registers and shared memory within limits.

For Hopper, host code too; ``make compile-gate`` sets RMCORE_ALL_ARCHS=1 and has the device code of the others compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
KERNELS = {"score_fp16.cu": 4, "score_bf16.cu": 4, "power_iteration.cu": 6}
STATIC_SHARED = {"score_fp16.cu": 512, "score_bf16.cu": 512, "power_iteration.cu": 2048}  # as the launchers set aside
NVCC = shutil.which("nvcc")
ARCHS = ["80", "90a", "100"] if os.environ.get("RMCORE_ALL_ARCHS") == "1" else ["90a"]


def resources(source: str, architecture: str, folder: Path) -> list[dict[str, int]]:
    """registers, spill bytes and static shared bytes of each kernel in a file, as ptxas reports them."""
    assert NVCC is not None
    # The host half is the same for every architecture, and takes a third of the time.
    output = "-c" if architecture == "90a" else "-cubin"
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", output, str(SOURCES / source)]
    run = subprocess.run([*command, "-o", str(folder / "kernel.o")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    found = []
    for block in run.stderr.split("Compiling entry function")[1:]:
        shared = re.search(r"(\d+) bytes smem", block)
        found.append(
            {
                "registers": int(re.search(r"Used (\d+) registers", block)[1]),
                "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", block)),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return found


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHS)
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_fit(source, architecture, tmp_path):
    found = resources(source, architecture, tmp_path)
    assert len(found) == KERNELS[source]
    for kernel in found:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] * 256 <= 65536, kernel
        assert kernel["shared"] <= STATIC_SHARED[source], kernel
