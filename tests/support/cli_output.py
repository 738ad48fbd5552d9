"""Commands in process, for tests of what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.cli.output import json_line

__all__ = ["ROW", "call", "groups", "ids", "runner"]


runner = CliRunner()
ROW = {"prompt": "red tree house", "responses": ["good clear", "bad rude", "odd vague"]}


def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


def groups(path: Path, count: int, **more: Any) -> Path:
    path.write_text("".join(json_line({**ROW, "id": k, **more}) for k in range(count)))
    return path


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]
