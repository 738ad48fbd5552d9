"""What one worker of a run makes and all of them use: xdist may give the tests of one file to several workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of this run's temporary files, filled by ``make(folder)`` in the first worker to ask.

    The others wait for it. Where ``make`` raises, the next to ask tries again and shows its own error.
    """
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's folder lies in that of the run
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (root / f"{name}.made").touch()
    return folder
