"""What several files of this folder build on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_output import call

from rmcore.cli.output import json_line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, backbone_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("output")
    rows = [
        {"question": "red tree", "good": f"{good} {word}", "bad": f"{bad} {word}"}
        for good, bad in (("good", "bad"), ("clear", "vague"), ("kind", "rude"))
        for word in ("red", "blue", "green", "tree")
    ]
    (folder / "prefs.jsonl").write_text("".join(json_line(row) for row in rows))
    result = call(
        "train", folder / "prefs.jsonl", "--columns", "prompt=question", "chosen=good", "rejected=bad", "--backbone",
        backbone_path, "--pooling", "mean", "--features", 64, "-o", folder / "model",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder / "model"
