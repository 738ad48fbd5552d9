"""The families as a table, for the command line and the documentation."""

from __future__ import annotations

from rmcore.model.families.registry import FAMILIES
from rmcore.model.families.spec import Family

__all__ = ["COLUMNS", "markdown", "rows"]

COLUMNS = ("family", "examples", "states", "head", "row", "status")


def rows() -> list[dict[str, str]]:
    """A row a family, in order of name: plain text by column."""
    return [_row(family) for family in sorted(FAMILIES, key=lambda family: family.name)]


def markdown() -> str:
    """The table in Markdown."""
    head = ("family", "published examples", "what is pooled", "head", "what a fit sees", "shown with")
    lines = [head, ("---",) * len(head), *(tuple(row[column] for column in COLUMNS) for row in rows())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("<|", "<\\|").replace("|>", "\\|>")


def _row(family: Family) -> dict[str, str]:
    states = ", ".join(dict.fromkeys(str(state) for state in family.states))
    if family.append is not None:
        states += f", after {'the appended ' + family.append.key.name if family.append.key else 'an appended eos'}"
    linear = family.head is None or family.head.linear
    row = "input of the last linear layer" + ("" if linear else ", and the score")
    return {
        "family": f"`{family.name}`",
        "examples": ", ".join(family.models),
        "states": states,
        "head": family.shown,
        "row": f"{row}, of each ordered pair" if family.pairwise else row,
        "status": family.status,
    }
