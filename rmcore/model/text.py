"""From prompts and responses to token ids, segment by segment.

A text is a list of named segments (``prompt``, ``first``, ``second``). Each is tokenised on its own, so a response's
tokens never depend on its neighbours and encodings can be shared between pairs. Template text may hold special tokens;
prompts and responses are hostile input and never produce one: ``<|im_end|>`` in a response becomes ordinary characters.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import (
    Canonical,
    Prompt,
    Response,
    canonical_prompt,
    canonical_response,
    conversation_text,
    response_text,
)
from rmcore.model.chat import render_conversation
from rmcore.model.template_date import parse_date, pinned_template

__all__ = ["EncodedText", "OverlongPolicy", "PairTemplate", "Segment", "TextEncoder", "TextLimit"]

OverlongPolicy: TypeAlias = Literal["error", "truncate-prompt-left", "truncate-right", "truncate-longest", "no-reward"]
"""``error``: refuse, naming the text. ``truncate-prompt-left``: drop the oldest prompt tokens, refuse if the responses
alone are too long. ``truncate-right``: drop from the end, the longest response first, down to a quarter of the limit
for all responses of the text together, then the prompt's end. ``truncate-longest``: drop from the end of whichever is
longest, prompt or response, until all fits. ``no-reward``: leave such a text unread; its pairs have no preference, and
the other responses of its group are as they would be without it.

No policy cuts a response to nothing: a text of which no token of a response would be left is refused."""

log = logging.getLogger(__name__)

_POLICIES = get_args(OverlongPolicy)

_FIELD = re.compile(r"\{(prompt|first|second)\}")


_Run: TypeAlias = tuple[str, bool, tuple[int, ...]]
"""Segment name, whether a policy may cut it, token ids."""

_LEAST_SHARE = 4
"""Under ``truncate-right`` the responses keep at least a quarter of the limit while there is prompt to cut."""


class Segment(NamedTuple):
    """A named run of token ids: ``prompt``, ``first`` or ``second``, template text included where it belongs."""

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextLimit:
    """How many tokens a text may have, specials included (None: any number), and what happens to longer ones."""

    max_length: int | None = None
    overlong: OverlongPolicy = "error"

    def __post_init__(self) -> None:
        if self.overlong not in _POLICIES:
            reject("overlong", repr(self.overlong), f"one of {', '.join(_POLICIES)}")
        if self.max_length is not None and self.max_length < 1:
            reject("max_length", self.max_length, "a positive number of tokens or None")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One backbone input.

    Attributes:
        segments: in order; none where the text is ``unread``.
        content_tokens: content length before any cut.
        cut_tokens: how many tokens were cut.
        equal_responses: of a text with two responses: what is left of both is the same, but for where a cut fell.
        unread: longer than the limit under the policy ``no-reward``.
        limit: what cut it, if anything did.
    """

    segments: tuple[Segment, ...]
    content_tokens: int
    cut_tokens: int = 0
    equal_responses: bool = False
    unread: bool = False
    limit: TextLimit | None = field(default=None, compare=False, repr=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids in order."""
        return tuple(i for segment in self.segments for i in segment.ids)

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


@dataclass(frozen=True)
class PairTemplate:
    """The text around the named segments; ``{prompt}``, ``{first}`` and ``{second}`` are the only fields.

    ``single`` is used in difference mode (prompt and first), ``pair`` in concat mode. With a conversation, the part
    after ``{prompt}`` becomes the assistant turn of the tokenizer's chat template.
    """

    single: str = "{prompt}\n\n{first}"
    pair: str = "{prompt}\n\n### Response A\n{first}\n\n### Response B\n{second}"

    def __post_init__(self) -> None:
        for name, wanted in (("single", ["prompt", "first"]), ("pair", ["prompt", "first", "second"])):
            found = _FIELD.findall(getattr(self, name))
            if found != wanted:
                reject(f"template.{name}", f"fields {found}", f"exactly {wanted}, in that order")


class TextEncoder:
    """Tokenises prompts and responses for one tokenizer.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        template: the text around the segments.
        chat: ``auto`` uses the tokenizer's chat template for message lists and leaves plain prompts plain; ``always``
            makes a plain prompt one user message; ``never`` writes messages as "Role: content" paragraphs.
        append_eos: end plain texts with the tokenizer's eos token, for last-token pooling.
        max_length: most tokens a text may have, specials included; None for no limit.
        overlong: what happens to longer ones.
        date: YYYY-MM-DD, told to a chat template that asks for the day; None leaves the template the clock.
        positions: how far ``max_length`` may go, for error messages; None if nobody knows.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: PairTemplate | None = None,
        chat: Literal["auto", "always", "never"] = "auto",
        append_eos: bool = False,
        max_length: int | None = None,
        overlong: OverlongPolicy = "error",
        date: str | None = None,
        positions: int | None = None,
    ) -> None:
        self.limit = TextLimit(max_length, overlong)
        if chat not in ("auto", "always", "never"):
            reject("chat", repr(chat), "auto, always or never")
        if chat == "always" and not getattr(tokenizer, "chat_template", None):
            reject("chat", "'always'", "a tokenizer with a chat template")
        self.tokenizer = tokenizer
        self.template = template or PairTemplate()
        self.chat = chat
        self.append_eos = append_eos
        self.date = None if date is None else parse_date(date)
        self.positions = positions
        # Whether special tokens count is a state of the tokenizer, set before each call: one caller at a time.
        self._lock = threading.Lock()
        self._noticed: set[str] = set()
        self._literal = functools.lru_cache(maxsize=256)(self._tokenize_literal)
        self._content = functools.lru_cache(maxsize=16384)(self._tokenize_content)
        self._prefix, self._suffix = self._special_tokens()

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have where a call says nothing else."""
        return self.limit.max_length

    def encode(
        self, prompt: Prompt, first: Response, second: Response | None = None, *, limit: TextLimit | None = None
    ) -> EncodedText:
        """Tokenise one response (difference mode) or, with ``second``, one ordered pair (concat mode).

        A response of messages is rendered by the chat template in difference mode. Where there is no chat template, two
        responses share a turn, or the template refuses the response's roles, it is one text
        (:func:`~rmcore._base.prompt.response_text`).

        ``limit`` is for this text, instead of the encoder's own.

        Raises InputError for what is no prompt or response, for an over-long text under the policy ``error``, and for
        one the policy cannot shorten enough.
        """
        limit = limit or self.limit
        template = self.template.single if second is None else self.template.pair
        asked = canonical_prompt(prompt)
        answer = canonical_response(first, "first")
        texts = {"first": response_text(first, "first")}
        if second is not None:
            texts["second"] = response_text(second, "second")
        uses_chat = self.chat == "always" or (
            self.chat == "auto" and not isinstance(asked, str) and bool(getattr(self.tokenizer, "chat_template", None))
        )
        if not uses_chat:
            return self._assemble(self._plain_pieces(asked, template), texts, limit)
        turn = template.split("{prompt}", 1)[1].lstrip("\n")
        if not isinstance(answer, str) and turn == "{first}":
            try:
                return self._assemble(self._turns_pieces(asked, answer), texts, limit)
            except _TurnsError:
                self._notice("the roles of a response")
        return self._assemble(self._chat_pieces(asked, turn), texts, limit)

    # A piece is (segment name, kind, text): kind "literal" is template text, "content" is hostile text and "field"
    # names a response.
    def _plain_pieces(self, prompt: Canonical, template: str) -> list[tuple[str, str, str]]:
        text = prompt if isinstance(prompt, str) else conversation_text(prompt) + "\n\nAssistant:"
        return [("prompt", "ids", "prefix"), *_template_pieces(template, text), ("", "ids", "suffix")]

    def _chat_pieces(self, prompt: Canonical, turn: str) -> list[tuple[str, str, str]]:
        """A conversation and one assistant turn that holds what ``turn`` says."""
        messages = _as_messages(prompt)
        pieces: list[tuple[str, str, str]] = []
        name = "prompt"
        for part in render_conversation(self._render, [*messages, {"role": "assistant", "content": ""}], self._notice):
            if part.message == len(messages):
                pieces += _template_pieces(turn, None)
                name = ""
            else:
                pieces.append((name, "content" if part.kind == "text" else "literal", part.text))
        return pieces

    def _turns_pieces(self, prompt: Canonical, answer: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        """A conversation that goes on with the messages of a response; raises _TurnsError where it cannot."""
        messages = _as_messages(prompt)
        try:
            parts = render_conversation(self._render, [*messages, *answer], self._notice)
        except InputError as error:
            raise _TurnsError from error
        pieces: list[tuple[str, str, str]] = []
        name = "prompt"
        for part in parts:
            name = "first" if part.message >= len(messages) else name
            pieces.append((name, "content" if part.kind == "text" else "literal", part.text))
        return pieces

    def _render(self, messages: list[dict[str, Any]]) -> str:
        pinned = None if self.date is None else pinned_template(self.tokenizer.get_chat_template(), self.date)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=pinned))

    def _notice(self, field: str) -> None:
        if field not in self._noticed:
            self._noticed.add(field)
            log.warning("the tokenizer's chat template leaves out %s: shown as text within the messages instead", field)

    def _assemble(self, pieces: list[tuple[str, str, str]], texts: dict[str, str], limit: TextLimit) -> EncodedText:
        # Ids a policy may cut (content) are kept apart from those it may not (template, special tokens).
        runs: list[_Run] = []
        current = "prompt"
        for name, kind, text in pieces:
            current = name or current
            if kind == "ids":
                ids = self._prefix if text == "prefix" else self._suffix
            elif kind == "literal":
                ids = self._literal(text)
            else:
                ids = self._content(texts[text] if kind == "field" else text)
            if ids:
                runs.append((current, kind in ("content", "field"), ids))
        content = sum(len(ids) for _, cuttable, ids in runs if cuttable)
        excess = 0 if limit.max_length is None else sum(len(ids) for *_, ids in runs) - limit.max_length
        if excess > 0 and limit.overlong == "no-reward":
            return EncodedText((), content, unread=True, limit=limit)
        whole = [_content_of(runs, name) for name in texts]
        if excess > 0:
            runs = self._shorten(runs, excess, limit)
        segments: list[Segment] = []
        for name in ("prompt", "first", "second"):
            ids = tuple(i for run, _, part in runs if run == name for i in part)
            if ids:
                segments.append(Segment(name, ids))
        equal = len(whole) == 2 and _nothing_between(whole, [_content_of(runs, name) for name in texts])
        return EncodedText(
            tuple(segments), content, max(excess, 0), equal_responses=equal, limit=limit if excess > 0 else None
        )

    def _shorten(self, runs: list[_Run], excess: int, limit: TextLimit) -> list[_Run]:
        total = sum(len(ids) for *_, ids in runs)
        assert limit.max_length is not None
        if limit.overlong == "error":
            reject("prompt and response", f"{total} tokens", f"at most {limit.max_length}", self._remedy(limit))
        sizes = [len(ids) if cuttable else 0 for _, cuttable, ids in runs]
        left = [0] * len(runs)
        right = [0] * len(runs)
        prompts = [k for k, run in enumerate(runs) if run[0] == "prompt" and run[1]]
        # A unit is what is shortened as one: a response, or all messages of the prompt.
        own = {name: [k for k, run in enumerate(runs) if run[0] == name and run[1]] for name in ("first", "second")}
        units = [unit for unit in own.values() if unit]
        if limit.overlong == "truncate-prompt-left":
            for k in prompts:
                left[k] = min(sizes[k], excess)
                excess -= left[k]
        elif limit.overlong == "truncate-longest":
            excess -= _level([prompts, *units], sizes, right, excess, [0, *[1] * len(units)])
        else:
            least = max(1, limit.max_length // (_LEAST_SHARE * max(len(units), 1)))
            excess -= _level(units, sizes, right, excess, [least] * len(units))
            excess -= _level([prompts], sizes, right, excess, [0])
            excess -= _level(units, sizes, right, excess, [1] * len(units))
        if excess > 0:
            reject(
                "prompt and response",
                f"{total} tokens, of which {excess} too many remain after the policy {limit.overlong!r}, which never "
                "cuts a response to nothing",
                f"at most {limit.max_length}",
            )
        return [(name, cut, ids[left[k] : len(ids) - right[k]]) for k, (name, cut, ids) in enumerate(runs)]

    def _remedy(self, limit: TextLimit) -> str:
        policies = f"an overlong policy: {', '.join(name for name in _POLICIES if name != 'error')}"
        if self.positions is None:
            return f"Pass a larger max_length, or {policies}"
        if limit.max_length is not None and limit.max_length < self.positions:
            return f"Pass a larger max_length (the model has {self.positions} positions), or {policies}"
        return f"The model has no more positions. Pass {policies}"

    def _tokenize_literal(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        with self._lock:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return tuple(encoded["input_ids"])

    def _tokenize_content(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        # JSON may carry half a surrogate pair, which no tokenizer takes: it becomes U+FFFD.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._lock:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return tuple(encoded["input_ids"])

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # What the tokenizer puts around a text ([CLS] ... [SEP], <s> ...), found from an example, not from names.
        bare = self._tokenize_literal("a")
        full = tuple(self.tokenizer("a")["input_ids"])
        start = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
        prefix, suffix = full[:start], full[start + len(bare) :]
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if self.append_eos and eos is not None and suffix[-1:] != (eos,):
            suffix = (*suffix, eos)
        return prefix, suffix


def _content_of(runs: list[_Run], name: str) -> tuple[int, ...]:
    return tuple(i for run, own, ids in runs if own and run == name for i in ids)


def _nothing_between(whole: list[tuple[int, ...]], left: list[tuple[int, ...]]) -> bool:
    """Whether what is left of two responses is the same, or, both being cut, the same but for where the cut fell."""
    if all(len(kept) < len(full) for kept, full in zip(left, whole, strict=True)):
        shorter = min(map(len, left))
        return left[0][:shorter] == left[1][:shorter]
    return left[0] == left[1]


def _level(units: list[list[int]], sizes: list[int], right: list[int], excess: int, least: list[int]) -> int:
    """Cut up to ``excess`` tokens from the ends of ``units`` into ``right``, the longest unit first; how many it was.

    The longest is brought down to the next longest (or as far as needed) before another is touched, so none pays for
    another; and no unit below its ``least``.
    """
    left = [sum(sizes[k] - right[k] for k in unit) for unit in units]
    cut = 0
    while cut < excess:
        spare = [n for n in range(len(units)) if left[n] > least[n]]
        if not spare:
            break
        longest = max(spare, key=lambda n: left[n])
        others = max((left[n] for n in spare if n != longest), default=0)
        drop = min(max(1, left[longest] - others), excess - cut, left[longest] - least[longest])
        left[longest] -= drop
        cut += drop
        for k in reversed(units[longest]):
            taken = min(drop, sizes[k] - right[k])
            right[k] += taken
            drop -= taken
    return cut


def _template_pieces(template: str, prompt: str | None) -> list[tuple[str, str, str]]:
    """Literals and fields of a template; a literal belongs to the segment that follows it."""
    parts = _FIELD.split(template)
    pieces: list[tuple[str, str, str]] = []
    for literal, name in zip(parts[0::2], [*parts[1::2], ""], strict=True):
        pieces.append((name, "literal", literal))
        if name == "prompt":
            pieces.append(("prompt", "content", prompt or ""))
        elif name:
            pieces.append((name, "field", name))
    return pieces


def _as_messages(prompt: Canonical) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class _TurnsError(Exception):
    """A chat template does not render a response's messages as turns of their own."""
