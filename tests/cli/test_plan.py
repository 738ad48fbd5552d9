"""`rmcore plan`: a table, or numbers for a script."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from rmcore.cli import app


def test_plan_says_what_a_run_takes(backbone_path: Path, tmp_path: Path) -> None:
    given = ["plan", "--backbone", str(backbone_path), "--batch", "1", "--prompt", "8", "--response", "8"]
    told = CliRunner().invoke(app, given)
    assert told.exit_code == 0, told.stderr
    assert "| **peak** |" in told.stdout
    numbers = json.loads(CliRunner().invoke(app, [*given, "--json", "--lora", "4", "--precision", "fp32"]).stdout)
    assert 0 < numbers["trained"] < numbers["parameters"]
    assert numbers["memory"] > numbers["weights"]
    refused = CliRunner().invoke(app, [*given, "--mfu", "2"])
    assert (refused.exit_code, refused.stderr[:14]) == (2, "rmcore: --mfu:")
    missing = CliRunner().invoke(app, ["plan", "--backbone", str(tmp_path / "nothing")])
    assert missing.exit_code == 1
