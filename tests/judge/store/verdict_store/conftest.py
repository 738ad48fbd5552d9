"""What several files of this folder build on."""

from __future__ import annotations

import pytest

from rmcore.judge import VerdictStore


@pytest.fixture
def rows(execute):
    def rows(place, columns="*", table="calls"):
        return execute(place, f"SELECT {columns} FROM {table} ORDER BY 1")

    return rows


@pytest.fixture
def file_store(path):
    with VerdictStore(path) as store:
        yield store
