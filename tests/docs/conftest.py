"""The site's hooks as modules, the way mkdocs imports them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from support.pages import ROOT

HOOKS = ROOT / "docs" / "_hooks"


@pytest.fixture(scope="session")
def hooks() -> Iterator[dict[str, ModuleType]]:
    """``hooks["pages"]``, ``hooks["commands"]``, ``hooks["roles"]``."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("griffe")
    sys.path.insert(0, str(HOOKS))
    try:
        yield {name: importlib.import_module(name) for name in ("pages", "commands", "roles")}
    finally:
        sys.path.remove(str(HOOKS))
