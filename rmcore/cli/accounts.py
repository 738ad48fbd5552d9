"""``rmcore accounts``: what judging came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rmcore._base.errors import DataError, JudgeError
from rmcore.cli.console import notes, on_terminal, reported_errors, results_console

if TYPE_CHECKING:
    from rmcore.engine.accounts import Accounts
    from rmcore.engine.routing import Budget, Router

__all__ = ["book", "judge_outcome", "print_accounts", "print_budgets", "room_in_words", "show_accounts"]


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

    if not on_terminal(console):  # whole lines, for a pipe or a file
        lines = list(account_lines(totals))
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            console.print(f"{name:<{width}}  {value}".rstrip(), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in account_lines(totals):
        table.add_row(name, value)
    console.print(table)


def print_budgets(router: Router | None, console: Console) -> None:
    """A line for each budget that pairs found no room in."""
    for budget in getattr(router, "budgets", ()):
        stats = budget.stats()
        if stats.denied_pairs:
            spent = f"{stats.total:,.6g} spent of {stats.limit:,.6g} {budget.name}"
            left = f"{stats.denied_pairs:,} pairs found no room and keep the head's preference"
            aside = f"{stats.per_pair:,.6g} is set aside for a pair before it is asked"
            console.print(f"budget: {spent}; {left}; {aside}", markup=False, highlight=False, soft_wrap=True)


def room_in_words(budgets: Iterable[Budget]) -> str:
    """Of each budget, or of those with no room for another pair, what is spent and what a pair would have set aside."""
    found = [(budget.name, budget.stats()) for budget in budgets]
    full = [(name, stats) for name, stats in found if stats.left < stats.per_pair]
    return "; ".join(
        f"{stats.total:,.6g} of {stats.limit:,.6g} {name} spent, and {stats.per_pair:,.6g} set aside for each to come"
        for name, stats in full or found
    )


def book(summary: dict[str, Any], accounts: Accounts, judged: Counter[str]) -> None:
    """Add a batch's summary to the accounts, and to the counts that :func:`judge_outcome` goes by."""
    accounts.add(summary)
    by = summary["decided_by"]
    judged["alone"] += summary["single_response_groups"]
    judged.update({name: by.get(key, 0) for name, key in (("judge", "judge"), ("failed", "judge_failed"))})


def judge_outcome(judged: Counter[str], done: int, failed: int) -> None:
    """What a run that came to its end has to say: of groups of one, of those not scored, of a judge that gave nothing.

    Raises:
        DataError: some groups could not be scored.
        JudgeError: no pair that went to the judge got a verdict.
    """
    if judged["alone"]:
        notes.print(
            f"rmcore: {judged['alone']} of {done} groups have one response, which has nothing to be compared with: "
            "its reward is 0. A prompt's responses belong in one row",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if failed:
        raise DataError(f"{failed} of {done} groups could not be scored; the others are written")
    if judged["failed"] and not judged["judge"]:
        raise JudgeError(
            f"no verdict for any of the {judged['failed']} pairs that went to the judge; the results are those of "
            "the model alone"
        )
