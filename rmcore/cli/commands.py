"""Commands that other packages, and rmcore's own benches, bring: found by entry point, so that nothing here imports up.

A package adds ``rmcore NAME`` with an entry point in the group ``rmcore.commands``::

    [project.entry-points."rmcore.commands"]
    NAME = "package.module:function"

The function takes a ``typer.Context`` whose ``args`` are what stood behind NAME, as typed. Its
docstring is the line in ``rmcore --help``, so its module must be quick to import.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

import typer

__all__ = ["GROUP", "add_commands", "installed_commands"]

GROUP = "rmcore.commands"

_AS_TYPED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def installed_commands() -> list[EntryPoint]:
    """The entry points of the group, by name."""
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def add_commands(app: typer.Typer, entries: Iterable[EntryPoint]) -> None:
    """Add a command for each entry point; one that cannot be imported is logged and left out."""
    for entry in entries:
        try:
            command = entry.load()
        except (ImportError, AttributeError) as error:
            logging.getLogger(__name__).warning("no command %r: %s: %s", entry.name, entry.value, error)
            continue
        app.command(entry.name, context_settings=_AS_TYPED)(command)
