"""The command line's page, written from the commands themselves, so that it cannot go stale."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import typer.main

__all__ = ["bench_help", "command_table", "commands_markdown"]


def command_table() -> dict[str, Any]:
    """Every command by its full name (``rmcore verdicts show``), groups and ``rmcore bench`` left out."""
    from rmcore.cli import app

    commands = dict(_leaves("rmcore", typer.main.get_command(app)))
    commands.pop("rmcore bench", None)  # hands its arguments to argparse
    return commands


def commands_markdown() -> str:
    """A section a command: what it does, how it is called, a row an argument or option."""
    sections = [_section(name, command) for name, command in command_table().items()]
    return "\n\n".join([*sections, f"## rmcore bench\n\n```text\n{bench_help()}\n```"])


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    children: dict[str, Any] = getattr(command, "commands", {})
    if not children:
        yield name, command
    for child, below in children.items():
        yield from _leaves(f"{name} {child}", below)


def _section(name: str, command: Any) -> str:
    parts = [f"## {name}", (command.help or "").strip()]
    context = command.make_context(name, [], resilient_parsing=True)
    parts.append(f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```")
    records = [p.get_help_record(context) for p in command.params]
    rows = [f"| `{_cell(record[0])}` | {_cell(_code_default(record[1]))} |" for record in records if record]
    if rows:
        parts.append("\n".join(["| argument or option | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def bench_help() -> str:
    """What ``rmcore bench --help`` prints, at a width of 100 columns."""
    from rmcore.bench.__main__ import main

    out, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return out.getvalue().strip()


def _code_default(text: str) -> str:
    """``[default: 0.5]`` as code, so that Markdown leaves it alone."""
    head, mark, tail = text.rpartition("  [")
    return f"{head} `[{tail}`" if mark else text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
