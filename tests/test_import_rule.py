"""Imports run one way: the contracts in pyproject.toml break on a planted violation, lazy ones included."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import fresh_python

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LAZY = "\n\ndef planted() -> object:\n    {}\n    return {}\n"

pytest.importorskip("importlinter")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is linted, bench/ beside rmcore/ as in a checkout."""
    for name in ("rmcore", "bench"):
        leave_out = shutil.ignore_patterns("bench", "kernels", "examples", "results", "__pycache__", "*.so")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = fresh_python.command(
        "from importlinter.cli import lint_imports_command as main; main(['--no-cache'], standalone_mode=True)"
    )
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False)


def plant(path: Path, line: str, name: str) -> None:
    assert path.exists(), path
    path.write_text(path.read_text() + LAZY.format(line, name))


def test_the_tree_as_it_is_keeps_the_rule(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("where", "line", "name", "says"),
    [
        ("rmcore/ops/dispatch.py", "from rmcore.engine.engine import RewardEngine", "RewardEngine", "rmcore.engine"),
        ("rmcore/cli/score.py", "from bench.harness import Limits", "Limits", "bench.harness"),
        ("rmcore/judge/base.py", "from rmcore.head.config import HeadConfig", "HeadConfig", "a judge needs no model"),
        ("rmcore/engine/routing/__init__.py", "import rmcore.engine.engine", "rmcore", "routers know the table"),
    ],
)
def test_a_lazy_import_that_runs_back_up_breaks_it(tree: Path, where: str, line: str, name: str, says: str) -> None:
    plant(tree / where, line, name)
    done = lint_imports(tree)
    assert done.returncode != 0
    assert int(re.findall(r"(\d+) broken", done.stdout)[0]) >= 1  # one way back may break several contracts
    assert says in done.stdout
    assert where.removesuffix(".py").removesuffix("/__init__").replace("/", ".") in done.stdout


def test_two_modules_of_a_folder_make_no_circle_for_types_either(tree: Path) -> None:
    path = tree / "rmcore/engine/state.py"
    typed = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from rmcore.engine.engine import RewardEngine\n"
    path.write_text(path.read_text() + "\n\n" + typed)
    done = lint_imports(tree)
    assert done.returncode != 0
    assert "1 broken" in done.stdout
    assert "no circle in any folder BROKEN" in done.stdout
    assert ".state -> .engine" in done.stdout


@pytest.mark.parametrize(
    "line", ["from rmcore.bench.harness import Limits", "import rmcore.bench.harness", "from rmcore import bench"]
)
def test_the_installed_name_of_bench_counts_too(tree: Path, line: str) -> None:
    plant(tree / "rmcore/cli/score.py", line, line.split()[-1].partition(".")[0])
    command = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID251", "rmcore"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "bench stands above all of rmcore" in done.stdout


def test_kernels_take_only_what_stands_below_them() -> None:
    """Triton kernels know the weights' layout and each other; no contract sees them, as kernels/ is no package."""
    allowed = ("rmcore.kernels", "rmcore.ops.weights", "rmcore._base")
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            ours = [name for name in names if name.split(".")[0] in ("rmcore", "bench", "kernels")]
            assert all(name.startswith(allowed) for name in ours), (path.name, ours)
