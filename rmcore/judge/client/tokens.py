"""Whether the token counts that an endpoint reports can be true."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from rmcore.judge.base import JudgeUsage

__all__ = ["believable"]

_logger = logging.getLogger(__name__)

_TEMPLATE = 4_096
"""Most tokens that a server may put around the messages."""
_HIDDEN = 1 << 18
"""Most tokens of reasoning that a reply does not show."""
_EXTRA = 64
"""A server's end-of-turn tokens, which some count beyond the limit they were given."""


def believable(usage: JudgeUsage, payload: Mapping[str, object], sent: int, received: int) -> JudgeUsage:
    """``usage`` of one reply, or without any token count if one of them cannot be.

    A token is a byte or more, so a prompt has no more of them than the request has bytes (and what a template adds),
    and a completion no more than the reply, besides reasoning that is not shown, nor more than it was allowed. One
    count that is wrong takes the others with it: a call without counts is one of unknown cost, and half of them would
    give a wrong cost.

    Args:
        usage: as the endpoint reported it.
        payload: the request, for its ``max_tokens`` or ``max_completion_tokens``.
        sent: bytes of the request.
        received: bytes of the reply.
    """
    given = [payload.get(name) for name in ("max_tokens", "max_completion_tokens")]
    allowed = [value + _EXTRA for value in given if isinstance(value, int) and not isinstance(value, bool)]
    shown = usage.completion_tokens - usage.reasoning_tokens
    bounds = {
        "prompt_tokens": (usage.prompt_tokens, sent + _TEMPLATE),
        "completion_tokens": (usage.completion_tokens, received + _HIDDEN),
        "reasoning_tokens": (usage.reasoning_tokens, _HIDDEN),
        "completion_tokens beside reasoning": (shown, min([received + _HIDDEN, *allowed])),
    }
    for name, (count, most) in bounds.items():
        if count > most:
            _logger.warning("judge: a reply reports %d %s where %d can be; its counts are not used", count, name, most)
            return replace(usage, prompt_tokens=0, completion_tokens=0, reasoning_tokens=0, cached_tokens=0)
    return usage
