"""What was measured on a card is known again by its sources, whoever built them; a change of them is not."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from rmcore.ops import proven, sources

ROOT = Path(__file__).parents[2]
CUDA, KERNELS = ROOT / "csrc" / "cuda", ROOT / "kernels"
CMAKE = shutil.which("cmake")


def cuda_digest(folder: Path, out: Path, which: str = "") -> str:
    """What the build puts into the module."""
    if CMAKE is None:
        pytest.skip("no cmake")
    command = [CMAKE, f"-DFOLDER={folder}", f"-DOUT={out}", "-P", str(CUDA / "sources_digest.cmake")]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = re.findall(rf'^#define RMCORE_CUDA_SOURCES{which} "(\w{{64}})"$', out.read_text(), re.MULTILINE)
    return str(found)


def test_the_shipped_facts_are_of_the_sources_of_their_commits(tmp_path):
    """What was measured stays proven exactly where git says that nothing of it has changed."""
    for commit in {row.commit for row in proven.findings().values()}:
        command = ["git", "-C", str(ROOT), "archive", commit, "csrc/cuda", "kernels"]
        archive = subprocess.run(command, capture_output=True, check=False)
        if archive.returncode:
            pytest.skip(f"no git history with {commit}")
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(tmp_path / commit, filter="data")
        cuda = cuda_digest(tmp_path / commit / "csrc" / "cuda", tmp_path / f"{commit}.h")
        for row in proven.findings().values():
            if row.commit == commit:
                of_triton = sources.triton_sources(tmp_path / commit / "kernels", row.op)
                assert row.sources == (cuda if row.backend == "cuda" else of_triton), row


def test_the_digest_of_cuda_is_of_what_computes_by_name_and_content(tmp_path):
    folder = tmp_path / "cuda"
    shutil.copytree(CUDA, folder)
    digest = cuda_digest(folder, tmp_path / "digest.h")
    for name in ("binding.cpp", "emulate.cpp", "emulate.h", "CMakeLists.txt"):
        (folder / name).write_text("another")
    assert cuda_digest(folder, tmp_path / "digest.h") == digest
    found = {digest}
    for name in ("score.cuh", "score_plan.cpp", "device.h", "score_fp16.cu"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        found.add(cuda_digest(folder, tmp_path / "digest.h"))
    (folder / "device.h").rename(folder / "devices.h")
    found.add(cuda_digest(folder, tmp_path / "digest.h"))
    assert len(found) == 6


def test_kernels_of_their_own_files_have_digests_of_their_own(tmp_path):
    """Their files say nothing against what was measured of the others; those that they include do against them."""
    folder, out = tmp_path / "cuda", tmp_path / "digest.h"
    shutil.copytree(CUDA, folder)
    kinds = ("", "_INT8", "_MID")

    def changed(name: str) -> set[str]:
        before = {which: cuda_digest(folder, out, which) for which in kinds}
        assert len(set(before.values())) == 3
        (folder / name).write_text("another")
        return {which for which in kinds if cuda_digest(folder, out, which) != before[which]}

    assert changed("int8_stream.cuh") == {"_INT8"}
    for name in ("mid.h", "mid.cuh", "mid_ptx.cuh", "mid_plan.cpp", "mid_launch.cpp", "mid_fp16.cu"):
        assert changed(name) == {"_MID"}
    assert changed("stream.cuh") == set(kinds)


def test_what_the_module_includes_is_in_its_digest():
    """From the sources that CMake compiles, along every #include: nothing but the binding is outside the digest."""
    listed = re.search(r"pybind11_add_module\(_cuda[^)]*\)", (CUDA / "CMakeLists.txt").read_text())
    assert listed is not None
    wanted, seen = re.findall(r"\w+\.(?:cpp|cu)\b", listed[0]), set()
    while wanted:
        name = wanted.pop()
        if name not in seen and name != "sources_digest.h":
            seen.add(name)
            wanted += re.findall(r'^#include "([^"]+)"', (CUDA / name).read_text(), re.MULTILINE)
    suffixes = {".cpp", ".cu", ".cuh", ".h"}
    digested = {
        p.name for p in CUDA.iterdir() if p.suffix in suffixes and not p.name.startswith(("binding", "emulate"))
    }
    assert seen - {"binding.cpp"} == digested


def test_an_operations_digest_is_of_its_own_files(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = {op: sources.triton_sources(folder, op) for op in sources.LAUNCHED}
    assert len(set(before.values())) == len(sources.LAUNCHED) - 2  # two forms of an operation share their files
    assert before == {op: sources.sources("triton", op) for op in sources.LAUNCHED}

    def changed(name: str) -> set[str]:
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n")
        now = {op for op in sources.LAUNCHED if sources.triton_sources(folder, op) != before[op]}
        (folder / name).write_text(text)
        return now

    assert changed("heuristics.py") == changed("common.py") == set(sources.LAUNCHED)
    scored, summed = ({f"{op}_{form}" for form in ("persistent", "specialized")} for op in ("score", "accumulate"))
    assert changed("gram.py") == {"accumulate"} | summed
    assert changed("power_iteration.py") == {"power_iteration"}
    assert changed("variance.py") == {"score", "pair_variance"} | scored
    assert changed("features_tma.py") == changed("heuristics_tma.py") == scored | summed
    assert changed("variance_tma.py") == scored
    assert changed("gram_tma.py") == summed
    assert changed("rows_int8.py") == {"score_int8"}


def test_an_operation_launches_from_the_files_that_its_digest_is_of():
    """Along the functions of the backend that each operation comes by, every file of rmcore.kernels they import."""
    backends = ROOT / "rmcore" / "ops" / "backends"
    parts = {}
    for file in ("triton", "triton_tma"):  # of the latter by its name there, ``triton_tma.score``
        before = "triton_tma." if file == "triton_tma" else ""
        for node in ast.parse((backends / f"{file}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                parts[before + node.name] = node
    large = {name for name in parts if name.startswith("triton_tma.")}
    # Of score the backend's functions for 16-bit heads and for int8 ones part ways in ``_score_rows``, as do the forms.
    entries = {"score": ["score", "plan"], "score_int8": ["_score_int8", "declines", "plan"]}
    other = {"score": {"_score_int8", "declines"} | large, "score_int8": {"_score_rows"} | large, "accumulate": large}
    for form in ("persistent", "specialized"):
        entries[f"score_{form}"] = ["triton_tma.score", "triton_tma.memory", "plan"]
        entries[f"accumulate_{form}"] = ["accumulate"]
        other[f"score_{form}"] = {"_score_rows"}
    for op in sources.LAUNCHED:
        wanted, seen, imported = [*entries.get(op, [op])], set(other.get(op, ())), set()
        while wanted:
            name = wanted.pop()
            if name in seen or name not in parts:
                continue
            seen.add(name)
            inside = "triton_tma." if name in large else ""
            for node in ast.walk(parts[name]):
                if isinstance(node, ast.Name):
                    wanted.append(inside + node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    wanted.append(f"{node.value.id}.{node.attr}")
                elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("rmcore.kernels"):
                    whole = node.module == "rmcore.kernels"
                    imported |= {a.name for a in node.names} if whole else {str(node.module).rpartition(".")[2]}
        assert imported - {"heuristics"} == set(sources.LAUNCHED[op]), op
