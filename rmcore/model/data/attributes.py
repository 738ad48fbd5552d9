"""Responses that people gave attributes, one a row as HelpSteer2 has them: prompt, response, a column an attribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.model.data.conversations import with_roles

__all__ = ["COLUMNS", "AttributeRow", "check_attributes", "parse_attributes"]

COLUMNS = frozenset({"prompt", "response"})
"""Names besides the attributes' that a column can be mapped to."""

KNOWN_RANGES = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), (0.0, 4.0))
"""Of HelpSteer2's attributes: integers 0 to 4, means of several people between them."""


@dataclass(frozen=True, slots=True)
class AttributeRow:
    """One response. ``labels`` has an entry an attribute, NaN where nobody labelled; ``line`` is the row's number."""

    prompt: Canonical
    response: Canonical
    labels: tuple[float, ...]
    line: int = 0


def check_attributes(names: Sequence[str], limits: tuple[float, float] | None = None) -> None:
    """Raise InputError for names or limits that :func:`parse_attributes` would refuse."""
    if not names or len(set(names)) != len(names) or not all(names):
        reject("attributes", list(names), "at least one name, each once")
    if taken := [name for name in names if name in COLUMNS]:
        reject("attributes", taken, "names of attributes: these are the columns of the texts")
    if limits is not None and not (math.isfinite(limits[0]) and math.isfinite(limits[1]) and limits[0] < limits[1]):
        reject("limits", limits, "two finite numbers, the lower first")


def parse_attributes(
    value: Mapping[str, Any], names: Sequence[str], limits: tuple[float, float] | None = None
) -> AttributeRow:
    """A row's response and its labels, null and NaN for none; raises InputError saying which key is wrong.

    Args:
        value: the row; ``prompt`` and ``response`` are texts or messages.
        names: of the attributes, each a column of numbers.
        limits: that no label may be outside of; None takes HelpSteer2's 0 to 4 for its own attributes.
    """
    for key in ("prompt", "response", *names):
        if key not in value:
            found = sorted(map(str, value))[:12]
            raise InputError(
                f"{key}: missing; expected keys prompt, response, {', '.join(names)} (found {found}; null says that "
                f"nobody labelled). Other names can be mapped: --columns response=answer {names[0]}=scores.{names[0]}"
            )
    labels = tuple(_label(name, value[name], limits or KNOWN_RANGES.get(name)) for name in names)
    prompt = canonical_prompt(with_roles(value["prompt"]))
    return AttributeRow(prompt, canonical_response(with_roles(value["response"], "response"), "response"), labels)


def _label(name: str, value: Any, limits: tuple[float, float] | None) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reject(name, repr(value)[:40], "a number, or null where nobody labelled")
    label = float(value)
    if math.isinf(label) or (limits is not None and not (math.isnan(label) or limits[0] <= label <= limits[1])):
        expected = "a finite number" if limits is None else f"a number from {limits[0]:g} to {limits[1]:g}"
        reject(name, repr(value)[:40], expected)
    return label
