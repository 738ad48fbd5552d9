"""``rmcore families``: which published reward models can be loaded."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from rmcore.cli.console import on_terminal, reported_errors, results_console

__all__ = ["families"]


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of the documentation.")] = False,
) -> None:
    """List the families of published reward models that load by name, without their own code.

    A family's name is what --family of `rmcore upgrade` and family= take, where a model's files do not say.
    """
    with reported_errors():
        from rmcore.model.families import table as known

        if markdown:
            typer.echo(known.markdown(), nl=False)
            return
        console = results_console(160)
        if not on_terminal(console):  # a line a family, for a pipe or a file
            for row in known.rows():
                typer.echo(
                    "\t".join(row[column].replace("`", "") for column in ("family", "states", "head", "examples"))
                )
            return
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("family", "pooled", "head", "examples"):
            shown.add_column(column, no_wrap=column == "family")
        for row in known.rows():
            shown.add_row(*(row[column].replace("`", "") for column in ("family", "states", "head", "examples")))
        console.print(shown, markup=False, highlight=False)
