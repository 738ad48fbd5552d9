"""Names that load on first use: one helper does it, for every package that needs it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from support.warm import WarmPython

import rmcore

ROOT = Path(rmcore.__file__).parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one lazy name, one lazy module, and a name that has moved."""
    folder = tmp_path / "lazy_sample"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from rmcore._base import lazy\n"
        "__getattr__, __dir__, __all__ = lazy.attach(\n"
        "    __name__, {'lazy_sample.one': ('A',), 'lazy_sample.two': ()}, moved={'B': 'import it from elsewhere'}\n"
        ")\n"
    )
    (folder / "one.py").write_text("A = object()\n")
    (folder / "two.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("lazy_sample")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_sample"]:
        del sys.modules[name]


def test_a_name_loads_its_module_once_and_is_then_an_ordinary_one(package):
    assert "lazy_sample.one" not in sys.modules
    first = package.A
    assert sys.modules["lazy_sample.one"].A is first
    assert vars(package)["A"] is first
    assert package.two is sys.modules["lazy_sample.two"]


def test_all_and_dir_list_what_has_not_been_loaded(package):
    assert package.__all__ == ["A", "two"]
    assert {"A", "two", "__name__"} <= set(dir(package))


def test_moved_and_unknown_names_raise_what_python_expects(package):
    with pytest.raises(ImportError, match=r"^lazy_sample\.B has moved: import it from elsewhere$"):
        package.B  # noqa: B018
    assert not hasattr(package, "C")
    with pytest.raises(AttributeError, match="module 'lazy_sample' has no attribute 'C'"):
        package.C  # noqa: B018


def test_no_module_has_a_lazy_loader_of_its_own():
    files = [path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts]
    assert len(files) > 100
    own = [
        str(path.relative_to(ROOT))
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
    ]
    assert own == []


LIGHT = """
import sys
import rmcore.engine.routing, rmcore.engine.learning, rmcore.evaluation.report, rmcore.evaluation.streams, rmcore.cli
import rmcore.integrations.server, rmcore.engine.usage
print(sorted({name.partition(".")[0] for name in sys.modules} & {"scipy", "pydantic", "prometheus_client", "fastapi"}))
"""


def test_libraries_of_one_task_load_with_that_task(torch_python: WarmPython):
    """A router without a saved state needs no pydantic, and a command line that only lists its options no scipy."""
    out, errors = torch_python.start(LIGHT).communicate()
    assert out.strip() == "[]", errors
