"""The CUDA kernels for every architecture of a release: no spills, registers and shared memory within limits; on Hopper
matrix instructions of whole warpgroups where they are claimed, several under way at once.

``make test`` compiles the device code for Hopper in fp16, once: ptxas's report is kept in pytest's cache for as long as
the compiler, its options and everything in csrc/cuda stay as they are. ``make compile-gate`` sets RMCORE_ALL_ARCHS=1:
the other architectures, host code too, and nothing from the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
KERNELS = {
    "score_fp16.cu": 6,
    "score_bf16.cu": 6,
    "power_iteration.cu": 6,
    "int8_score.cu": 4,
    "mid_fp16.cu": 4,
    "mid_bf16.cu": 4,
}
STATIC_SHARED = {
    "score_fp16.cu": 512,
    "score_bf16.cu": 512,
    "power_iteration.cu": 2048,
    "int8_score.cu": 512,
    "mid_fp16.cu": 0,  # the ring must begin where the dynamic part does
    "mid_bf16.cu": 0,
}  # as the launchers set aside
THREADS = {"mid_fp16.cu": 288, "mid_bf16.cu": 288}  # of a block; others have 256, and a warp more with few registers
MID_ROWS = (64, 128, 192, 256)
NVCC = shutil.which("nvcc")
GATE = os.environ.get("RMCORE_ALL_ARCHS") == "1"
ARCHS = ["80", "90a", "100"] if GATE else ["90a"]
TESTED = KERNELS if GATE else ["score_fp16.cu", "power_iteration.cu", "mid_fp16.cu"]  # bf16: the same code


def compile_command(source: str, architecture: str) -> list[str]:
    assert NVCC is not None
    # The host half is the same for every architecture, and takes a third of the time.
    output = "-c" if GATE and architecture == "90a" else "-cubin"
    return [NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", output, str(SOURCES / source)]


def cache_key(command: list[str], sources: Path = SOURCES) -> str:
    """Of all that decides what the compiler says: itself, what it is told, and every file it may include."""
    digest = hashlib.sha256()
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("NVCC_", "CUDA_", "CPATH"))}
    files = [path for path in sorted(sources.iterdir()) if path.is_file()]
    named = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    for part in (version, json.dumps([command, told]).encode(), *named):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def resources(command: list[str], folder: Path) -> list[dict[str, int]]:
    """registers, spill bytes and static shared bytes of each kernel in a file, as ptxas reports them."""
    run = subprocess.run([*command, "-o", str(folder / "kernel.o")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    assert not re.search(r"\(C75\d\d\)", run.stderr), run.stderr  # wgmma one after the other, or waited for too early
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


def cuobjdump() -> str | None:
    """The disassembler: of the toolkit, or the one that Triton brings."""
    found, triton = shutil.which("cuobjdump"), importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def instructions(built: Path) -> list[dict[str, int]]:
    """Of each kernel in a compiled file: how many matrix instructions of each width, how many of them are the last of
    what is waited for together, and how many tensor map loads."""
    tool = cuobjdump()
    if tool is None:
        return []
    text = subprocess.run([tool, "-sass", str(built)], capture_output=True, text=True, check=True).stdout
    found = []
    for block in text.split("Function : ")[1:]:
        counts = {"loads": len(re.findall(r"\bUTMALDG\.2D\b", block)), "last": 0}
        for width, rest in re.findall(r"\bHGMMA\.64x(\d+)x16\.F32\S* ([^;]*);", block):
            counts[width] = counts.get(width, 0) + 1
            counts["last"] += "gsb0" in rest
        found.append(counts)
    return found


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHS)
@pytest.mark.parametrize("source", TESTED)
def test_kernels_fit(source, architecture, tmp_path, request):
    command = compile_command(source, architecture)
    entry = f"rmcore/ptxas/{source}-{architecture}"
    key = cache_key(command)
    kept = None if GATE else request.config.cache.get(entry, None)
    found = kept["kernels"] if kept and kept["key"] == key else resources(command, tmp_path)
    matrix = source in THREADS and architecture == "90a"
    counts = kept.get("counts") if kept and kept["key"] == key else instructions(tmp_path / "kernel.o")
    assert len(found) == KERNELS[source]
    for kernel in found:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] * THREADS.get(source, 256) <= 65536, kernel
        assert kernel["shared"] <= STATIC_SHARED[source], kernel
    if matrix and cuobjdump():
        check_matrix_instructions(counts)
    request.config.cache.set(entry, {"key": key, "kernels": found, "counts": counts})


def check_matrix_instructions(counts: list[dict[str, int]]) -> None:
    """Each kernel multiplies N and N / 2 rows of the batch, and waits once for the four products of a slot of the ring:
    where ptxas serialises them, every one of them is waited for."""
    widths = [{name for name in kernel if name.isdigit()} for kernel in counts]
    assert sorted(widths, key=str) == sorted(({str(n), str(n // 2)} for n in MID_ROWS), key=str)
    for kernel in counts:
        products = sum(n for name, n in kernel.items() if name.isdigit())
        assert products >= 8, kernel
        assert kernel["last"] * 4 == products, kernel
        assert kernel["loads"] >= 4, kernel


def test_a_cached_result_is_of_the_same_compiler_options_and_files(tmp_path, monkeypatch):
    for name in ("a.cu", "a.cuh"):
        (tmp_path / name).write_text("x")
    compiler = shutil.which("true") or "true"
    keys = [cache_key([compiler, "-O3"], tmp_path), cache_key([compiler, "-O2"], tmp_path)]
    (tmp_path / "a.cuh").write_text("y")
    keys.append(cache_key([compiler, "-O3"], tmp_path))
    (tmp_path / "a.cuh").rename(tmp_path / "b.cuh")
    keys.append(cache_key([compiler, "-O3"], tmp_path))
    keys.append(cache_key([shutil.which("echo") or "echo", "-O3"], tmp_path))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    keys.append(cache_key([compiler, "-O3"], tmp_path))
    assert len(set(keys)) == len(keys)
