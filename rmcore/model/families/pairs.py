"""Models that score a pair: the text of one, with its two responses where their authors put them.

A pair is three messages, what was said so far and the two responses, and the family's chat template writes them, so
that the whole of it is tokenised as one text, as the authors do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_prompt, response_text
from rmcore.model.families.spec import Family
from rmcore.model.text import EncodedText, TextEncoder, TextLimit

__all__ = ["PairTextEncoder", "pair_template"]

_PROBE = "\x02the content of a turn\x03"
_WRITTEN = "{# a pair inside a user turn #}"
_FINISH = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."


class PairTextEncoder(TextEncoder):
    """Encodes a prompt and two responses by a chat template for pairs; one response alone has no text here.

    ``form`` is a family's ``pair_form``, to be set before the first text.
    """

    form: str = ""

    def encode(
        self,
        prompt: Prompt,
        first: Response,
        second: Response | None = None,
        *,
        critique: str | None = None,
        limit: TextLimit | None = None,
    ) -> EncodedText:
        """As :meth:`TextEncoder.encode`. Raises InputError without a second response, and for a critique."""
        if critique is not None:
            reject("critique", "one", "None, since this model scores pairs")
        if second is None:
            reject("second", "None", "a second response, since this model scores pairs")
        asked = canonical_prompt(prompt)
        texts = (response_text(first, "first"), response_text(second, "second"))
        encoded = [self._encode(asked, *ordered, limit) for ordered in (texts, texts[::-1])]
        return replace(encoded[0], equal_responses=encoded[0].ids == encoded[1].ids)

    def _encode(self, prompt: Canonical, first: str, second: str, limit: TextLimit | None) -> EncodedText:
        source, *answers = _FORMS[self.form](prompt, first, second)
        turns = [{"role": "assistant", "content": answer} for answer in answers]
        return super().encode([{"role": "user", "content": source}], turns, limit=limit)


def _turns(prompt: Canonical, first: str, second: str) -> tuple[str, str, str]:
    """RLHFlow's: each message behind a line that says whose turn it is, in alternation."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    said = [
        f"\n<turn> {'assistant' if k % 2 else 'user'}\n {_content(message, k)}" for k, message in enumerate(messages)
    ]
    return "\n" + "".join(said) + "\n", first, second


def _pairrm(prompt: Canonical, first: str, second: str) -> tuple[str, str, str]:
    """LLM-Blender's: a single user message is the source; of a conversation both candidates have all its answers."""
    if isinstance(prompt, str):
        return prompt, first, second
    contents = [_content(message, k) for k, message in enumerate(prompt)]
    roles = [message.get("role") for message in prompt]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[k % 2] for k in range(len(roles))]:
        reject(
            "prompt", f"roles {roles}", "user and assistant in turn, as this model's form for conversations has them"
        )
    if len(contents) == 1:
        return contents[0], first, second
    asked = [f"USER: {text}\nAssistant: <Response {k + 1}>" for k, text in enumerate(contents[0::2])]
    given = [f"<Response {k + 1}>: {text}\n" for k, text in enumerate(contents[1::2])]
    last = f"{''.join(given)}<Response {len(asked)}>: "
    return _FINISH + "\n".join(asked), last + first, last + second


def _content(message: dict[str, Any], k: int) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        reject(f"prompt[{k}].content", type(content).__name__, "a text, which is all this model's form for pairs has")
    return content


_FORMS: dict[str, Callable[[Canonical, str, str], tuple[str, str, str]]] = {"turns": _turns, "pairrm": _pairrm}


def pair_template(family: Family, tokenizer: Any) -> str:
    """The chat template of a family's pairs, inside a user turn of the tokenizer's own one where the family says so.

    Raises CheckpointError for a tokenizer without a chat template where one is needed.
    """
    if not family.user_turn:
        return family.chat_template
    if (getattr(tokenizer, "chat_template", None) or "").startswith(_WRITTEN):
        return str(tokenizer.chat_template)  # saved with a model before
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f"backbone: got a tokenizer without chat template, which family {family.name!r} needs")

    def rendered(content: str) -> str:
        turn = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False)).replace(tokenizer.bos_token or "\x00", "")

    before, found, behind = rendered(_PROBE).partition(_PROBE)
    if not found:
        raise CheckpointError("backbone: got a chat template that changes the content of a user turn")
    trims = rendered(f" {_PROBE}\n") == before + _PROBE + behind
    inner = f"{{% set inner %}}{family.chat_template}{{% endset %}}{{{{ inner{' | trim' if trims else ''} }}}}"
    return f"{_WRITTEN}{{{{ {json.dumps(before)} }}}}{inner}{{{{ {json.dumps(behind)} }}}}"
