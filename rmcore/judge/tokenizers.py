"""What a judge's tokenizer tells of itself, whichever library it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["tokens_of"]


def tokens_of(tokenizer: object) -> tuple[str, ...]:
    """The special tokens of a tokenizer of transformers, tokenizers or tiktoken; none of what is no tokenizer."""
    added: Any = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(added, Mapping):
        decoder = getattr(tokenizer, "get_added_tokens_decoder", None)
        added = decoder() if callable(decoder) else {}
    found = {str(getattr(token, "content", token)) for token in added.values() if getattr(token, "special", False)}
    for name in ("all_special_tokens", "special_tokens_set"):
        more = getattr(tokenizer, name, ())
        found |= {token for token in more if isinstance(token, str)} if isinstance(more, (list, tuple, set)) else set()
    return tuple(sorted(found))
