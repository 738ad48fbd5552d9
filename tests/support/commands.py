"""The command line's tree of commands, built once: typer builds all of it anew for every call of its test runner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

__all__: list[str] = []


@pytest.fixture(autouse=True, scope="session")
def _one_tree_of_commands() -> Iterator[None]:
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command), raising=False)
        yield
