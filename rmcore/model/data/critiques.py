"""Critiques that stand in a row beside its responses.

A group has them in ``critiques``, a list a response; a preference in ``critiques`` as ``{"chosen": ..., "rejected":
...}``, or in ``chosen_critiques`` and ``rejected_critiques`` (or without the s). One text stands for a list of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmcore._base.errors import reject

__all__ = ["COLUMNS", "critiques_of_group", "critiques_of_preference"]

_SIDES = ("chosen", "rejected")
COLUMNS = frozenset({"critiques", *(f"{side}_critique{s}" for side in _SIDES for s in ("", "s"))})


def critiques_of_group(value: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], ...] | None:
    """Those of a group of ``count`` responses; None where the row has none. Raises InputError for anything else."""
    given = value.get("critiques")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != count:
        got = f"a list of {len(given)}" if isinstance(given, list) else type(given).__name__
        reject("critiques", got, f"a list of {count}, one a response")
    return tuple(_texts(own, f"critiques[{k}]") for k, own in enumerate(given))


def critiques_of_preference(value: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Those of the chosen and of the rejected response; None where the row has none.

    A list under ``critiques``, as of a judge's comparisons, is of the pair and not of a response: it is not used.
    """
    given = value.get("critiques")
    own = given if isinstance(given, Mapping) else {}
    found: list[tuple[str, ...]] = []
    for side in _SIDES:
        said = own.get(side)
        for name in (f"{side}_critiques", f"{side}_critique"):
            said = value.get(name) if said is None else said
        found.append(() if said is None else _texts(said, f"critiques of {side}"))
    return (found[0], found[1]) if any(found) else None


def _texts(said: object, name: str) -> tuple[str, ...]:
    if isinstance(said, str):
        return (said,)
    if not isinstance(said, Sequence) or not all(isinstance(text, str) for text in said):
        reject(name, type(said).__name__, "a text, or a list of texts")
    return tuple(said)
