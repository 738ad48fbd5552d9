"""From prompts and responses to token ids, those that a model's authors feed it.

- One response with a chat template: the ids of ``apply_chat_template(tokenize=True)`` of the whole conversation
  (:mod:`rmcore.model.encoding.whole`).
- One response and a model of BERT's kind: the ids of ``tokenizer(prompt, response)``.
- Anything else is rmcore's own form: a list of named segments (``prompt``, ``first``, ``second``), each tokenised on
  its own, so that a response's tokens do not depend on its neighbours.

Template text may hold special tokens. Prompts and responses are hostile input and never produce one, unless they are
asked to: ``<|im_end|>`` in a response becomes ordinary characters.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import (
    Canonical,
    Prompt,
    Response,
    canonical_prompt,
    canonical_response,
    response_text,
)
from rmcore.model.chat import Known, render_conversation, render_pieces
from rmcore.model.encoding.chance import refuse_chance
from rmcore.model.encoding.limits import OverlongPolicy, Run, TextLimit, shorten
from rmcore.model.encoding.pieces import pieces_of, splits_at_spaces
from rmcore.model.encoding.surrogates import without_surrogates
from rmcore.model.encoding.template import (
    CRITIQUE_TEXT,
    CRITIQUE_TURN,
    PairTemplate,
    Piece,
    as_messages,
    one_text,
    plain_pieces,
    template_pieces,
    two_text_pieces,
)
from rmcore.model.encoding.whole import WholeText
from rmcore.model.template_date import parse_date, pinned_template

__all__ = [
    "CRITIQUE_TEXT",
    "CRITIQUE_TURN",
    "EncodedText",
    "OverlongPolicy",
    "PairTemplate",
    "Segment",
    "TextEncoder",
    "TextLimit",
]

log = logging.getLogger(__name__)

# Masks and types would be lists as long as the ids, and are not used.
_IDS_ONLY: dict[str, Any] = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}

_Ids: TypeAlias = NDArray[np.int64]


class Segment(NamedTuple):
    """A named run of token ids: ``prompt``, ``first``, ``second`` or ``critique``, template text included."""

    name: str
    ids: tuple[int, ...]


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
        return tuple(chain.from_iterable(segment.ids for segment in self.segments))

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


class TextEncoder:
    """Tokenises prompts and responses for one tokenizer.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        template: the text around the segments.
        chat: ``auto`` uses the tokenizer's chat template if it has one, and a plain prompt is one user message then,
            unless a template of one's own says how plain texts look; ``always`` does so in any case, ``never`` writes
            messages as "Role: content" paragraphs.
        two_texts: one response without a chat template is ``tokenizer(prompt, response)``, the tokenizer's own form for
            two texts; a template of one's own comes before it.
        split_special_tokens: special tokens that prompts and responses spell are ordinary text, which is safe against
            texts that forge turns. Off: they are special tokens, as ``apply_chat_template`` makes them.
        append_eos: end plain texts with the tokenizer's eos token, for last-token pooling.
        max_length: most tokens a text may have, specials included; None for no limit.
        overlong: what happens to longer ones.
        date: YYYY-MM-DD, told to a chat template that asks for the day; None leaves the template the clock.
        positions: how far ``max_length`` may go, for error messages; None if nobody knows.

    Raises:
        InputError: an argument is out of range; or the tokenizer or its chat template draws at random.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: PairTemplate | None = None,
        chat: Literal["auto", "always", "never"] = "auto",
        two_texts: bool = False,
        split_special_tokens: bool = True,
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
        refuse_chance(tokenizer, template=chat != "never")
        self.tokenizer = tokenizer
        self.template = template or PairTemplate()
        self.chat = chat
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self.split_special_tokens = split_special_tokens
        self.append_eos = append_eos
        self.date = None if date is None else parse_date(date)
        self.positions = positions
        # Whether special tokens count is a state of the tokenizer, set before each call: one caller at a time.
        self._lock = threading.Lock()
        self._noticed: set[str] = set()
        self._known: Known = {}
        self._cuttable = splits_at_spaces(tokenizer)
        self._literal = functools.lru_cache(maxsize=256)(self._tokenize_literal)
        self._content = functools.lru_cache(maxsize=16384)(self._tokenize_content)
        around = dict(zip(("prefix", "suffix"), self._special_tokens(), strict=True))
        two = self._two_text_tokens() if two_texts and self.template.single == PairTemplate.single else None
        self.two_texts = two is not None
        around |= dict(zip(("start", "between", "end"), two or (), strict=False))
        self._around = {name: _ids(ids) for name, ids in around.items()}
        self._whole = WholeText(
            tokenizer,
            self._lock,
            split_special_tokens=split_special_tokens,
            cuttable=self._cuttable,
            content=self._content,
        )

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have where a call says nothing else."""
        return self.limit.max_length

    def encode(
        self,
        prompt: Prompt,
        first: Response,
        second: Response | None = None,
        *,
        critique: str | None = None,
        limit: TextLimit | None = None,
    ) -> EncodedText:
        """Tokenise one response (difference mode) or, with ``second``, one ordered pair (concat mode).

        A response of messages is rendered by the chat template in difference mode. Where there is no chat template, two
        responses share a turn, or the template refuses the response's roles, it is one text
        (:func:`~rmcore._base.prompt.response_text`).

        ``critique`` stands behind the response that it is of, in a user turn of CLoud's where there is a chat template
        (:data:`CRITIQUE_TURN`, :data:`CRITIQUE_TEXT` elsewhere); the tokens before it are those of the response alone.
        It is hostile text as they are, and the first to be cut, from its end, whatever the policy.

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
        if critique is not None:
            if second is not None:
                reject("critique", "one beside two responses", "one response and its critique (difference mode)")
            if not isinstance(critique, str):
                reject("critique", type(critique).__name__, "a text")
            texts["critique"] = critique
            template += CRITIQUE_TEXT
        if not self._uses_chat(asked, second is not None):
            if second is None and self.two_texts:
                return self._assemble(self._from_pieces(two_text_pieces(asked, texts), texts), texts, limit)
            return self._assemble(self._from_pieces(plain_pieces(asked, template), texts), texts, limit)
        turn = template.split("{prompt}", 1)[1].lstrip("\n")
        if turn.removesuffix(CRITIQUE_TEXT) == "{first}":
            return self._assemble(self._conversation(asked, answer, texts), texts, limit)
        return self._assemble(self._from_pieces(self._chat_pieces(asked, turn), texts), texts, limit)

    def template_ids(self, prompt: Prompt, response: Response) -> list[int]:
        """What ``apply_chat_template(tokenize=True)``, or ``tokenizer(prompt, response)``, makes of one response.

        Asked of the tokenizer in one call, to hold :meth:`encode` against. Raises as the tokenizer does, and InputError
        where neither form is in use.
        """
        asked, answer = canonical_prompt(prompt), canonical_response(response)
        if not self.follows_tokenizer(prompt):
            reject("backbone", "a text form of rmcore's own", "a chat template, or a tokenizer's form for two texts")
        if self._uses_chat(asked, False):
            turn = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            with self._lock:
                found = self.tokenizer.apply_chat_template(
                    [*as_messages(asked), *turn], tokenize=True, chat_template=self._pinned()
                )
        else:
            with self._lock:
                found = self.tokenizer(
                    one_text(asked), response_text(answer), split_special_tokens=False, verbose=False
                )
        return list(found if isinstance(found, list) else found["input_ids"])

    def follows_tokenizer(self, prompt: Prompt) -> bool:
        """Whether one response to ``prompt`` is encoded as the tokenizer's own call would (:meth:`template_ids`)."""
        if self._uses_chat(canonical_prompt(prompt), False):
            return self.template.single.split("{prompt}", 1)[1].lstrip("\n") == "{first}"
        return self.two_texts

    def spells_special(self, text: str) -> bool:
        """Whether ``text`` spells a special token, which is kept ordinary text."""
        pattern = self._whole.spells_special
        return pattern is not None and pattern.search(text) is not None

    def _uses_chat(self, prompt: Canonical, pair: bool) -> bool:
        if self.chat != "auto" or not self.has_chat_template:
            return self.chat == "always"
        own = self.template.pair != PairTemplate.pair if pair else self.template.single != PairTemplate.single
        return not (isinstance(prompt, str) and own)

    def _chat_pieces(self, prompt: Canonical, turn: str) -> list[Piece]:
        """A conversation and one assistant turn that holds what ``turn`` says."""
        messages = as_messages(prompt)
        pieces: list[Piece] = []
        name = "prompt"
        for part in render_pieces(self._render, [*messages, {"role": "assistant", "content": ""}], self._notice):
            if part.message == len(messages):
                pieces += template_pieces(turn, None)
                name = ""
            else:
                pieces.append(Piece(name, "content" if part.kind == "text" else "literal", part.text))
        return pieces

    def _conversation(self, prompt: Canonical, answer: Canonical, texts: dict[str, str]) -> list[Run]:
        """A conversation that goes on with a response."""
        messages = as_messages(prompt)
        one: list[dict[str, Any]] = [{"role": "assistant", "content": texts["first"]}]
        turns = [one] if isinstance(answer, str) else [answer, one]
        more = [{"role": "user", "content": CRITIQUE_TURN + texts["critique"]}] if "critique" in texts else []
        for turn in turns:
            whole = [without_surrogates(message) for message in (*messages, *turn, *more)]
            try:
                special = self._whole.spells_special
                rendering = render_conversation(
                    self._render,
                    whole,
                    self._notice,
                    answer=len(messages),
                    special=special,
                    known=self._known,
                )
            except InputError:
                if turn is turns[-1]:
                    raise
                self._notice("the roles of a response: shown as text within the messages instead")
                continue
            return self._whole.runs(rendering, len(messages), len(messages) + len(turn) if more else None)
        raise AssertionError

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self._pinned()))

    def _pinned(self) -> str | None:
        return None if self.date is None else pinned_template(self.tokenizer.get_chat_template(), self.date)

    def _notice(self, what: str) -> None:
        if what not in self._noticed:
            self._noticed.add(what)
            log.warning("the tokenizer's chat template leaves out %s", what)

    def _from_pieces(self, pieces: list[Piece], texts: dict[str, str]) -> list[Run]:
        # Ids a policy may cut (content) are kept apart from those it may not (template, special tokens).
        runs: list[Run] = []
        current = "prompt"
        for name, kind, text in pieces:
            current = name or current
            if kind == "ids":
                ids = self._around[text]
            elif kind == "literal":
                ids = self._literal(text)
            else:
                ids = self._content(texts[text] if kind == "field" else text)
            if len(ids):
                runs.append(Run(current, kind in ("content", "field"), ids))
        return runs

    def _assemble(self, runs: list[Run], texts: dict[str, str], limit: TextLimit) -> EncodedText:
        content = sum(len(ids) for _, cuttable, ids in runs if cuttable)
        excess = 0 if limit.max_length is None else sum(len(ids) for *_, ids in runs) - limit.max_length
        if excess > 0 and limit.overlong == "no-reward":
            return EncodedText((), content, unread=True, limit=limit)
        pair = "second" in texts
        whole = [_content_of(runs, name) for name in texts] if pair else []
        if excess > 0:
            runs = shorten(runs, limit, self.positions)
        segments: list[Segment] = []
        for name in ("prompt", "first", "second", "critique"):
            ids = _joined([part for run, _, part in runs if run == name])
            if len(ids):
                segments.append(Segment(name, tuple(ids.tolist())))
        equal = pair and _nothing_between(whole, [_content_of(runs, name) for name in texts])
        return EncodedText(
            tuple(segments), content, max(excess, 0), equal_responses=equal, limit=limit if excess > 0 else None
        )

    def _tokenize_literal(self, text: str) -> _Ids:
        return self._tokenize(text, False) if text else _ids(())

    def _tokenize_content(self, text: str) -> _Ids:
        if not text:
            return _ids(())
        split = self.split_special_tokens
        return _joined(
            [self._tokenize(without_surrogates(piece), split) for _, piece in pieces_of(text, self._cuttable)]
        )

    def _tokenize(self, text: str, split_special_tokens: bool) -> _Ids:
        with self._lock:
            encoded = self.tokenizer(text, split_special_tokens=split_special_tokens, **_IDS_ONLY)
        return _ids(encoded["input_ids"])

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # What the tokenizer puts around a text ([CLS] ... [SEP], <s> ...), found from an example, not from names.
        bare = tuple(self._tokenize_literal("a").tolist())
        full = tuple(self.tokenizer("a")["input_ids"])
        start = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
        prefix, suffix = full[:start], full[start + len(bare) :]
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if self.append_eos and eos is not None and suffix[-1:] != (eos,):
            suffix = (*suffix, eos)
        return prefix, suffix

    def _two_text_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
        """What the tokenizer puts before, between and behind two texts; None where it has no form for two."""
        one, other = (tuple(self._tokenize_literal(text).tolist()) for text in "ab")
        full = tuple(self.tokenizer("a", "b")["input_ids"])
        for start in range(len(full)):
            for border in range(start + len(one) + 1, len(full)):
                if full[start : start + len(one)] == one and full[border : border + len(other)] == other:
                    return full[:start], full[start + len(one) : border], full[border + len(other) :]
        return None


def _ids(found: Sequence[int]) -> _Ids:
    """As an array that many share, so none may write to it."""
    ids = np.asarray(found, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _joined(parts: list[_Ids]) -> _Ids:
    return parts[0] if len(parts) == 1 else np.concatenate([_ids(()), *parts])


def _content_of(runs: list[Run], name: str) -> _Ids:
    return _joined([ids for run, own, ids in runs if own and run == name])


def _nothing_between(whole: list[_Ids], left: list[_Ids]) -> bool:
    """Whether what is left of two responses is the same, or, both being cut, the same but for where the cut fell."""
    if all(len(kept) < len(full) for kept, full in zip(left, whole, strict=True)):
        shorter = min(map(len, left))
        return np.array_equal(left[0][:shorter], left[1][:shorter])
    return np.array_equal(left[0], left[1])
