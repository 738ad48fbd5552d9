"""Preference files that the tiny encoder of ``support.folders`` can learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.folders import preference_rows


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in preference_rows(60)) + "\n")
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held out.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in preference_rows(30, seed=9)) + "\n")
    return path
