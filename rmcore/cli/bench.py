"""``rmcore bench``: hands its arguments to :mod:`rmcore.bench`."""

from __future__ import annotations

import typer

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Microbenchmarks against peers and against this machine's limit (`rmcore bench --help` lists the options)."""
    from rmcore.bench.__main__ import main as run_bench

    raise typer.Exit(run_bench(context.args))
