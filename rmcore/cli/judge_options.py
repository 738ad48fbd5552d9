"""What is wrong with a judge's options, in the names that they have on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from rmcore._base.errors import InputError, JudgeError, reject
from rmcore.cli.options import Asking

__all__ = ["as_options", "is_given", "reject_unused"]


@contextmanager
def as_options(**options: str) -> Iterator[None]:
    """What the library says of an argument is said of its option, and is bad usage whatever it was there."""
    try:
        yield
    except (InputError, JudgeError) as error:
        argument, colon, said = str(error).partition(": ")
        if not colon or argument not in options:
            raise
        raise InputError(f"{options[argument]}: {said}") from error


def is_given(asking: Asking, name: str) -> bool:
    """Whether an option has another value than this command's own default."""
    return any(f.name == name and getattr(asking, name) != f.default for f in dataclasses.fields(asking))


def reject_unused(asking: Asking) -> None:
    """Raise InputError where options of a judge over HTTP are given, and none is asked: they would change nothing."""
    used = {"verdicts", "max_calls", "max_tokens", "max_cost"}  # budgets are told apart where there is one
    if asking.max_cost is not None:
        used |= {"prices", "judge_model"}
    if asking.verdicts is not None:
        used.add("judge_orders")
    usual = {field.name: field.default for field in dataclasses.fields(Asking) if field.name not in used}
    own = {field.name: field.default for field in dataclasses.fields(asking)}  # of a command with other defaults
    given = [
        f"--{name.replace('_', '-')}"
        for name, default in usual.items()
        if getattr(asking, name) not in (default, own[name])
    ]
    if given:
        with_what = " beside --verdicts" if asking.verdicts is not None else ""
        reject(", ".join(given), f"without --judge-url{with_what}", "together with it, or left out")
