"""Commands found by entry point: arguments as typed, a broken one left out, `rmcore bench` among them."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rmcore.cli.commands import GROUP, add_commands, installed_commands

ROOT = Path(__file__).resolve().parents[2]


def app(*entries: EntryPoint) -> typer.Typer:
    result = typer.Typer()
    for name in ("other", "another"):  # an app of one command would need no name
        result.command(name)(lambda name=name: typer.echo(name))
    add_commands(result, entries)
    return result


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EntryPoint:
    (tmp_path / "planted_commands.py").write_text(
        "import typer\n\n"
        "def hello(context: typer.Context) -> None:\n"
        '    """Says what it was given."""\n'
        "    print(context.args)\n"
        "    raise typer.Exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return EntryPoint("hello", "planted_commands:hello", GROUP)


def test_a_command_gets_its_arguments_as_typed_and_sets_the_exit_code(entry: EntryPoint) -> None:
    done = CliRunner().invoke(app(entry), ["hello", "--size", "1x2", "--help", "x"])
    assert done.stdout == "['--size', '1x2', '--help', 'x']\n"
    assert done.exit_code == 3


def test_its_docstring_is_its_line_of_help(entry: EntryPoint) -> None:
    assert "Says what it was given." in CliRunner().invoke(app(entry), ["--help"]).stdout


def test_one_that_cannot_be_imported_is_logged_and_the_rest_runs(caplog: pytest.LogCaptureFixture) -> None:
    broken = EntryPoint("broken", "no_such_package_of_commands:run", GROUP)
    with caplog.at_level(logging.WARNING):
        built = app(broken)
    assert "no_such_package_of_commands" in caplog.text
    assert CliRunner().invoke(built, ["other"]).stdout == "other\n"


def test_bench_is_such_a_command_and_loads_neither_torch_nor_the_suites(capfd: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    bench = EntryPoint("bench", declared["bench"], GROUP)
    script = f"import sys, {bench.module}; print('torch' in sys.modules, 'rmcore.bench.suites' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "False False\n"
    done = CliRunner().invoke(app(bench), ["bench", "--help"])
    assert done.exit_code == 0
    assert "--suite" in done.stdout + capfd.readouterr().out


def test_installed_commands_are_sorted_by_name() -> None:
    names = [entry.name for entry in installed_commands()]
    assert names == sorted(names)
