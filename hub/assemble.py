"""The kernels-hub source tree: hub/ with the Triton files of kernels/ beside its package's own.

    python hub/assemble.py OUT            what ``nix run .#build-and-copy`` builds from
    python hub/assemble.py OUT --local    with the ``_ops.py`` that the builder would write, to import without building

The files of kernels/ import nothing but each other, torch and triton, so they are copied as they stand.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rmcore_head"
KERNELS = ("common.py", "features.py", "heuristics.py", "power_iteration.py", "variance.py")
OPS = '''"""Written by hub/assemble.py --local, as the kernel builder does."""

import torch

ops = torch.ops._rmcore_head_local


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix op by namespace."""
    return f"_rmcore_head_local::{op_name}"
'''


def assemble(out: Path, *, local: bool = False) -> Path:
    """Write the tree to ``out``, which must be new, and return its Python package's folder."""
    shutil.copytree(ROOT / "hub", out, ignore=shutil.ignore_patterns("assemble.py", "__pycache__"))
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    package = out / "torch-ext" / PACKAGE
    for name in KERNELS:
        shutil.copy(ROOT / "kernels" / name, package / name)
    if local:
        (package / "_ops.py").write_text(OPS, encoding="utf-8")
    return package


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--local", action="store_true", help="importable without building")
    arguments = parser.parse_args()
    assemble(arguments.out, local=arguments.local)
