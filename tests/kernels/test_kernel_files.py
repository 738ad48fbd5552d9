"""Every Triton file reads in one order, and needs nothing but the standard library, torch and triton."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kernels"
FILES = sorted(ROOT.glob("*.py"))
OPERATIONS = [
    "features.py", "features_int8.py", "gram.py", "pair_variance.py", "power_iteration.py", "rows_int8.py",
    "score_int8.py", "variance.py",
]  # fmt: skip


def is_jit(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)


def part(node: ast.stmt) -> str | None:
    """Which part of a file a statement belongs to."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "imports"
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return "constants"
    if isinstance(node, ast.ClassDef):
        return "types"
    if isinstance(node, ast.FunctionDef):
        return "device" if is_jit(node) else "launchers"
    return None  # a docstring


def test_the_folder_is_not_a_package():
    """``kernels`` is Hugging Face's import name: with an __init__.py here it would be shadowed in the repository."""
    assert not (ROOT / "__init__.py").exists()
    assert [path.name for path in FILES if path.name in OPERATIONS] == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_formula_shapes_and_bytes_come_first_then_constants_device_code_and_launchers(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    head = ast.get_docstring(tree)
    assert head is not None
    rows = [line.split(" ", 1)[0] for line in head.splitlines() if line[:1].isalpha()]
    assert [row for row in rows if row in ("in", "out", "bytes")] == ["in", "out", "bytes"]
    formula = head.index("\n    ")  # an indented block
    assert "=" in head[formula:].splitlines()[1]
    assert formula < head.index("\nin ") < head.index("\nbytes ")
    assert "FLOP" in head[head.index("\nbytes ") :]
    found = [kind for node in tree.body if (kind := part(node)) is not None]
    order = ["imports", "constants", "types", "device", "launchers"]
    assert found == sorted(found, key=order.index)
    assert set(found) >= {"imports", "constants", "device", "launchers"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_relative_or_of_the_standard_library_torch_and_triton(path):
    """So that the same files are a package of their own on the kernels hub."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        for name in names:
            top = str(name).split(".")[0]
            assert top in {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {name}"
