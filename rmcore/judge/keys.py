"""Content keys: equal texts, equal key, on every machine and in every release of the same key version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from rmcore._base.errors import reject
from rmcore._base.large import ascii_json
from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response

__all__ = ["CALL_KEY_VERSION", "CRITIC_VERSION", "KEY_VERSION", "call_key", "pair_key"]

KEY_VERSION = 1
"""Part of every key. It changes if, and only if, plain texts and plain ``{role, content}`` messages would get another
key. What else a message may hold (tool calls, names, reasoning) had no place in a key before it had one here.

So a store of an earlier release serves on: a message with a ``name`` was filed under the key of the same message
without it, the judge was shown the message without it, and of that question the stored verdict is the answer still. The
message with its name is a new question, with a key that nothing stored has, and is asked."""

CALL_KEY_VERSION = 1
"""As :data:`KEY_VERSION`, for :func:`call_key`."""

CRITIC_VERSION = "critic:"
"""How the template's version of a critic's question begins: it shows one response, the other is empty, and what comes
of it is no verdict."""


def pair_key(prompt: Prompt, first: Response, second: Response) -> str:
    """The sha256 (64 hex digits) of one pair **in one order**: exchanging ``first`` and ``second`` changes the key.

    The hash is over the compact JSON text ``["rmcore.pair", 1, prompt, first, second]``, keys sorted and everything
    outside ASCII escaped, so it depends on the code points of the texts and on nothing else. Texts are not normalised;
    conversations and responses of messages stand in their canonical form (:mod:`rmcore._base.prompt`).

    Raises:
        InputError: something is no prompt or no response.
    """
    texts = [canonical_prompt(prompt), canonical_response(first, "first"), canonical_response(second, "second")]
    content = ["rmcore.pair", KEY_VERSION, *texts]
    return hashlib.sha256(ascii_json(content, sort_keys=True, compact=True).encode("ascii")).hexdigest()


def call_key(
    judge: str,
    model: str,
    parameters: Mapping[str, object],
    template: str,
    shown: str,
    cut: Sequence[int] = (),
) -> str:
    """The sha256 (64 hex digits) of one **call**: everything that decides what a judge is asked, and nothing else.

    Two calls with equal keys are the same question to the same judge, so one answer serves both.

    Args:
        judge: who is asked: an address, or a name that stands for the same judge at any address.
        model: its model.
        parameters: what else the request and the reading of its reply depend on, JSON values, in any order.
        template: the version of the question's template.
        shown: :func:`pair_key` of the texts in the order shown.
        cut: characters of the prompt, the first and the second response that are left out, if any are.

    Raises:
        InputError: ``parameters`` holds something that is no JSON value.
    """
    content = ["rmcore.call", CALL_KEY_VERSION, judge, model, dict(parameters), template, shown]
    if any(cut):  # so that the keys of whole texts stay what they were
        content.append(list(cut))
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reject("parameters", f"values that are no JSON ({type(error).__name__})", "JSON values")
    return hashlib.sha256(text.encode("ascii")).hexdigest()
