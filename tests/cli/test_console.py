"""Terminals get bars and tables, pipes get whole lines."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from rmcore.cli import console
from rmcore.cli.accounts import print_accounts
from rmcore.cli.console import count_lines, draws_bars, on_terminal, print_markdown, training_progress

TABLE = "# Report\n\n| metric | value |\n|---|---|\n| accuracy | 0.75 |\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_markdown_is_drawn_on_a_terminal_and_kept_in_a_pipe(monkeypatch, capsys) -> None:
    print_markdown(TABLE)
    assert TABLE in capsys.readouterr().out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print_markdown(TABLE)
    assert "accuracy" in screen.getvalue()
    assert "0.75" in screen.getvalue()
    assert "|---" not in screen.getvalue()
    assert "# Report" not in screen.getvalue()


def test_a_note_is_not_broken_in_a_pipe(capsys) -> None:
    path = "/somewhere/" + "/".join(f"folder{k}" for k in range(60))
    console.notes.print(f"wrote {path}")
    assert capsys.readouterr().err == f"wrote {path}\n"


def test_accounts_in_a_pipe_are_whole_lines(monkeypatch) -> None:
    long = ", ".join(f"reason_{k} {k}" for k in range(60))
    monkeypatch.setattr("rmcore.engine.accounts.account_lines", lambda totals: [("decided", "x"), ("failed", long)])
    out = io.StringIO()
    print_accounts({}, Console(file=out, width=40))
    assert out.getvalue() == f"decided  x\nfailed   {long}\n"


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", b"{}\n{}\n", 2),
        ("a.jsonl", b"{}\n{}", 2),
        ("a.jsonl", b"", 0),
        ("a.ndjson", b"{}\r\n", 1),
        ("a.jsonl.gz", b"\x1f\x8b", None),
        ("a.parquet", b"PAR1", None),
        ("a.json", b"[\n{}]\n", None),
    ],
)
def test_lines_are_counted_where_that_is_what_rows_are(tmp_path: Path, name, content, lines) -> None:
    (tmp_path / name).write_bytes(content)
    assert count_lines(str(tmp_path / name)) == lines


def test_a_stream_has_no_total(tmp_path: Path) -> None:
    assert count_lines("-") is None
    assert count_lines("/dev/fd/0.jsonl") is None
    assert count_lines(str(tmp_path / "missing.jsonl")) is None


@pytest.mark.parametrize(
    ("out", "environment", "tables", "bars"),
    [
        (Terminal, {"TERM": "xterm"}, True, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, True, True),
        (Terminal, {"TERM": "dumb"}, True, False),
        (io.StringIO, {"TERM": "xterm"}, False, False),
        (io.StringIO, {"TERM": "xterm", "FORCE_COLOR": "1"}, False, False),
        (io.StringIO, {"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False, False),
    ],
)
def test_bars_and_tables_are_for_terminals(monkeypatch, out, environment, tables, bars) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    one = Console(file=out())
    assert (on_terminal(one), draws_bars(one)) == (tables, bars)
    monkeypatch.setattr(console, "notes", one)
    with console.progress_bar() as bar:
        bar.update(bar.add_task("encoding", total=2), completed=1)
    assert ("encoding" in one.file.getvalue()) is bars


def shown(bar: Progress) -> str:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=False).print(bar.make_tasks_table(bar.tasks))
    return out.getvalue()


def test_a_bar_has_its_total_and_none_where_there_is_none() -> None:
    bar = console.progress_bar()
    bar.add_task("groups", total=40, completed=20)
    bar.add_task("stream", total=None, completed=7)
    text = shown(bar)
    assert "20/40" in text
    assert "?" not in text
    assert "7" in text.splitlines()[1]


def test_fine_tuning_shows_its_loss() -> None:
    bar = console.progress_bar()
    update, loss = training_progress(bar, "fine-tuning")
    update("encoding", 5, 10)
    assert "loss" not in shown(bar)
    loss(0.6931)
    update("finetuning", 3, 12)
    assert "finetuning, loss 0.693" in shown(bar)
    assert "3/12" in shown(bar)
