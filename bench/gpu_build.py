"""What a run on the GPU machine needs there: rmcore as an installation has it, and its modules, carried or built.

Of the standard library alone, like all of :mod:`bench.gpu_check`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

__all__ = [
    "PREPARED",
    "ROOT",
    "architecture",
    "assemble",
    "build_command",
    "commit",
    "extension_loads",
    "newest_glibc",
    "prepare",
    "pybind11_folder",
]

ROOT = Path(__file__).resolve().parents[1]
PREPARED = ROOT / "out" / "gpu-check-prepared"
GLIBC = (2, 34)
"""Newest C library symbols that the GPU machine has."""


def assemble(tree: Path) -> None:
    """rmcore as an installation would have it: packages, kernels, bench, and the carried ``_cuda``; tests beside it."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "results", "kernels", "bench", "examples")
    shutil.copytree(ROOT / "rmcore", tree / "rmcore", ignore=skip)
    plain = shutil.ignore_patterns("__pycache__", "results")
    for name in ("kernels", "bench", "examples"):
        shutil.copytree(ROOT / name, tree / "rmcore" / name, ignore=plain)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=plain)
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=plain)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for path in PREPARED.glob("*.so"):
        shutil.copy(path, tree / "rmcore")


def commit() -> str:
    """Of the checkout; on a machine that got the files without git, of the folder that was prepared."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    noted = PREPARED / "COMMIT"
    return noted.read_text().strip() if noted.is_file() else "unknown"


def extension_loads(tree: Path) -> bool:
    """Whether the ``_cuda`` that was carried loads here."""
    code = "import rmcore._cuda as c; print(c.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def architecture() -> str:
    """Of the card there is, as cmake names it."""
    code = "import torch; major, minor = torch.cuda.get_device_capability(); print(major * 10 + minor)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    number = done.stdout.strip()
    return {"90": "90a-real", "100": "100a-real"}.get(number, f"{number}-real" if number else "90a-real")


def build_command(build: Path, python: str, architecture: str, pybind11: str, *, cpu: bool) -> list[list[str]]:
    """cmake's configure and build of ``_cuda``, and with ``cpu`` of ``_cpu``, for one Python and one architecture."""
    configure = [
        "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DRMCORE_CPU={'ON' if cpu else 'OFF'}", "-DRMCORE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11}",
    ]  # fmt: skip
    return [configure, ["cmake", "--build", str(build)]]


def pybind11_folder() -> str:
    """Where pybind11's cmake files lie."""
    code = "import pybind11; print(pybind11.get_cmake_dir())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def prepare(python: str, architecture: str = "90a-real") -> int:
    """Build for ``python`` (that of the GPU machine) into out/gpu-check-prepared; 0 if ``_cuda`` can travel.

    ``_cpu`` goes along where it can, so that the int8 tests have the CPU's whole numbers to compare with.
    """
    asked = "import sys, sysconfig; print(sys.executable, sysconfig.get_config_var('EXT_SUFFIX'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"--python {python}: does not run ({done.stderr.strip()[:200]}); name the Python of the GPU machine")
        return 1
    interpreter, suffix = done.stdout.split()  # the interpreter itself, where ``python`` is a launcher
    pybind11 = pybind11_folder()
    if not pybind11:
        print(f"{sys.executable} has no pybind11, which the build needs: pip install pybind11 cmake ninja")
        return 1
    shutil.rmtree(PREPARED, ignore_errors=True)  # nothing of an earlier commit, or of a build that failed
    PREPARED.mkdir(parents=True)
    build = PREPARED / "build"
    for command in build_command(build, interpreter, architecture, pybind11, cpu=True):
        subprocess.run(command, check=True)
    travels = {built.name.partition(".")[0]: _kept(built, suffix) for built in build.rglob("_*.so")}
    shutil.rmtree(build)
    (PREPARED / "COMMIT").write_text(commit() + "\n")
    return 0 if travels.get("_cuda") else 1


def _kept(built: Path, suffix: str) -> bool:
    """Copy a module that was built to where it is carried from, unless it would not load there."""
    if not built.name.endswith(suffix):
        print(f"{built.name} was built for another Python than the one named, whose modules end in {suffix}")
        return False
    needed = newest_glibc(built)
    if needed > GLIBC:
        print(f"{built.name} needs glibc {needed[0]}.{needed[1]}, newer than {GLIBC[0]}.{GLIBC[1]}: it would not load")
        return False
    target = PREPARED / built.name
    shutil.copy(built, target)
    print(f"{target} ({target.stat().st_size >> 10} KiB, glibc {needed[0]}.{needed[1]}): carry {PREPARED}")
    return True


def newest_glibc(library: Path) -> tuple[int, int]:
    """The newest ``GLIBC_x.y`` among the versions that a library asks for."""
    data = library.read_bytes()
    found = {(0, 0)}
    for part in data.split(b"GLIBC_")[1:]:
        digits = part.split(b"\0", 1)[0].decode("ascii", "replace").split(".")
        if len(digits) >= 2 and digits[0].isdigit() and digits[1].isdigit():
            found.add((int(digits[0]), int(digits[1])))
    return max(found)
