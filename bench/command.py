"""``rmcore bench``, found by entry point: hands its arguments to :mod:`rmcore.bench.__main__`."""

from __future__ import annotations

import typer

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Microbenchmarks against peers and against this machine's limit (`rmcore bench --help` lists the options)."""
    from .__main__ import main as run_bench  # imports torch and all suites: not before somebody asks

    raise typer.Exit(run_bench(context.args))
