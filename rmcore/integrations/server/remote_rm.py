"""OpenRLHF's reward calls: what is the response, and which queries make a group.

Read from ``openrlhf/utils/agent.py`` (SingleTurnAgentExecutor): ``query`` is the decoded prompt and action tokens with
special tokens kept, ``prompts`` the prompt string they came from. Of several servers each call takes the next one, with
one query (:mod:`rmcore.integrations.server.peers`). An answer that is no 200 is retried four times, a second apart;
then the sample has no reward and the run stops.
"""

from __future__ import annotations

import re

from rmcore._base.errors import reject
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["grouped", "prompt_text", "response_text"]


_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,64}\|>"  # <|im_start|>, <|begin_of_text|>
    r"|<｜[^<>｜\s]{1,64}｜>"  # DeepSeek's, with full-width bars
    r"|</?(?:s|bos|eos|pad|unk|BOS_TOKEN|EOS_TOKEN|PAD)>"
    r"|<(?:start|end)_of_[a-z]+>"
    r"|\[/?(?:INST|BOS|EOS|PAD|CLS|SEP|SYSTEM_PROMPT|AVAILABLE_TOOLS|gMASK)\]|<sop>"
)
"""Special tokens as tokenizers write them out: by their shapes, since there are more than anybody lists."""
_AHEAD = re.compile(
    rf"{_SPECIAL.pattern}|<[\w:./-]{{1,64}}>|\[[\w@:/-]{{1,64}}\]|\[\|\w{{1,64}}\|\]|\][!~]{{1,2}}\w{{1,16}}~?[\[\]]"
)
"""What is skipped in front of a prompt, where nothing else can stand: of wider shapes (``<seed:bos>``, ``]~!b[``)."""


def response_text(query: str, prompt: str, end_tokens: tuple[str, ...], where: str = "query") -> str:
    """The response: what follows the prompt, without the special tokens at its end.

    Special tokens before the prompt (a BOS the tokenizer added, padding) are skipped, and so is a space that decoding
    put behind a special token, as SentencePiece does (``<s> [INST]`` for ``<s>[INST]``), or took away there.

    Raises:
        InputError: the query does not start with the prompt; the message shows where they part.
    """
    response = _after(query, prompt, end_tokens)
    if response is None:
        reject(
            where,
            _where_they_part(query, prompt),
            f"the prompt {prompt[:40]!r}..., then the response",
            "Either the prompt was cut before it came here (OpenRLHF's prompt limit), or the tokenizer does not decode "
            "it back to the same characters",
        )
    while token := next((t for t in end_tokens if response.endswith(t)), ""):
        response = response[: -len(token)]
    return response


def _after(query: str, prompt: str, end_tokens: tuple[str, ...]) -> str | None:
    start, behind = 0, False  # of a token
    while True:
        if behind and query.startswith(" ", start) and not prompt.startswith(" "):
            start += 1
        if query.startswith(prompt, start):
            return query[start + len(prompt) :]
        if (found := _match(query, start, prompt)) is not None:
            return query[found:]
        if behind and query.startswith(" " + prompt, start):  # whose own space stands behind the decoder's
            return query[start + 1 + len(prompt) :]
        token = _AHEAD.match(query, start)
        width = len(token[0]) if token else next((len(t) for t in end_tokens if query.startswith(t, start)), 0)
        if not width:
            return None
        start, behind = start + width, True


def _match(query: str, start: int, prompt: str) -> int | None:
    """Where in ``query`` the prompt that begins at ``start`` ends, spaces behind special tokens aside."""
    at = start
    behind = False  # of a special token
    for piece, special in _pieces(prompt):
        if behind:
            at += query.startswith(" ", at)
            piece = piece.removeprefix(" ")
        if not query.startswith(piece, at):
            return None
        at += len(piece)
        behind = special
    return at


def _pieces(text: str) -> list[tuple[str, bool]]:
    """A text cut into its special tokens (True) and what lies between them (False)."""
    pieces, done = [], 0
    for found in _SPECIAL.finditer(text):
        if found.start() > done:
            pieces.append((text[done : found.start()], False))
        pieces.append((found[0], True))
        done = found.end()
    return [*pieces, (text[done:], False)] if done < len(text) else pieces


def _where_they_part(query: str, prompt: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(query, prompt, strict=False)) if a != b), min(len(query), len(prompt)))
    if at == 0:
        return f"{query[:40]!r}..."
    return f"{query[at : at + 40]!r} where the prompt goes on with {prompt[at : at + 40]!r}, at character {at}"


def prompt_text(prompt: str, settings: ServeSettings, where: str = "prompts") -> str:
    """The prompt without the policy's chat template, where the settings say what that is.

    Raises:
        InputError: the prompt does not have it.
    """
    prefix, suffix = settings.prompt_prefix, settings.prompt_suffix
    bare = prompt.removeprefix(prefix).removesuffix(suffix)
    if len(bare) != len(prompt) - len(prefix) - len(suffix):
        reject(where, f"{prompt[:40]!r}...{prompt[-40:]!r}", f"a text between {prefix!r} and {suffix!r}")
    return bare


def grouped(prompts: list[str], size: int | None) -> list[list[int]]:
    """Places of each group's members: equal prompts, in order, ``size`` at a time.

    Raises:
        InputError: a prompt comes a number of times that is no multiple of ``size`` (or once, without a size).
    """
    places: dict[str, list[int]] = {}
    for k, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(k)
    groups: list[list[int]] = []
    for prompt, found in places.items():
        if size is None and len(found) < 2:
            reject(
                "prompts", f"{prompt[:40]!r} once", "twice or more, since the server was started without --group-size"
            )
        if size is not None and len(found) % size:
            reject("prompts", f"{prompt[:40]!r} {len(found)} times", f"a multiple of --group-size {size}")
        step = size or len(found)
        groups += [found[start : start + step] for start in range(0, len(found), step)]
    return groups
