"""What all commands say and how they end: notes and progress on stderr, results on stdout, errors as exit codes."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from rmcore._base.errors import InputError, RankError, RmcoreError

__all__ = [
    "count_lines",
    "draws_bars",
    "encoding_progress",
    "judge_progress",
    "notes",
    "on_terminal",
    "print_error",
    "print_markdown",
    "progress_bar",
    "reported_errors",
    "results_console",
    "training_progress",
]

# Everything but results goes to stderr, so that stdout can be a pipe.
# Lines are not broken in a pipe or a file, where a path in two halves is of no use.
notes = Console(stderr=True, soft_wrap=not sys.stderr.isatty())


def print_markdown(text: str) -> None:
    """Markdown to stdout: drawn on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        typer.echo(text)


def results_console(width: int) -> Console:
    """stdout for tables: ``width`` columns where it is not a terminal, which knows its own."""
    return Console(width=None if sys.stdout.isatty() else width)


class _Count(MofNCompleteColumn):
    """Done of all; only what is done where nobody knows how much it will be, as in a stream."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text(f"{int(task.completed)}")


def on_terminal(console: Console) -> bool:
    """Whether a terminal is written to. rich takes a pipe for one under FORCE_COLOR, which many CIs set."""
    return console.is_terminal and console.file.isatty()


def draws_bars(console: Console) -> bool:
    """Whether a terminal is written to whose cursor can be moved."""
    return on_terminal(console) and not console.is_dumb_terminal


def progress_bar() -> Progress:
    """A bar on stderr while something runs; nothing where stderr is no terminal, or a dumb one."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Count(), TimeRemainingColumn())
    return Progress(*columns, console=notes, transient=True, disable=not draws_bars(notes))


@contextmanager
def judge_progress(bar: Progress, judge: object) -> Iterator[None]:
    """Counts a judge's calls on ``bar`` while the body waits for them; nothing for a judge that makes none."""
    client = getattr(judge, "client", None)
    if client is None or bar.disable:
        yield
        return
    task, ended = bar.add_task("judge calls", total=None), threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            bar.update(task, completed=client.state.calls)

    watching = threading.Thread(target=watch, name="rmcore-progress", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def encoding_progress(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows on ``bar`` how far a backbone has got with its texts."""
    task = bar.add_task("encoding", total=None)

    def update(stage: str, done: int, total: int) -> None:
        if total:
            bar.update(task, description=f"{stage} (tokens)", completed=done, total=total)

    return update


def training_progress(bar: Progress, name: str) -> tuple[Callable[[str, int, int], None], Callable[[float], None]]:
    """Shows on ``bar`` how far a training has got, and its loss: callbacks for both."""
    task = bar.add_task(name, total=None)
    loss = ""

    def update(stage: str, done: int, total: int) -> None:
        bar.update(task, description=f"{stage}{loss if stage != 'encoding' else ''}", completed=done, total=total)

    def report(value: float) -> None:
        nonlocal loss
        loss = f", loss {value:.3f}"

    return update, report


def count_lines(path: str) -> int | None:
    """Lines of a plain file, for a bar's total; None for a stream, or what is no text in lines."""
    if path == "-" or not path.endswith((".jsonl", ".ndjson", ".jsonlines")):
        return None
    try:
        with open(path, "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return None
            lines, last = 0, b"\n"
            while block := stream.read(2**20):
                lines, last = lines + block.count(b"\n"), block[-1:]
            return lines + (last != b"\n")
    except OSError:
        return None


@contextmanager
def reported_errors(kept: object = None) -> Iterator[None]:
    """Ends the command with one line and an exit code where the body raises: 2 for bad input, 1 for other failures.

    Interrupted by Ctrl-C it is 130, and ``kept`` as text says what is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("rmcore: interrupted" + ("" if kept is None else f"; {kept}"), err=True)
        raise typer.Exit(130) from None
    except (InputError, OSError) as error:
        _fail(error, 2)
    except RankError as error:
        if notes.quiet:  # rank 0 says it, and the rank that failed its own error
            raise typer.Exit(1) from error
        _fail(error, 1)
    except RmcoreError as error:
        _fail(error, 1)


def print_error(error: Exception) -> None:
    """One line on stderr, above the progress bar where there is one."""
    notes.print(f"rmcore: {error}", markup=False, highlight=False, soft_wrap=True)


def _fail(error: Exception, code: int) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # the reader of our output went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0)
    typer.echo(f"rmcore: {error}", err=True)
    raise typer.Exit(code)
