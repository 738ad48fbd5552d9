"""A critic behind an OpenAI-compatible endpoint: the judge's client, limits, store and defences, another question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rmcore._base.errors import JudgeError
from rmcore._base.loop import run_sync
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.chat import ChatJudge, _Call
from rmcore.judge.critics.critique import MAX_CHARS, Critique, bounded, junk_reason
from rmcore.judge.keys import CRITIC_VERSION
from rmcore.judge.question.contract import MATERIAL
from rmcore.judge.question.prompt import JudgePrompt, Output

if TYPE_CHECKING:
    from types import TracebackType

    from rmcore.judge.store.store import VerdictStore

__all__ = ["ChatCritic", "CriticPrompt"]

_SYSTEM = """\
You assess a response to a prompt for its author, who wants to know what is right and what is wrong with it.

Say in a few sentences: does it do what the prompt asks? Are its statements, reasoning and code right? What is missing,
and what is there that should not be? Quote what you speak of. Do not answer the prompt yourself and give no score.

$contract
"""
_USER = """\
The prompt:
$prompt

The response:
$first

Write your assessment of the response.
"""


@dataclass(frozen=True)
class CriticPrompt(JudgePrompt):
    """A template for a critic's question: as a judge's (:class:`JudgePrompt`), with ``$prompt`` and ``$first``, the
    response, and a contract that says what is material and asks for no verdict.
    """

    system: str = _SYSTEM
    user: str = _USER
    untrusted: ClassVar[tuple[str, ...]] = ("prompt", "first")
    contracts: ClassVar[Mapping[Output, str]] = {"text": MATERIAL.rstrip("\n"), "json_schema": MATERIAL.rstrip("\n")}

    @property
    def version(self) -> str:
        """As a judge's, behind :data:`CRITIC_VERSION`."""
        return CRITIC_VERSION + super().version


class _Asker(ChatJudge):
    """A judge that is shown one response, and never the other way round."""

    async def _questions(self, index: int, pair: Pair) -> list[_Call]:
        return [_Call(index, False)]

    def _report(self, verdicts: list[Verdict], answers: Any) -> None:
        """A critic gives no verdicts: what is amiss is told by its critiques."""


class ChatCritic:
    """Asks a chat model what is right and wrong with a response.

    Everything about the endpoint is :class:`~rmcore.judge.ChatJudge`'s: concurrency and rate limits, retries, breaker,
    deadline, context cut in the middle, prices, the store (a critique is bought once, equal questions share a call, a
    run that was killed goes on), markers that no response can write, control sequences broken up.

    Args:
        base_url: as of a judge; either this or ``complete``, as are the next two.
        model: the model's name there.
        api_key_env: the environment variable that holds the key.
        samples: critiques a response. More than one wants a temperature: 1.0 unless one is given.
        prompt: the question's template.
        max_chars: longest critique kept, in characters; what is left out is counted.
        judge_id: the name the store files critiques under. Default: as of a judge.
        **options: further arguments of :class:`~rmcore.judge.ChatJudge`: ``client``, ``complete``, ``store``,
            ``prices``, ``temperature``, ``max_tokens`` (default 512), ``deadline_s``, ``extra_body``, ...

    Raises:
        JudgeError: an argument is unusable, ``samples`` is not positive, or several are asked for at temperature 0.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str = "",
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        samples: int = 1,
        prompt: CriticPrompt | None = None,
        max_chars: int = MAX_CHARS,
        judge_id: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise JudgeError(f"samples: got {samples!r:.40}, expected a number, at least 1")
        if samples > 1:
            options.setdefault("temperature", 1.0)
            if options["temperature"] == 0:
                raise JudgeError(
                    f"temperature: got 0 for {samples} samples, expected one above 0, or they are all equal"
                )
        for name in ("orders", "soft", "output", "constitution", "rules"):
            if name in options:
                raise JudgeError(f"{name}: got one, expected none: a critic gives no verdict")
        if not options.get("max_completion_tokens"):
            options.setdefault("max_tokens", 512)
        bounded("", max_chars)
        self.samples, self.max_chars = samples, max_chars
        self._askers: list[_Asker] = []
        for k in range(samples):
            # The sample is in the name that the store files it under, and nothing of it is sent: a seed is refused by
            # some endpoints.
            first = self._askers[0] if self._askers else None
            filed: str | None = judge_id if first is None else first.judge_id
            own = dict(options)
            if first is not None and first.store is not None:
                own["store"] = first.store
            asker = _Asker(
                base_url,
                model,
                api_key_env,
                prompt=prompt or CriticPrompt(),
                rules=False,
                orders="one",
                judge_id=f"{filed}#{k}" if k and filed else filed,
                **own,
            )
            if first is not None:
                asker.client, asker._dialect, asker.context = first.client, first._dialect, first.context
            self._askers.append(asker)

    def __repr__(self) -> str:
        return f"ChatCritic({self._askers[0]!r}, samples={self.samples})"

    @property
    def client(self) -> Any:
        """The client that all samples share."""
        return self._askers[0].client

    @property
    def store(self) -> VerdictStore | None:
        """The store that all samples share."""
        return self._askers[0].store

    async def critiques(self, items: Sequence[tuple[Prompt, Response]]) -> list[tuple[Critique, ...]]:
        """``samples`` critiques of each (prompt, response), in order; one that failed says why in ``reason``."""
        pairs = [Pair(prompt, response, "") for prompt, response in items]
        columns = [await asker.judge(pairs) for asker in self._askers]
        return [
            tuple(self._critique(verdict, response) for verdict in row)
            for row, (_, response) in zip(zip(*columns, strict=True), items, strict=True)
        ]

    def critiques_sync(self, items: Sequence[tuple[Prompt, Response]]) -> list[tuple[Critique, ...]]:
        """:meth:`critiques` for synchronous code."""
        return run_sync(self.critiques(items))

    async def aclose(self) -> None:
        """Close all connections, and the store if it was given as a path."""
        await self._askers[0].aclose()

    def close(self) -> None:
        """:meth:`aclose` for synchronous code."""
        run_sync(self.aclose())

    async def __aenter__(self) -> ChatCritic:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _critique(self, verdict: Verdict, response: Response) -> Critique:
        # No label is told, so a reply is "unparsable" as a verdict exactly where it is a whole text.
        text, cut = bounded(verdict.critique, self.max_chars)
        whole = verdict.reason == "unparsable"
        if not whole and verdict.reason != "length":
            return Critique("", verdict.reason or "no_content", model=verdict.judge, usage=verdict.usage)
        junk = junk_reason(text, response) if text else "empty"
        reason = "" if whole and text else (verdict.reason if not whole else "no_content")
        return Critique(text, reason, junk, cut, verdict.judge, verdict.usage)
