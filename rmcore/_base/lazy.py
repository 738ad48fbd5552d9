"""Names of a package that are imported on first use, and names that have moved."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["attach", "refuse_moved_modules"]


def attach(
    package: str, homes: Mapping[str, Sequence[str]], moved: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names load on first use (PEP 562).

    Args:
        package: the package's ``__name__``.
        homes: the public names by the module that defines them; an empty sequence means the module itself.
        moved: old public names and the import that replaces each.

    The ``__getattr__`` raises ImportError for a moved name, saying where it is now, and AttributeError for others.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    modules = {module.rpartition(".")[2]: module for module, names in homes.items() if not names}

    def load(name: str) -> Any:
        if name in home_of:
            value = getattr(importlib.import_module(home_of[name]), name)
        elif name in modules:
            value = importlib.import_module(modules[name])
        elif moved is not None and name in moved:
            raise ImportError(f"{package}.{name} has moved: {moved[name]}", name=f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    names = sorted([*home_of, *modules])
    return load, lambda: sorted({*vars(sys.modules[package]), *names}), names


class _Refusal(importlib.abc.MetaPathFinder):
    """Raises ImportError for modules that have moved, saying where to; finds nothing else."""

    def __init__(self, package: str, moved: Mapping[str, str]) -> None:
        self.package, self.moved = package, moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        prefix, _, name = fullname.partition(".")
        if prefix == self.package and name in self.moved:  # "judge.replay", say
            raise ImportError(f"{fullname} has moved: it is {self.moved[name]} now", name=fullname)
        return None


def refuse_moved_modules(package: str, moved: Mapping[str, str]) -> None:
    """Let an import of a moved module of ``package`` (names below it) say where the module is now."""
    # Last in line: it is asked only for what nobody else finds.
    sys.meta_path.append(_Refusal(package, moved))
