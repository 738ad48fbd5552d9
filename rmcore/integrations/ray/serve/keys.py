"""Which requests belong together: the key of a request, by which :func:`rmcore.integrations.server.placing.owner` says
which of several assemblers has it.

A key is made of what :class:`~rmcore.integrations.server.assembly.GroupAssembly` knows a group by, so members of one
group have one key, in whatever way their bodies are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from rmcore._base.large import read_json
from rmcore.integrations.server.members import prompt_digest
from rmcore.integrations.server.nemo_gym import conversation
from rmcore.integrations.server.placing import group_key

__all__ = ["BY_CONTENT", "request_key"]

BY_CONTENT = frozenset({"/v1/rendezvous", "/get_reward", "/verify"})
"""Paths whose members may have nothing but their text to be known by: an equal one may be a repetition."""


def request_key(path: str, body: bytes, idempotency_key: str | None = None) -> bytes:
    """The key of a request, 32 bytes.

    Of what is nobody's sibling (whole groups, lists), and of what no assembler will take, it is the body's digest: a
    repetition goes where the request went.

    Args:
        path: as in ``/v1/rendezvous``.
        body: of the request.
        idempotency_key: the header of that name.
    """
    if path == "/v1/groups" and idempotency_key is not None:
        return group_key("key", idempotency_key)
    try:
        value = read_json(body) if path in BY_CONTENT else None
        found = _group(path, value) if isinstance(value, Mapping) else None
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        found = None
    return group_key("body", hashlib.sha256(body).hexdigest()) if found is None else found


def _group(path: str, value: Mapping[str, Any]) -> bytes | None:
    if path == "/v1/rendezvous":
        if value.get("group_id") is None:
            return group_key("content", prompt_digest(value["prompt"]))
        return group_key("id", _name(value["group_id"]), _name(value.get("attempt", 0)))
    if path == "/get_reward":
        prompts = value["prompts"]
        return group_key("prompt", prompts[0]) if isinstance(prompts, list) and len(prompts) == 1 else None
    group, index = value.get("_ng_group_id"), value.get("_ng_rollout_index")
    if group is not None and index is not None:
        return group_key("gym", group, int(value.get("_ng_group_attempt") or 0))
    return group_key("conversation", prompt_digest(conversation(value["responses_create_params"].get("input"))))


def _name(name: object) -> object:
    # JSON knows no integers: 1.0 is 1.
    return int(name) if isinstance(name, float) and name.is_integer() else name
