"""What all commands say and how they end: notes and progress on stderr, results on stdout, errors as exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rmcore._base.errors import InputError, RmcoreError

__all__ = [
    "encoding_progress",
    "notes",
    "print_error",
    "progress_bar",
    "reported_errors",
    "results_console",
]

# Everything but results goes to stderr, so that stdout can be a pipe.
notes = Console(stderr=True)


def results_console(width: int) -> Console:
    """stdout for tables: ``width`` columns where it is not a terminal, which knows its own."""
    return Console(width=None if sys.stdout.isatty() else width)


def progress_bar() -> Progress:
    """A bar on stderr while something runs; nothing where stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)


def encoding_progress(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows on ``bar`` how far a backbone has got with its texts."""
    task = bar.add_task("encoding", total=None)

    def update(stage: str, done: int, total: int) -> None:
        if total:
            bar.update(task, description=f"{stage} (tokens)", completed=done, total=total)

    return update


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
