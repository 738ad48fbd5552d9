"""Critiques out of a verdict store, by response: what a judge wrote when it compared, and what a critic wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response
from rmcore.judge.critics.critique import MAX_CHARS, Critique, bounded, junk_reason
from rmcore.judge.keys import CRITIC_VERSION, pair_key
from rmcore.judge.store.ledger import Unreadable, VerdictLedger

__all__ = ["StoredCritiques"]

_SHOWN = ("In a comparison of two responses, this response was shown first: ", "In a comparison of two responses, this "
          "response was shown second: ")  # fmt: skip


class StoredCritiques:
    """Critiques of responses that a store knows, without a call.

    A comparison is of two responses, so each gets it behind words that say which of the two it was. Canaries are left
    out. Equal texts of one response are there once.

    Args:
        path: a verdict store.
        model: of this model only.
        samples: critiques a response at most, the earliest first; ``None``: all.
        max_chars: of a critique; what is left out is counted.
        unreadable: called with the error of a row that cannot be read, which is then left out; without it the error is
            raised.

    Raises:
        StoreError: the file is missing, damaged or foreign.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        samples: int | None = None,
        max_chars: int = MAX_CHARS,
        unreadable: Unreadable | None = None,
    ) -> None:
        self.samples = samples
        found: dict[str, dict[str, Critique]] = {}
        with VerdictLedger(path) as ledger:
            for key, text, response, by in _said(ledger, model, unreadable):
                kept, cut = bounded(text, max_chars)
                if kept:
                    critique = Critique(kept, junk=junk_reason(kept, response), cut=cut, model=by)
                    found.setdefault(key, {}).setdefault(kept, critique)
        self._found = {key: tuple(own.values()) for key, own in found.items()}

    def __len__(self) -> int:
        """Responses that have a critique."""
        return len(self._found)

    async def critiques(self, items: Sequence[tuple[Prompt, Response]]) -> list[tuple[Critique, ...]]:
        """What is stored of each (prompt, response); none where there is nothing."""
        return [self._found.get(_key(prompt, response), ())[: self.samples] for prompt, response in items]


def _said(
    ledger: VerdictLedger, model: str | None, unreadable: Unreadable | None
) -> Iterator[tuple[str, str, Response, str]]:
    calls = [call for call in ledger.calls(model=model, unreadable=unreadable) if not call.canary and call.replied]
    for call in reversed(calls):
        said = ledger.texts(call)
        if not said["critique"].strip():
            continue
        if call.template.startswith(CRITIC_VERSION):
            # A critic is shown one response; the other is empty, in whichever place.
            yield _key(said["prompt"], said["first"]), said["critique"], said["first"], call.answering
            continue
        for place, name in enumerate(("first", "second")):
            yield _key(said["prompt"], said[name]), _SHOWN[place] + said["critique"], said[name], call.answering


def _key(prompt: Prompt, response: Response) -> str:
    return pair_key(canonical_prompt(prompt), canonical_response(response), "")
