"""The command line: ``rmcore train | upgrade | families | score | evaluate | demo``. JSON Lines in, JSON Lines out.

Exit codes: 0 done; 1 something failed (a model that cannot be loaded, say); 2 bad input or usage. A bad line names its
number and what is wrong, and everything before it is scored and written first.

Text is UTF-8 whatever the locale. What --out names appears when the command has come to the end of its input; until
then, and after an error, results are in NAME.partial (``rmcore.cli.output``).

A file a family of commands; what they share is in ``options`` (options of several commands), ``build_engine`` (the
reward engine these name), ``output`` (what is written) and ``console`` (notes, progress, errors). Heavy imports stay
inside the commands, so that ``rmcore --help`` is quick.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from rmcore._base.launcher import end_with_launcher
from rmcore._base.version import __version__
from rmcore.cli import (
    accounts,
    benchmark,
    best_of,
    check,
    critique,
    demo,
    evaluate,
    export,
    families,
    fit_uncertainty,
    label,
    plan,
    score,
    select,
    serve,
    upgrade,
    verdicts,
)
from rmcore.cli.commands import add_commands, installed_commands
from rmcore.cli.options import ManyColumns
from rmcore.cli.output import use_utf8
from rmcore.cli.train import command as train_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="rmcore",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Uncertainty-aware pairwise reward models: train one, score groups of responses with it, send only the "
    "uncertain pairs to an LLM judge, get RLOO advantages back.\n\nTry `rmcore demo` first.",
)

app.add_typer(verdicts.app, name="verdicts")
app.command("serve")(serve.serve)
app.command("best-of", cls=ManyColumns)(best_of.best_of_command)
app.command("filter", cls=ManyColumns)(best_of.filter_command)
app.command("train", cls=ManyColumns)(train_command.train)
app.command("upgrade", cls=ManyColumns)(upgrade.upgrade)
app.command("fit-uncertainty", cls=ManyColumns)(fit_uncertainty.fit_uncertainty)
app.command("plan")(plan.plan)
app.command("export")(export.export)
app.command("families")(families.families)
app.command("score", cls=ManyColumns)(score.score)
app.command("critique", cls=ManyColumns)(critique.critique)
app.command("label", cls=ManyColumns)(label.label)
app.command("select", cls=ManyColumns)(select.select)
app.command("accounts")(accounts.show_accounts)
app.command("check", cls=ManyColumns)(check.check)
app.command("evaluate", cls=ManyColumns)(evaluate.evaluate)
app.command("benchmark")(benchmark.benchmark)
app.command("demo")(demo.demo)
add_commands(app, installed_commands())  # `rmcore bench`, and what other packages bring


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    """Options of all commands."""
    use_utf8()
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "httpcore", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the ``rmcore`` command."""
    end_with_launcher()
    app()
