"""The README's example runs as printed (with a local backbone and a loopback judge in place of the network)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rmcore.judge import RecordedJudge, ReplayServer

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(backbone_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    rows = [
        {"prompt": "Name a prime above 10.", "first": a, "second": b, "verdict": "win"}
        for a, b in [("11.", "Bananas are yellow."), ("11.", "12 is prime."), ("12 is prime.", "Bananas are yellow.")]
    ]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        assert code.count("sentence-transformers/all-MiniLM-L6-v2") == code.count("http://localhost:8000/v1") == 1
        code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(backbone_path))
        code = code.replace("http://localhost:8000/v1", server.base_url)
        exec(compile(code, "README.md", "exec"), {})
        assert server.requests == 2, "one pair of three, in both orders"
    assert "'judge': 1" in capsys.readouterr().out


def test_the_example_imports_from_rmcore_alone() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    modules = [line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert modules == ["rmcore"]


def test_the_readme_fits_on_three_screens() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 125
    assert all((README.parent / path).is_file() for path in re.findall(r"\]\((bench/[^)]+)\)", text))
    assert len(re.findall(r"!\[", text)) == 1


def test_the_example_is_about_fifteen_lines() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 17
