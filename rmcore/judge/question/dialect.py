"""How one endpoint is asked: the request's fields, and what to leave out where the endpoint refuses it.

Endpoints that call themselves compatible differ. A reasoning model refuses ``temperature`` or ``logprobs``, a newer one
wants ``max_completion_tokens`` for ``max_tokens``, a chat template knows no system role, a server without structured
output refuses ``response_format`` or answers it with nothing. None of that must cost a pair: the same question is put
again without what was refused, and once that has worked the judge leaves it out for good. Each such change is logged
once and counted.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from rmcore._base import large
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import JudgeUsage, Verdict
from rmcore.judge.client.reply import Completion
from rmcore.judge.question.cut import NO_CUT, Cut
from rmcore.judge.question.prompt import JudgePrompt, Output, RandomSource, RenderedPrompt
from rmcore.judge.question.soft import MIN_MASS, Soft, soft_preference
from rmcore.judge.question.verdict import Parsed, parse_verdict

__all__ = ["Answered", "Complete", "Dialect", "one_call"]

_logger = logging.getLogger(__name__)
_LOCK = threading.Lock()  # of every dialect's counts and terms: held for an assignment, never over a call

_REFUSING = frozenset({"http_400", "http_422", "http_501", "no_choices"})  # the last: status 200 around an error
_REFUSED = re.compile(
    r"unsupported|not support|n't support|unrecogni[sz]ed|unknown|unexpected|incompatible|deprecated|only the default"
    r"|not (?:permitted|allowed|available|enabled|implemented|compatible)|cannot be used|extra (?:inputs|fields)"
    r"|invalid (?:parameter|argument|schema|response|type|value for)",
    re.IGNORECASE,
)
# What may be left out, by the words that name it in a refusal. Nothing else is: a seed or a field of the caller's own
# that is refused is the caller's to mend.
_NAMED = {
    "response_format": re.compile(
        r"\b(?:response[ _.]?format|json_schema|structured[ _]outputs?|json[ _]mode)\b", re.I
    ),
    "logprobs": re.compile(r"\b(?:top_)?log_?probs\b|\blog probabilities\b", re.I),
    "temperature": re.compile(r"\btemperature\b", re.I),
    "max_tokens": re.compile(r"\bmax_tokens\b", re.I),
    "max_completion_tokens": re.compile(r"\bmax_completion_tokens\b", re.I),
}
# Of messages, not of fields, so it has words of its own: chat templates without a system role say them in many ways.
_NO_SYSTEM = re.compile(
    r"system[ _]?(?:role|message|prompt|instruction)s?\b.{0,60}?(?:not |n't |un)(?:support|allow|permit|enabl|accept)"
    r"|(?:unsupported|unknown|invalid|unexpected|does(?: not|n't) support).{0,60}?\b(?:system|developer)\b"
    r"|(?:system|developer)\W+(?:role |instruction )?(?:is |are )?(?:not |un)(?:support|allow|permit|enabl|accept)"
    r"|only user(?:,| and) assistant\b.{0,20}roles|roles must alternate user/assistant",
    re.IGNORECASE | re.DOTALL,
)
_SYSTEM = "system_role"
_LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


class Complete(Protocol):
    """:meth:`ChatClient.complete <rmcore.judge.client.ChatClient.complete>`, or whatever stands in for it."""

    def __call__(self, payload: Mapping[str, object], *, deadline: float | None = None) -> Awaitable[Completion]:
        """Post ``payload``; never raises because of the network or the server."""
        ...


@dataclass(frozen=True, slots=True)
class Answered:
    """One question and what came of it.

    Attributes:
        question: as it was last put, with the labels that its reply is read by.
        completion: the last reply; its usage is that of all requests for this question, counted as one call.
        parsed: the reply as read, ``None`` if there was none.
        soft: the soft verdict, if one was asked for and there was a hard one.
    """

    question: RenderedPrompt
    completion: Completion
    parsed: Parsed | None = None
    soft: Soft | None = None

    def verdict(self, judge: str = "") -> Verdict:
        """The verdict from the side of the response **shown first**.

        ``reason`` of a verdict that is there notes what is special about it: ``cut:N`` (N characters of the texts
        were not shown), ``hard:<why>`` (a soft verdict was asked for and could not be had), ``weak:mass`` (it counts
        for less, since the judge was about to write something else).
        """
        usage, parsed = self.completion.usage, self.parsed
        if parsed is None or parsed.outcome is None:
            reason = self.completion.reason if parsed is None else parsed.reason
            return replace(Verdict.none(reason, usage, parsed.critique if parsed else ""), judge=judge)
        gone = sum(self.question.cut) + self.question.cut_prompt
        notes = [f"cut:{gone}"] if gone else []
        if self.soft is not None and self.soft.preference is None:
            notes.append(f"hard:{self.soft.reason}")
        elif self.soft is not None and self.soft.reason:
            notes.append(f"weak:{self.soft.reason}")
        hard = Verdict.of(parsed.outcome, reason="; ".join(notes), critique=parsed.critique, usage=usage, judge=judge)
        if self.soft is None or self.soft.preference is None:
            return hard
        return replace(hard, preference=self.soft.preference)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What requests hold besides model and messages."""

    output: Output
    parameters: Mapping[str, object]
    system: bool = True  # a message of its own; otherwise its text stands before the question
    given_up: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        if name == _SYSTEM:
            return self.system
        return self.output == "json_schema" if name == "response_format" else name in self.parameters

    def without(self, name: str) -> _Terms:
        """The same without ``name``; a limit on tokens is not dropped but goes by its other name."""
        parameters, output, system = dict(self.parameters), self.output, self.system
        if name == "response_format":
            output = "text"
        elif name == _SYSTEM:
            system = False
        elif name == "logprobs":
            parameters = {key: value for key, value in parameters.items() if key not in ("logprobs", "top_logprobs")}
        else:
            value = parameters.pop(name)
            if name in _LIMITS:
                parameters.setdefault(_LIMITS[name], value)
        return _Terms(output, parameters, system, self.given_up | {name})

    def limited(self, tokens: int | None) -> dict[str, object]:
        """The parameters, with no limit on tokens above ``tokens``."""
        parameters = dict(self.parameters)
        for name in _LIMITS:
            given = parameters.get(name)
            if tokens is not None and isinstance(given, int) and given > tokens:
                parameters[name] = tokens
        return parameters

    def messages(self, question: RenderedPrompt) -> list[dict[str, str]]:
        """The question's messages in the roles that the endpoint takes."""
        if self.system or len(question.messages) < 2:
            return question.messages
        # The contract stays before the texts that it speaks of, in whichever message it stood.
        return [{"role": "user", "content": "\n\n".join(message["content"] for message in question.messages)}]


@dataclass
class Dialect:
    """Puts questions to one endpoint in the form it takes.

    Args:
        model: its name there.
        prompt: the template; its ``output`` is the form that is asked for at first.
        parameters: further fields of the request.
        soft: read soft verdicts where they can be had; ``parameters`` must ask for the log-probabilities.
        random_source: draws markers and labels.
        min_mass: of soft verdicts, as :func:`~rmcore.judge.question.soft.soft_preference` takes it.

    Attributes:
        dropped: what the endpoint turned out not to take, with its own words for it.
        counts: ``sanitised`` (control sequences broken up), ``cut`` (questions with a text cut), ``text_instead``
            (questions put again as plain text), ``refused:<field>`` (requests refused for it), ``soft`` (soft
            verdicts), ``hard:<why>`` (verdicts that could not be soft).
    """

    model: str
    prompt: JudgePrompt
    parameters: Mapping[str, object] = field(default_factory=dict)
    soft: bool = False
    random_source: RandomSource | None = None
    min_mass: float = MIN_MASS
    dropped: dict[str, str] = field(default_factory=dict, init=False)
    counts: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self._terms = _Terms(self.prompt.output, dict(self.parameters), system=bool(self.prompt.system.strip()))
        self._templates: dict[Output, JudgePrompt] = {
            self.prompt.output: self.prompt,
            "text": replace(self.prompt, output="text"),
        }
        self._json_works = False

    async def ask(
        self,
        complete: Complete,
        prompt: Prompt,
        first: Response,
        second: Response,
        *,
        deadline: float | None = None,
        cut: Cut = NO_CUT,
        answer_tokens: int | None = None,
        principles: tuple[str, ...] = (),
    ) -> Answered:
        """Which is better, ``first`` being shown first? Put again, within ``deadline``, while a refusal can be met.

        Args:
            complete: puts a request to the endpoint.
            prompt: what the responses answer.
            first: the response shown first.
            second: the other one.
            deadline: on the scale of the client's clock.
            cut: what is not shown of the texts.
            answer_tokens: a limit on the answer's tokens that holds where the one among the parameters is larger.
            principles: what this question is judged by besides.

        Raises:
            InputError: the texts are refused by :meth:`JudgePrompt.render`.
        """
        terms, usage = self._terms, JudgeUsage()
        given_up: dict[str, str] = {}
        while True:
            template = self._templates[terms.output]
            if principles:
                template = replace(template, principles=principles)
            question = await large.call(template.render, prompt, first, second, self.random_source, cut)
            parameters = terms.limited(answer_tokens)
            payload: dict[str, object] = {"model": self.model, "messages": terms.messages(question), **parameters}
            if terms.output == "json_schema":
                payload["response_format"] = question.response_format()
            reply = await complete(payload, deadline=deadline)
            usage = one_call(usage, reply.usage)
            parsed = None if reply.choice is None else await large.call(parse_verdict, reply.choice, question.labels)
            name = _refused(terms, reply, parsed)
            if name is None:
                break
            given_up[name] = reply.detail or (parsed.reason if parsed else "")
            self._count("text_instead" if name == "response_format" else f"refused:{name}")
            terms = terms.without(name)
        if parsed is not None:
            self._learn(given_up, parsed, terms)
        soft = None
        if parsed is not None and parsed.outcome is not None and self.soft:
            soft = await large.call(soft_preference, reply.choice, question.labels, parsed.outcome, self.min_mass)
            self._count("soft" if soft.preference is not None else f"hard:{soft.reason}")
        self._count("sanitised", question.sanitised)
        self._count("cut", int(any(question.cut) or question.cut_prompt > 0))
        return Answered(question, replace(reply, usage=usage), parsed, soft)

    def _learn(self, given_up: Mapping[str, str], parsed: Parsed, terms: _Terms) -> None:
        """Leave out for good what this question had to do without, now that it was answered."""
        answered = parsed.reason != "no_content"
        for name, why in given_up.items():
            # One empty reply from an endpoint that has answered in JSON before is an accident, not a limitation.
            lasting = why != "no_content" or (answered and not self._json_works)
            with _LOCK:
                new = lasting and self._terms.has(name) and name not in self._terms.given_up
                if new:
                    self._terms = self._terms.without(name)
                    self.dropped[name] = why
            if new:
                instead = f", {_LIMITS[name]} instead" if name in _LIMITS else ""
                instead = ", its text stands before the question instead" if name == _SYSTEM else instead
                _logger.warning(
                    "judge %s: does not take %s (%s); left out from now on%s", self.model, name, why, instead
                )
        if terms.output == "json_schema" and answered:
            self._json_works = True

    def tally(self) -> Counter[str]:
        """A copy of the counts."""
        with _LOCK:
            return Counter(self.counts)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        with _LOCK:
            self.counts.update({name: number for name, number in counts.items() if number})

    def _count(self, name: str, number: int = 1) -> None:
        self.add({name: number})


def _refused(terms: _Terms, reply: Completion, parsed: Parsed | None) -> str | None:
    """What to do without so that the endpoint answers, ``None`` if nothing would help."""
    if parsed is not None:
        empty = terms.output == "json_schema" and parsed.reason == "no_content"
        return "response_format" if empty else None
    if reply.overflow is not None and reply.overflow.stated:
        return None  # the length is the trouble, whatever else its words name
    # Servers that trip over the template itself say so with 500.
    if terms.system and reply.reason in _REFUSING | {"http_500"} and _NO_SYSTEM.search(reply.detail):
        return _SYSTEM
    if reply.reason not in _REFUSING or not _REFUSED.search(reply.detail):
        return None
    for name, named in _NAMED.items():
        if terms.has(name) and named.search(reply.detail):
            other = _LIMITS.get(name)
            if other is None or other not in terms.given_up:
                return name
    return None


def one_call(before: JudgeUsage, last: JudgeUsage) -> JudgeUsage:
    """Usage of one question over several requests: one call, however often it was put."""
    total = before + last
    if total.calls <= 1:
        return total
    latency = sum(total.latencies_s)
    return replace(total, calls=1, latencies_s=(latency,), unpriced_calls=min(total.unpriced_calls, 1))
