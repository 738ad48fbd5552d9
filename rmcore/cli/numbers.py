"""Options that are numbers: all are declared by :func:`number`, so that none takes ``nan``, ``inf`` or ``1e400``."""

from __future__ import annotations

from typing import Any

import typer

from rmcore._base.numbers import Within, check_number
from rmcore.cli.console import reported_errors

__all__ = ["number"]


def number(
    *flags: str,
    help: str,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    expected: str = "",
) -> Any:
    """An option that is a finite number within bounds; others end the command with the option, the value and these.

    Args:
        flags: as of ``typer.Option``.
        help: likewise; the bounds are added to it.
        above: the numbers that it may be, as of :class:`~rmcore._base.numbers.Within`.
        least: likewise.
        below: likewise.
        most: likewise.
        expected: these in words of the option's own.
    """
    signs = ((">", above), (">=", least), ("<", below), ("<=", most))
    bounds = ", ".join(f"x{sign}{bound:.12g}" for sign, bound in signs if bound is not None)

    def check(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        if value is None or ctx.resilient_parsing:
            return value
        within = Within(whole=isinstance(value, int), above=above, least=least, below=below, most=most)
        with reported_errors():
            check_number(max(param.opts, key=len), value, within, expected)
        return value

    return typer.Option(*flags, help=f"{help} [{bounds}]" if bounds else help, callback=check)
