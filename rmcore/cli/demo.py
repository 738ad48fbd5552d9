"""``rmcore demo``: the main job end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmcore.cli.console import reported_errors, results_console
from rmcore.cli.numbers import number

__all__ = ["demo"]


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder of preference data; default: RMCORE_DATA, else examples.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and plots.")] = Path("rmcore-demo"),
    seed: Annotated[int, number(help="Seed of the features and the mixed streams.", least=0)] = 0,
    full: Annotated[
        bool,
        typer.Option("--full", help="Read all of the data folder's pairs, and whole: minutes, not one, on two cores."),
    ] = False,
) -> None:
    """Train, evaluate, route to a judge over loopback HTTP and print advantages, on real text, in a minute on a CPU."""
    with reported_errors():
        from rmcore.cli.run_demo import run_demo

        run_demo(data, out, results_console(120), seed=seed, full=full)
