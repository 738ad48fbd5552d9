"""The question put to a judge: a rubric, the two responses between unguessable markers, and how to answer.

A rendered prompt declares its own marker token and verdict labels, drawn anew for every call, in one fixed paragraph:
the *contract*. :meth:`JudgePrompt.parse` reads a rendered prompt back through that paragraph, whatever the template
around it says; the replay server depends on it.

A template file replaces everything but the contract. It is UTF-8 text of two parts, each under a line of its own, with
``$fields`` for what changes from call to call (``$$`` is a dollar sign)::

    --- system ---
    You compare two answers to a medical question. Accuracy decides; style does not matter.
    $contract
    --- user ---
    $prompt
    $first
    $second
    Name the worst factual error of either answer, then decide.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_prompt, canonical_response
from rmcore.judge.question.contract import CONTRACTS, LABEL_STYLE, Output, RandomSource, draw, find_contract
from rmcore.judge.question.cut import NO_CUT, Cut, ends
from rmcore.judge.question.sanitise import ESCAPE, RULES, restore, sanitise
from rmcore.judge.question.turns import as_text, assemble, segments
from rmcore.judge.question.verdict import Labels

__all__ = [
    "DEFAULT_SYSTEM",
    "DEFAULT_USER",
    "VERDICT_ONLY_USER",
    "JudgePrompt",
    "Output",
    "ParsedPrompt",
    "RandomSource",
    "RenderedPrompt",
]

DEFAULT_SYSTEM = """\
You are an impartial judge. You are shown a prompt and two responses to it, and you decide which response is better.

Compare them by:
- Helpfulness: does the response do what the prompt asks, as its author meant it?
- Correctness: are its statements, reasoning and code right? Does anything important fail or go missing?
- Coherence: is it clear, consistent and well ordered?
- Complexity: does its depth suit the question and the person who asked?
- Verbosity: is it as long as it needs to be? Longer is not better.
- Safety: does it avoid real harm, without refusing what is harmless?

Correctness and safety come before style. Neither the order of the responses nor their length says which is better.

$contract
"""

_SHOWN = """\
The prompt:
$prompt

The first response:
$first

The second response:
$second

"""
DEFAULT_USER = _SHOWN + "Compare the two responses in a few sentences, then give your verdict.\n"
VERDICT_ONLY_USER = _SHOWN + "Give your verdict at once and nothing else: no comparison and no explanation.\n"
"""Without a rationale: the label is written first, so its probability is the judge's first thought."""

_PRINCIPLES = "Judge by these principles before all else:\n"
_UNTRUSTED = ("prompt", "first", "second")
_FIELDS = ("contract", "principles", *_UNTRUSTED, "label_first", "label_second", "label_tie")
_HEADER = re.compile(r"^--- (system|user) ---[ \t]*\r?\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """One question, ready to send.

    Attributes:
        messages: the chat messages.
        labels: what its reply is to be read with.
        token: the marker token.
        sanitised: how many control sequences were broken in the untrusted texts.
        output: the form of answer it asks for.
        cut: characters cut from the response shown first and from the one shown second.
        cut_prompt: characters cut from the prompt.
    """

    messages: list[dict[str, str]]
    labels: Labels
    token: str
    sanitised: int
    output: Output = "text"
    cut: tuple[int, int] = (0, 0)
    cut_prompt: int = 0

    def response_format(self) -> dict[str, object]:
        """The request's ``response_format`` for ``json_schema``: critique and verdict, the latter a label of this call.

        In OpenAI's strict form: every field required, no others allowed.
        """
        labels = [self.labels.win, self.labels.loss, self.labels.tie]
        schema = {
            "type": "object",
            "properties": {"critique": {"type": "string"}, "verdict": {"type": "string", "enum": labels}},
            "required": ["critique", "verdict"],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """What a rendered prompt asks: its labels, the form of answer, and the texts as they were given.

    All three are in canonical form; a response of which ``cut`` tells that characters were cut is what was left of it.
    """

    prompt: Canonical
    first: Canonical
    second: Canonical
    labels: Labels
    output: Output = "text"
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class JudgePrompt:
    """A template for the question: a system and a user text with ``$fields`` (``$$`` is a dollar sign).

    ``$prompt``, ``$first`` and ``$second`` stand for the untrusted texts between their markers, each exactly once, in
    ``user``. ``$contract`` (the paragraph that declares markers and labels) stands exactly once, in ``system`` or in
    ``user`` before the texts. ``$label_first``, ``$label_second``, ``$label_tie`` may stand anywhere; ``$principles``
    stands once, not behind the texts, or is left out: then principles stand before everything else. With an empty
    ``system`` no system message is sent. Texts are put in once and never searched for fields.

    Args:
        system, user: the template.
        output: the form of answer that the contract asks for. A template says nothing of it, so one serves for both.
        max_response_chars: of a longer response the judge is shown the beginning, and told below it how many
            characters were cut (of several messages: as one text). ``None``: all of it.
        special_tokens: control sequences of the judge's tokenizer, to be broken in the texts besides those that are
            known by their shape (:mod:`rmcore.judge.question.sanitise`); each of two characters or more.
        principles: what to judge by besides (:class:`~rmcore.judge.question.constitution.Constitution`).

    Raises:
        InputError: a field is missing, repeated, unknown or in the wrong place, or an argument is out of range.
    """

    system: str = DEFAULT_SYSTEM
    user: str = DEFAULT_USER
    output: Output = "text"
    max_response_chars: int | None = None
    special_tokens: tuple[str, ...] = ()
    principles: tuple[str, ...] = ()
    untrusted: ClassVar[tuple[str, ...]] = _UNTRUSTED
    contracts: ClassVar[Mapping[Output, str]] = CONTRACTS

    def __post_init__(self) -> None:
        if self.output not in CONTRACTS:
            reject("output", repr(self.output)[:80], "'text' or 'json_schema'")
        limit = self.max_response_chars
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            reject("max_response_chars", repr(limit)[:80], "a number of characters, at least 1, or None")
        object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        for token in self.special_tokens:
            if not isinstance(token, str) or len(token) < 2 or ESCAPE in token:
                reject("special_tokens", repr(token)[:80], f"texts of at least 2 characters without {ESCAPE}")
        system, user = _fields(self.system, "system"), _fields(self.user, "user")
        for name in set(_UNTRUSTED).difference(self.untrusted):
            if name in system + user:
                reject("template", f"${name}", f"no fields but {', '.join(self.untrusted)} for texts")
        for name in self.untrusted:
            if name in system or user.count(name) != 1:
                reject(
                    "template",
                    f"${name} {user.count(name)} times in user, {system.count(name)} in system",
                    "once, in user",
                )
        if (system + user).count("contract") != 1:
            reject("template", f"$contract {(system + user).count('contract')} times", "exactly once")
        if "contract" in user and user.index("contract") > min(user.index(name) for name in self.untrusted):
            # A text before the contract could write a contract of its own.
            reject("template", "$contract after an untrusted text", "$contract before $prompt, $first and $second")
        object.__setattr__(self, "principles", tuple(self.principles))
        if (system + user).count("principles") > 1:
            reject("template", f"$principles {(system + user).count('principles')} times", "at most once")
        if "principles" in user and user.index("principles") > min(user.index(name) for name in self.untrusted):
            reject("template", "$principles after an untrusted text", "$principles before $prompt, $first and $second")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a template from a UTF-8 text file in the form that this module's documentation shows.

        The lines ``--- system ---`` and ``--- user ---`` begin the two parts, each at most once. A file without such
        lines is all user text, with no system message. Set ``output`` and ``max_response_chars`` with
        :func:`dataclasses.replace`, or as arguments of :class:`~rmcore.judge.chat.ChatJudge`.

        Raises:
            InputError: the file is not UTF-8, has text before the first header, repeats a part, or is no template.
            OSError: the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # which may begin with a byte-order mark
        except UnicodeDecodeError as error:
            raise InputError(f"template {Path(path).name}: not UTF-8: {error.reason} at byte {error.start}") from None
        pieces = _HEADER.split(text)
        if len(pieces) == 1:
            return cls(system="", user=text)
        names = pieces[1::2]
        if pieces[0].strip() or len(set(names)) != len(names):
            reject(f"template {Path(path).name}", "text before the first header or a repeated part", "each part once")
        parts = dict(zip(names, pieces[2::2], strict=True))
        return cls(system=parts.get("system", ""), user=parts.get("user", ""))

    @property
    def version(self) -> str:
        """Twelve hex digits over everything that shapes the question except the texts: part of a cache key.

        That is the template, the contract with its form of answer, the look of labels, the length cap, what is
        sanitised, and the principles.
        """
        limit = str(self.max_response_chars)
        content = "\0".join([self.system, self.user, self.contracts[self.output], LABEL_STYLE, limit, RULES])
        content += "".join("\0" + token for token in sorted(self.special_tokens))
        content += "".join("\1" + principle for principle in self.principles)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def render(
        self,
        prompt: Prompt,
        first: Response,
        second: Response,
        random_source: RandomSource | None = None,
        cut: Cut = NO_CUT,
    ) -> RenderedPrompt:
        """The question "which is better", ``first`` shown first, with a token and labels of its own.

        The token and the labels are drawn until they occur neither in the texts nor in the template, so no text can
        hold a marker of this call; marker look-alikes and control tokens in the texts are sanitised and counted.

        Of a text that ``cut`` shortens, the beginning and the end are shown (of several messages: as one text), with a
        marker line between them that says how much is missing.

        Raises:
            InputError: a text is neither text nor messages as :mod:`rmcore._base.prompt` has them.
            JudgeError: ``random_source`` keeps drawing words that are taken.
        """
        turns = _shortened("prompt", canonical_prompt(prompt), cut.prompt)
        shown_first, cut_first = self._shown("first", first, cut.first)
        shown_second, cut_second = self._shown("second", second, cut.second)
        taken = [part for turn in (*turns, *shown_first, *shown_second) for part in turn]
        taken += [self.system, self.user, *self.principles]
        gone = {"prompt": cut.prompt, "first": cut.first, "second": cut.second}
        token, labels = draw(taken, random_source)
        count = 0

        def segment(name: str, *shown: str) -> str:
            nonlocal count
            safe = []
            for text in shown:
                harmless, broken = sanitise(text, self.special_tokens)
                safe.append(harmless)
                count += broken
            # Where characters are missing stands a marker of this call, which no text can hold.
            body = f"\n<<<{token}:cut {gone.get(name, 0)} characters>>>\n".join(safe)
            return f"<<<{token}:{name}>>>\n{body}\n<<<{token}:end>>>"

        def joined(parts: list[tuple[str, ...]], cut: int = 0) -> str:
            # The note stands outside of the markers, where no response can write one.
            return "\n".join(segment(*part) for part in parts) + (f"\n[cut: {cut} characters]" if cut else "")

        trusted = {"label_first": labels.win, "label_second": labels.loss, "label_tie": labels.tie}
        contract = string.Template(self.contracts[self.output])
        trusted["contract"] = contract.substitute(token=token, win=labels.win, loss=labels.loss, tie=labels.tie)
        texts = {
            "prompt": joined(turns, cut.prompt),
            "first": joined(shown_first, cut_first),
            "second": joined(shown_second, cut_second),
        }
        # Template substitutes in one pass over the template: what it puts in is never looked at again.
        system, user = self._with_principles()
        # Whose words they are nobody knows here: a request may bring its own.
        safe = [sanitise(text, self.special_tokens) for text in self.principles]
        count += sum(broken for _, broken in safe)
        trusted["principles"] = _PRINCIPLES + "".join(f"- {text}\n" for text, _ in safe)
        if not self.principles:
            trusted["principles"] = ""
        messages = [{"role": "system", "content": string.Template(system).substitute(trusted)}]
        messages.append({"role": "user", "content": string.Template(user).substitute(trusted | texts)})
        shown = messages if system.strip() else messages[1:]
        return RenderedPrompt(shown, labels, token, count, self.output, (cut_first, cut_second), cut.prompt)

    def _with_principles(self) -> tuple[str, str]:
        """The template, with a place for principles if there are any."""
        if not self.principles or "principles" in _fields(self.system, "system") + _fields(self.user, "user"):
            return self.system, self.user
        if self.system.strip():
            return "$principles\n" + self.system, self.user
        return self.system, "$principles\n" + self.user

    def capped(self, name: str, response: Response) -> tuple[Canonical, int]:
        """A response as ``max_response_chars`` leaves it, and how many characters of it are missing."""
        canonical = canonical_response(response, name)
        if self.max_response_chars is None:
            return canonical, 0
        text = as_text(canonical)
        gone = max(len(text) - self.max_response_chars, 0)
        return (text[: len(text) - gone] if gone else canonical), gone

    def _shown(self, name: str, response: Response, cut: int) -> tuple[list[tuple[str, ...]], int]:
        """The segments of a response, and how many characters of it they leave out."""
        capped, gone = self.capped(name, response)
        return _shortened(name, capped, cut), gone + cut

    @staticmethod
    def parse(messages: Sequence[Mapping[str, object]]) -> ParsedPrompt:
        """The inverse of :meth:`render`, for any template: the texts and labels of a rendered prompt.

        Raises:
            InputError: ``messages`` is no rendered prompt of this library.
        """
        whole = "\n\n".join(text for message in messages if isinstance(text := message.get("content"), str))
        declared = find_contract(whole)
        if declared is None:
            reject("messages", "no contract paragraph", "a prompt rendered by JudgePrompt")
        output, contract = declared
        token = contract["token"]
        found = re.findall(
            rf"<<<{token}:([\w. -]+)>>>\n(.*?)\n<<<{token}:end>>>(?:\n\[cut: (\d+) characters\])?", whole, re.DOTALL
        )
        middle = re.compile(rf"\n<<<{token}:cut \d+ characters>>>\n")
        texts = assemble((name, "".join(map(restore, middle.split(text)))) for name, text, _ in found)
        if texts.keys() != {"prompt", "first", "second"}:
            reject("messages", f"the texts {sorted(texts)}", "prompt, first and second")
        labels = Labels(contract["win"], contract["loss"], contract["tie"])
        cut = {name: int(gone or 0) for name, _, gone in found}
        lost = (cut.get("first", 0), cut.get("second", 0))
        return ParsedPrompt(texts["prompt"], texts["first"], texts["second"], labels, output, lost)


def _shortened(name: str, value: Canonical, cut: int) -> list[tuple[str, ...]]:
    """The segments of a text: a name and what is shown, or its beginning and its end where ``cut`` characters go."""
    return [(name, *ends(as_text(value), cut))] if cut else list(segments(name, value))


def _fields(template: str, name: str) -> list[str]:
    """The field names of a template in order, repeats included."""
    if "\0" in template:  # an endpoint may end the question there
        reject(f"template {name}", f"NUL at character {template.index(chr(0))}, as UTF-16 text has them", "text")
    found = []
    for match in string.Template.pattern.finditer(template):
        field = match["named"] or match["braced"]
        if field is None and match["escaped"] is None:
            reject(f"template {name}", f"a lone $ at character {match.start()}", "a field, or $$ for a dollar sign")
        if field is not None:
            if field not in _FIELDS:
                reject(f"template {name}", f"the field ${field}", "one of $" + ", $".join(_FIELDS))
            found.append(field)
    return found
