"""Where in a text the states are that a family pools, and what its texts end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.families.spec import Family, Last, LastUnpadded, Match, Token

__all__ = ["Pooler"]


class Pooler:
    """Token positions for one loaded model.

    Args:
        family: what it is.
        config: ``config.json``.
        tokenizer: its own.
        model_type: of the body.

    Raises CheckpointError for a tokenizer without the tokens that the family looks for.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], tokenizer: Any, model_type: str) -> None:
        self.family = family
        self._pad = config.get("pad_token_id")
        self._marks: list[tuple[int, ...]] = []
        for state in family.states:
            if isinstance(state, Match):
                self._marks.append(_mark(state, tokenizer, model_type))
            elif isinstance(state, Token):
                self._marks.append((int(state.key.of(config)),))
            else:
                self._marks.append(())
        self._end: int | None = None
        self._line_end: frozenset[int] = frozenset()
        if family.append is not None and family.append.key is not None:
            self._end = int(family.append.key.of(config))
        elif family.append is not None:
            self._end = getattr(tokenizer, "eos_token_id", None)
            if self._end is None:
                raise CheckpointError(
                    f"backbone: got a tokenizer without eos, with which {family.name!r} ends its texts"
                )
            newlines = tokenizer("\n", add_special_tokens=False)["input_ids"]
            self._line_end = frozenset(newlines if len(newlines) == 1 else ())

    @property
    def extra(self) -> int:
        """Most tokens that :meth:`complete` adds."""
        return self._end is not None

    def complete(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """A text's ids with what the family ends them with, where they do not already."""
        if self._end is None or not ids:
            return ids
        if self._line_end and len(ids) > 1 and ids[-1] in self._line_end and ids[-2] == self._end:
            ids = ids[:-1]  # a template's line end behind the end of a turn, which the family's own code strips
        return ids if ids[-1] == self._end else (*ids, self._end)

    def positions(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Position of each pooled state; 0 for a mark that is not there (:meth:`check` refuses such a text)."""
        return tuple(self._position(k, state, ids) for k, state in enumerate(self.family.states))

    def check(self, ids: Sequence[int]) -> None:
        """Raise InputError for a text without a token that the family pools at."""
        for k, state in enumerate(self.family.states):
            if self._marks[k] and _last_match(ids, self._marks[k]) < 0:
                reject(
                    "text",
                    f"one without {state}",
                    f"what the family {self.family.name!r} reads: prompts in the model's own chat template",
                )

    def _position(self, k: int, state: object, ids: Sequence[int]) -> int:
        if isinstance(state, Last):
            return len(ids) - 1
        if isinstance(state, LastUnpadded):
            pad = self._pad
            return next((n for n in range(len(ids) - 1, -1, -1) if pad is None or ids[n] != pad), 0)
        return max(_last_match(ids, self._marks[k]), 0)


def _mark(state: Match, tokenizer: Any, model_type: str) -> tuple[int, ...]:
    text = state.texts.get(model_type)
    if text is None:
        raise CheckpointError(
            f"backbone: got a body of type {model_type!r}, for which nobody said where the assistant's turn begins; "
            f"expected one of {', '.join(state.texts)}"
        )
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise CheckpointError(f"backbone: got a tokenizer that makes nothing of {text!r}")
    return ids


def _last_match(ids: Sequence[int], mark: tuple[int, ...]) -> int:
    """Where ``mark`` begins for the last time, or −1."""
    for start in range(len(ids) - len(mark), -1, -1):
        if tuple(ids[start : start + len(mark)]) == mark:
            return start
    return -1
