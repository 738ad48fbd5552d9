"""A group's result as it is written: beside its id and line, and with what tells which group it was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rmcore.model.data.groups import Group

__all__ = ["group_digest", "group_result"]


def group_digest(group: Group) -> str:
    """Of all that a result is made of: 16 hex characters of the group's id, prompt, responses and critiques."""
    told = json.dumps([group.id, group.prompt, group.responses, group.critiques], sort_keys=True)
    return hashlib.sha256(told.encode("ascii")).hexdigest()[:16]


def group_result(group: Group, record: Mapping[str, Any]) -> dict[str, Any]:
    """What was found of a group, with its ``id`` (if it has one), its ``line`` and its ``digest``."""
    named = {} if group.id is None else {"id": group.id}
    return {**named, "line": group.line, **record, "digest": group_digest(group)}
