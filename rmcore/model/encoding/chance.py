"""Tokenizers and chat templates that draw at random: a text would have other tokens, and another score, every time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from rmcore._base.errors import reject

__all__ = ["refuse_chance"]

log = logging.getLogger(__name__)

_EMPTY = ("whitespace", "comment", "comment_begin", "comment_end")


def refuse_chance(tokenizer: Any, *, template: bool = True) -> None:
    """Have a tokenizer give a text the same tokens every time.

    Merges that are left out at random (BPE dropout, meant for training) are switched off, with a warning.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: whether its chat template is used.

    Raises InputError for one that samples in another way, or whose chat template does.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        log.warning("the tokenizer leaves out merges at random (dropout %s), which is switched off", model.dropout)
        model.dropout = None
    if (getattr(tokenizer, "sp_model_kwargs", None) or {}).get("enable_sampling"):
        reject("tokenizer", "one with enable_sampling, which draws tokens at random", "one without")
    found = getattr(tokenizer, "chat_template", None) if template else None
    for text in found.values() if isinstance(found, dict) else [found]:
        drawn = next(_drawn(text), None) if isinstance(text, str) else None
        if drawn is not None:
            reject(
                "chat_template",
                f"one with {drawn}, which draws at random",
                "one that gives a conversation the same text every time",
                "Take that out of the template",
            )


def _drawn(template: str) -> Iterator[str]:
    """What of Jinja's own in a template gives something else at every call."""
    if "random" not in template and "lipsum" not in template:
        return
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind not in _EMPTY]  # noqa: S701 - nothing is rendered
    except TemplateSyntaxError:  # which rendering says
        return
    tokens = [("", ""), *tokens]  # the second one has two before it, too
    for (_, called), (_, before), (kind, value) in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if kind == "name" and (
            (value == "random" and before in ("|", "filter")) or (value == "lipsum" and before != ".")
        ):
            yield value
        if kind == "string" and value.strip("'\"") == "random" and (called, before) == ("map", "("):
            yield "random"
