"""``rmcore accounts``: what judging came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rmcore.cli.console import notes, reported_errors, results_console

__all__ = ["print_accounts", "show_accounts"]


def show_accounts(
    log: Annotated[Path, typer.Argument(help="A file written by rmcore score --accounts, or by Accounts(log).")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the steps to this .png.")] = None,
) -> None:
    """Show what judging came to in a run, or so far in one that goes on: verdicts, cost, latency, hidden time."""
    with reported_errors():
        from rmcore.engine.accounts import Accounts

        booked = Accounts.read(log)
        print_accounts(booked.totals(), results_console(120))
        if plot is not None:
            from rmcore.evaluation.plots import plot_accounts

            plot_accounts(booked, plot)
            notes.print(f"wrote {plot}")


def print_accounts(totals: dict[str, Any], console: Console) -> None:
    """The totals of an :class:`~rmcore.engine.accounts.Accounts` as a table."""
    from rmcore.engine.accounts import account_lines

    if not console.is_terminal:  # whole lines, for a pipe or a file
        lines = list(account_lines(totals))
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            console.print(f"{name:<{width}}  {value}".rstrip(), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in account_lines(totals):
        table.add_row(name, value)
    console.print(table)
