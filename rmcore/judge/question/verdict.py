"""Reading a judge's reply: the final answer only, whole labels only, and no verdict where there is doubt.

Two forms of answer are read, whichever was asked for: a line ``<verdict>LABEL</verdict>``, and a JSON object with the
fields ``critique`` and ``verdict``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rmcore._base.large import LARGE, find_all, pieces, read_json
from rmcore.judge.base import Outcome
from rmcore.judge.question.around import is_plain

__all__ = ["MAX_CRITIQUE", "UNANSWERED", "Labels", "Parsed", "Statement", "is_tail", "parse_verdict", "statements"]

MAX_CRITIQUE = 32_768
"""Longest critique kept, in characters: enough for any real one, and no reply can fill the memory."""

UNANSWERED = ("length", "filter", "refusal", "no_content", "conflicting", "unparsable")
"""Reasons of replies that are the judge's own answer and hold no verdict: what a store keeps besides verdicts."""

_TAG = re.compile(r"<\s{0,8}verdict\s{0,8}>([^<>]{0,200})<\s{0,8}/\s{0,8}verdict\s{0,8}>", re.IGNORECASE)
_PAIR = re.compile(r'(?<!\\)"verdict"\s{0,8}:\s{0,8}"([^"\\<>]{0,200})"')
# Where reasoning begins and ends when a server leaves it in the text: tags of many names, Magistral's and Kimi's
# brackets, and the channels of gpt-oss. `rmcore.judge.question.sanitise` breaks all of these in untrusted text.
_THINK = r"think|thinking|thoughts?|reasoning|reflection|seed:think|longcat_think"
_THINK_OPEN = re.compile(
    rf"<\s{{0,8}}(?:{_THINK})\s{{0,8}}>|\[THINK\]|◁think▷|<\|channel\|>\s?(?:analysis|commentary)\b", re.IGNORECASE
)
_THINK_CLOSE = re.compile(
    rf"<\s{{0,8}}/\s{{0,8}}(?:{_THINK})\s{{0,8}}>|\[/THINK\]|◁/think▷|"
    r"<\|channel\|>\s?final\s?(?:<\|constrain\|>\s?\w{1,20}\s?)?<\|message\|>|"
    r"<\|END_THINKING\|>|<\|end_of_thought\|>|<channel\|>|<\|inner_suffix\|>",
    re.IGNORECASE,
)
# Reasoning formats that nobody has listed: `<analysis>`, `<think type=x>`, `<|START_THINKING|>`, `<|channel>thought`.
# What ends something (`<end_of_turn>`) opens nothing.
_OPENING = re.compile(
    r"\s*<\|?(?!\s{0,8}verdict\b|\w{0,40}(?:end|eot|eos))(?P<name>[^\W\d][\w:.-]{0,39})"
    r"(?:\s[^<>\n]{0,79}[^<>\n/])?\s?\|?>",
    re.IGNORECASE,
)
# The same behind other words, where the name alone tells it; in square brackets few do, since headings look like that.
_THOUGHTS = (
    rf"(?!end)(?:(?:start|begin)_(?:of_)?)?(?:\w{{1,20}}_)?(?:{_THINK}|analysis|scratchpad|cot|inner_prefix)(?:_start)?"
)
_QUOTED = r"(?<![\w,;`'\"(] )(?<![\w`'\"(])"  # what stands within a sentence or quotation marks is spoken of
_MIDWAY = re.compile(
    rf"{_QUOTED}<\s{{0,8}}(?P<name>{_THOUGHTS})(?:\s[^<>\n]{{0,79}}[^<>\n/])?\s?>|"
    rf"<\|(?P<token>{_THOUGHTS})\|?>|<\|channel>\s?(?P<channel>thought|analysis)\b|"
    rf"{_QUOTED}\[\s?(?P<square>(?:begin_|start_)?(?:think|thinking|thoughts?))\s?\]",
    re.IGNORECASE,
)
_PLAIN = {ord("｜"): "|", ord("▁"): "_"}  # as DeepSeek's tokens have them
# What may follow a verdict: white space, emphasis, punctuation, closing brackets and tags, tokens that end a turn;
# never words, however few ("Actually not."), nor what strikes a text out: `~~` and `</del>`.
_TAIL_PART = re.compile(
    r"[\s\u200b\ufeff*_`\"'.,!。！$|}\\\])-]{1,4096}|<\s{0,8}/(?!\s{0,8}(?:del|strike)\b)\s{0,8}[\w:.-]{1,40}\s{0,8}>|"
    r"<[|｜][\w▁-]{0,20}(?:end|eot|eos)[\w▁-]{0,20}[|｜]>|<(?:end|eot|eos)\w{0,20}>",
    re.IGNORECASE,
)
_MOST_BRACES = 16  # opening ones that are looked at for the object around a verdict
_REACH = 512  # no pattern of a tag or a label looks further from where it begins
_FENCED = re.compile(r"```[a-zA-Z]{0,10}\s*(\{.*\})\s*```", re.DOTALL)
_DECORATION = " \t\r\n*_`\"'"  # what models put around a label they mean


_FINISHED = frozenset({"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "end", "completed", "complete"})
"""``finish_reason`` of a text that the model itself ended; empty where an endpoint says nothing of it."""
_ENDED = _FINISHED | {"tool_calls", "function_call", "tool_use"}
"""The same of an answer without text, which may have called a tool instead."""
_LENGTH = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
_FILTERED = frozenset(
    {"content_filter", "safety", "prohibited_content", "blocklist", "recitation", "spii", "sensitive"}
)


@dataclass(frozen=True, slots=True)
class Labels:
    """The words one call asks its judge to answer with, each inside ``<verdict>…</verdict>``.

    ``win`` means that the response shown first is better, ``loss`` the one shown second, ``tie`` neither.
    """

    win: str
    loss: str
    tie: str

    def outcome(self, text: str) -> Outcome | None:
        """Which verdict ``text`` is: the whole label, case and surrounding emphasis aside; ``None`` if it is none."""
        word = text.strip(_DECORATION)
        if not word.isascii():
            return None  # letters whose upper case is a Latin one are not that letter
        word = word.upper()
        if word == self.win.upper():
            return "win"
        if word == self.loss.upper():
            return "loss"
        return "tie" if word == self.tie.upper() else None

    def label(self, outcome: Outcome) -> str:
        """The word that stands for ``outcome``."""
        return {"win": self.win, "loss": self.loss, "tie": self.tie}[outcome]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply says: ``outcome`` from the side of the response shown first, or ``None`` with a ``reason``.

    ``reason`` is one of ``length``, ``filter``, ``refusal``, ``unfinished``, ``no_content``, ``conflicting``,
    ``unparsable``.
    ``critique`` is the final answer without its verdict tags, at most :data:`MAX_CRITIQUE` characters.
    """

    outcome: Outcome | None
    reason: str = ""
    critique: str = ""


class Statement(NamedTuple):
    """What stands in one place that has the form of a verdict: where its text begins, and which verdict it is."""

    start: int
    outcome: Outcome | None
    stop: int
    """Where the tag or the pair ends."""


def statements(text: str, labels: Labels) -> list[Statement]:
    """Every ``<verdict>…</verdict>`` in ``text`` and every ``"verdict": "LABEL"`` with a whole label of ours, in order.

    A JSON pair with anything else is left out: it may be a quotation, which a tag in a final answer hardly is.
    """
    tags, pairs = (
        [Statement(found.start(1), labels.outcome(found[1]), found.end()) for found in find_all(form, text, _REACH)]
        for form in (_TAG, _PAIR)
    )
    return sorted(tags + [pair for pair in pairs if pair.outcome is not None], key=lambda statement: statement.start)


def parse_verdict(reply: object, labels: Labels) -> Parsed:
    """Read one reply: a chat-completions choice, its message alone, or the bare text.

    Only the final answer counts. Reasoning is never searched, whether it comes in a field of its own
    (``reasoning_content``, ``reasoning``), as a typed part, or inline up to the *last* ``</think>`` (or another
    model's mark for it); a ``<think>`` left open means that the reply was cut off. A reply with ``finish_reason``
    ``length`` or ``content_filter``, a refusal or no content gives no verdict whatever its text says.

    If the answer is a JSON object (code fences aside) with a ``verdict``, that field is the verdict and ``critique``
    the critique. Otherwise every ``<verdict>LABEL</verdict>`` and every ``"verdict": "LABEL"`` counts. Whole labels of
    ours count only, in any number, if all agree; labels that disagree are ``conflicting``. A last tag or field that
    holds anything but a label takes back what stood before it, as does any text behind it, and as does a last one that
    is struck out or within tags of unknown names (:mod:`rmcore.judge.question.around`): ``unparsable``.

    Total: any object whatever gives a :class:`Parsed`, never an exception.
    """
    if isinstance(reply, str):
        return _read(reply, labels)
    if not isinstance(reply, Mapping):
        return Parsed(None, "unparsable")
    message, finish = reply.get("message", reply), _finish(reply)
    if not isinstance(message, Mapping):
        return Parsed(None, "unparsable" if finish in _ENDED else "unfinished")
    content = message.get("content")
    if isinstance(content, list):
        content, refused = _join_parts(content)
    else:
        refused = False
    text = content if isinstance(content, str) else ""
    if finish in _LENGTH:
        return Parsed(None, "length", text[:MAX_CRITIQUE])
    if finish in _FILTERED:
        return Parsed(None, "filter", text[:MAX_CRITIQUE])
    if refused or finish == "refusal" or message.get("refusal"):
        return Parsed(None, "refusal", text[:MAX_CRITIQUE])
    went_on = reply.get("error") or any(message.get(name) for name in ("error", "tool_calls", "function_call"))
    if finish not in (_FINISHED if text.strip() else _ENDED) or (text.strip() and went_on):
        # Not a list of failures, which is never complete: "error", "abort" and what comes next year are no end, and
        # least of all of an answer without a word. Words beside a call of a tool are none's end either.
        return Parsed(None, "unfinished", text[:MAX_CRITIQUE])
    if content is not None and not isinstance(content, str):
        return Parsed(None, "unparsable")
    return _read(text, labels)


def _finish(reply: Mapping[object, object]) -> str:
    """Why a text ended, in lower case; empty where the endpoint does not say."""
    said = reply.get("finish_reason")
    if said is None and isinstance(details := reply.get("finish_details"), Mapping):
        said = details.get("type")
    # A number or an object is a reason too, and no end that is known.
    ended = "" if said is None else said.lower() if isinstance(said, str) else f"of type {type(said).__name__}"
    if ended in _ENDED:  # a gateway's word for its upstream's, which may know better
        own = (reply.get(name) for name in ("native_finish_reason", "stop_reason"))
        return next((word for it in own if isinstance(it, str) and (word := it.lower()) in _LENGTH | _FILTERED), ended)
    return ended


def _join_parts(parts: list[object]) -> tuple[str | None, bool]:
    """The text of a content given as a list of typed parts, and whether one of them is a refusal."""
    texts, refused = [], False
    for part in parts:
        if isinstance(part, Mapping):
            refused = refused or part.get("type") == "refusal"
            text = part.get("text")
            # Parts of other types ("thinking", "reasoning") are not the answer.
            if part.get("type") in ("text", "output_text") and isinstance(text, str):
                texts.append(text)
    return ("".join(texts) if texts else None), refused


def _read(text: str, labels: Labels) -> Parsed:
    """Read a complete message text."""
    # Before reasoning is cut off: a critique in a JSON string may quote a closing tag without closing anything.
    parsed = _read_object(text, labels)
    if parsed is not None:
        return parsed
    answer_from = 0
    for close in find_all(_THINK_CLOSE, text, _REACH):
        answer_from = close.end()
    answer = text[answer_from:]
    if _holds(_THINK_OPEN, answer):
        return Parsed(None, "length")
    if not answer.strip():
        return Parsed(None, "no_content")
    parsed = _read_object(answer, labels) if answer_from else None
    if parsed is not None:
        return parsed
    if _opens_and_does_not_close(answer):
        return Parsed(None, "length", answer[:MAX_CRITIQUE])
    critique = _without(list(find_all(_TAG, answer, _REACH)), answer)
    found = statements(answer, labels)
    outcomes = [statement.outcome for statement in found]
    if found and not _is_meant(answer, found[-1]):
        # A verdict ends an answer. With more behind it, it was thought aloud, and perhaps not the last thought.
        conflict = len(set(outcomes) - {None}) > 1
        return Parsed(None, "conflicting" if conflict else "unparsable", critique[:MAX_CRITIQUE])
    return _decide(outcomes, critique)


def _is_meant(answer: str, last: Statement) -> bool:
    if not is_plain(answer, last.start, last.stop):
        return False
    return is_tail(answer, last.stop) or _ends_object(answer, last.stop)


def _opens_and_does_not_close(answer: str) -> bool:
    """Whether an answer begins with something of the shape of a reasoning tag, of whatever name, that is not closed;
    or has one of the names that such tags have behind other words.
    """
    if any(chr(sign) in answer for sign in _PLAIN):
        answer = "".join(piece.translate(_PLAIN) for piece in pieces(answer))
    first = _OPENING.match(answer)
    opened = [(first["name"], first.end())] if first is not None else []
    for found in find_all(_MIDWAY, answer, _REACH):
        opened.append((next(filter(None, found.groups())), found.end()))
        del opened[1:-1]  # the first and the last tell
    return any(not _closes(name, answer, end) for name, end in opened)


def _closes(opened: str, answer: str, start: int) -> bool:
    name = re.escape(re.sub(r"(?i)^start_(?:of_)?|_start$|^begin_(?:of_)?|_prefix$", "", opened))
    forms = (
        rf"<\s{{0,8}}/\s{{0,8}}(?:begin_(?:of_)?)?{name}\b",
        rf"<\|?(?:end_(?:of_)?)?{name}(?:_end|_suffix)?\|>|<channel\|>",
        rf"\[\s?(?:/\s?{name}|end_(?:of_)?{name})\s?\]",
    )
    closing = "(?i)" + "|".join(forms)
    return _holds(re.compile(closing), answer, start)


def _holds(pattern: re.Pattern[str], text: str, start: int = 0) -> bool:
    return next(find_all(pattern, text, _REACH, start), None) is not None


def _without(found: list[re.Match[str]], text: str) -> str:
    """``text`` without what was ``found`` in it."""
    ends = [0, *(one.end() for one in found)]
    starts = [*(one.start() for one in found), len(text)]
    return "".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def is_tail(text: str, start: int) -> bool:
    """Whether ``text`` from ``start`` on is what may follow a verdict: no words, and nothing that takes it back."""
    while start < len(text):
        part = _TAIL_PART.match(text, start)
        if part is None:
            return False
        start = part.end()
    return True


def _ends_object(text: str, place: int) -> bool:
    """Whether ``place`` is within a whole JSON object that ends the text as a tag may end it."""
    if len(text) > LARGE:  # a text of that size is no such answer
        return False
    start, decoder = place, json.JSONDecoder()
    for _ in range(_MOST_BRACES):
        start = text.rfind("{", 0, start)
        if start < 0:
            break
        try:
            _, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if stop >= place:
            return is_tail(text, stop)
    return False


def _read_object(text: str, labels: Labels) -> Parsed | None:
    """Read an answer that is one JSON object with a verdict; ``None`` if it is something else."""
    text = text.strip()
    if (fenced := _FENCED.fullmatch(text)) is not None:
        text = fenced[1]
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        fields = read_json(text, object_pairs_hook=tuple)  # pairs, so that a field given twice is seen
    except (ValueError, RecursionError):
        return None
    given = [value for name, value in fields if name == "verdict"]
    if not given:
        return None
    critique = next((value for name, value in reversed(fields) if name == "critique" and isinstance(value, str)), "")
    # A verdict in the critique that disagrees is doubt, as it would be in a text.
    found = [quoted for quoted in statements(critique, labels) if quoted.outcome is not None]
    # As written, not spelt in JSON's escapes: what a response may not hold could come back from it in another spelling.
    stated = [labels.outcome(value) if isinstance(value, str) and value in text else None for value in given]
    return _decide([quoted.outcome for quoted in found] + stated, critique)


def _decide(found: list[Outcome | None], critique: str) -> Parsed:
    """One verdict from all that an answer states, the last one last."""
    critique = critique.strip()[:MAX_CRITIQUE]
    outcomes = {outcome for outcome in found if outcome is not None}
    if len(outcomes) > 1:
        return Parsed(None, "conflicting", critique)
    if not found or found[-1] is None:
        return Parsed(None, "unparsable", critique)
    return Parsed(found[-1], "", critique)
