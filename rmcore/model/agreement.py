"""Whether a model is fed the tokens that its authors' own call makes, asked of texts; the first that differs is named.

What is held against each other are :meth:`~rmcore.model.text.TextEncoder.encode` and one call of the tokenizer:
``apply_chat_template(tokenize=True)`` of the conversation, or ``tokenizer(prompt, response)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rmcore._base.errors import CheckpointError, InputError
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_prompt, canonical_response
from rmcore.model.text import TextEncoder, TextLimit

__all__ = ["SAMPLES", "TokenDifference", "require_same_tokens", "token_difference"]

SAMPLES: tuple[tuple[Prompt, Response], ...] = (
    ([{"role": "user", "content": "What is 2 + 2?"}], "It is 4."),
    ([{"role": "user", "content": " two\n\nlines "}], "\n\n- one\n- two é 🦊\n"),
    (
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi. What is it?\n"},
            {"role": "user", "content": "Nothing"},
        ],
        " <think>\nNothing?\n</think>\n\nGoodbye",
    ),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], ""),
)
"""Conversations that show where tokens are merged over borders, spaces put in, texts trimmed or thoughts taken out."""


class TokenDifference(NamedTuple):
    """The first difference between two sequences of ids: a few of ``ours`` and of ``theirs`` from number ``at`` on."""

    at: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    told: str


def token_difference(encoder: TextEncoder, prompt: Prompt, response: Response) -> TokenDifference | None:
    """The first token that differs from those of the tokenizer's own call; None if none does, or cannot be asked.

    It cannot be asked where there is no such call (a text form of rmcore's own), where the template refuses the
    conversation, and where a difference is wanted: a text spells a special token, which is ordinary text here, or a
    message has fields besides its content, which are shown if the template drops them.
    """
    if not comparable(encoder, prompt, response):
        return None
    try:
        theirs = encoder.template_ids(prompt, response)
    except Exception:  # a template is a program and may raise anything
        return None
    try:
        ours = list(encoder.encode(prompt, response, limit=TextLimit()).ids)
    except InputError:  # it leaves a message out, which is refused here
        return None
    if ours == theirs:
        return None
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    few = tuple(ours[at : at + 4]), tuple(theirs[at : at + 4])
    shown = [f"{list(ids)} {encoder.tokenizer.decode(list(ids))!r}" if ids else "no token" for ids in few]
    return TokenDifference(at, *few, f"token {at} on: {shown[0]}, where the tokenizer's own call makes {shown[1]}")


def comparable(encoder: TextEncoder, prompt: Prompt, response: Response) -> bool:
    """Whether the tokenizer's own call should make the same tokens of this text."""
    if not encoder.follows_tokenizer(prompt):
        return False
    asked, answer = canonical_prompt(prompt), canonical_response(response)
    return all(
        fields <= {"role", "content"} and not encoder.spells_special(text)
        for form in (asked, answer)
        for fields, text in _texts(form)
    )


def require_same_tokens(encoder: TextEncoder, texts: Iterable[tuple[Prompt, Response]] = SAMPLES) -> None:
    """Raise CheckpointError, naming the first token that differs, unless ``texts`` become the same tokens both ways."""
    for prompt, response in texts:
        found = token_difference(encoder, prompt, response)
        if found is not None:
            asked: Sequence[object] = [prompt, response]
            raise CheckpointError(
                f"backbone: got other tokens than the tokenizer's own call for {str(asked)[:120]}: {found.told}. "
                "Expected the same, so this model would not score as its authors' code does"
            )


def _texts(form: Canonical) -> Iterator[tuple[set[str], str]]:
    if isinstance(form, str):
        yield set(), form
        return
    for message in form:
        yield set(message), message["content"]
