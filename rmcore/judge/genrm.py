"""A generative reward model as a judge: NeMo-Gym's roles and scores, and the limits and store of every judge."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias

from rmcore._base import large
from rmcore._base.client.options import ClientOptions
from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import Verdict
from rmcore.judge.chat import ChatJudge
from rmcore.judge.client.completions import CompletionFunction
from rmcore.judge.question.cut import Cut
from rmcore.judge.question.genrm import GENRM_VERSION, genrm_messages, read_scores
from rmcore.judge.store.prices import price_call
from rmcore.judge.store.records import Reply, reply_text

__all__ = ["GenRMJudge", "JudgeKind"]

JudgeKind: TypeAlias = Literal["chat", "genrm"]
"""How a judge is asked: in words, or as a generative reward model."""


class GenRMJudge(ChatJudge):
    """Asks a generative reward model such as Qwen3-Nemotron-235B-A22B-GenRM (:mod:`rmcore.judge.question.genrm`).

    The verdict's preference is (score_1 − score_2)/4, of equal scores (3.5 − ranking)/10. Everything else (orders,
    limits, retries, deadline, store, prices, long pairs) is as with :class:`~rmcore.judge.chat.ChatJudge`; what that
    has for questions in words (``prompt``, ``output``, ``soft``) is not there.

    Args:
        base_url, model, api_key_env, complete, client: as of ``ChatJudge``.
        principle: what to judge by, for models whose template knows the role; a ``constitution`` draws one a question.
        orders: ``"one"`` (what NeMo-Gym asks) by default; ``"both"`` averages out where a response stands.
        options: of ``ChatJudge``, by name.

    Raises:
        JudgeError, InputError: as of ``ChatJudge``.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str = "",
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        complete: CompletionFunction | None = None,
        client: ClientOptions | None = None,
        principle: str = "",
        orders: Any = "one",
        **options: Any,
    ) -> None:
        unfit = sorted(options.keys() & {"prompt", "output", "soft", "top_logprobs"})
        if unfit:
            reject(", ".join(unfit), "given", "none: a generative reward model has a form of its own")
        if not isinstance(principle, str):
            reject("principle", type(principle).__name__, "a text")
        super().__init__(base_url, model, api_key_env, complete=complete, client=client, orders=orders, **options)
        self.principle = principle

    def _version(self, principles: tuple[str, ...]) -> str:
        principle = "\n".join(principles) or self.principle
        said = "\0".join([principle, *self.prompt.special_tokens])
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12] if said else ""
        return f"{GENRM_VERSION}:{digest}" if digest else GENRM_VERSION

    async def _call(
        self,
        prompt: Prompt,
        first: Response,
        second: Response,
        deadline: float | None,
        cut: Cut,
        answer_tokens: int | None,
        principles: tuple[str, ...],
    ) -> Reply:
        principle = "\n".join(principles) or self.principle
        messages, broken = await large.call(
            genrm_messages, prompt, first, second, principle, cut, self.prompt.special_tokens
        )
        payload = {"model": self.model, "messages": messages, **self._limited(answer_tokens)}
        reply = await self.client.complete(payload, deadline=deadline)
        answered = self._answered(reply.model)
        scores, reason, said = None, reply.reason, ""
        if reply.choice is not None:
            scores, reason, said = await large.call(read_scores, reply.choice)
        usage = price_call(self.prices, reply.usage, self.model, reply.reason, reply.model)
        critique = self._without_key(said)
        gone = cut.prompt + cut.first + cut.second
        if scores is None:
            verdict = Verdict(None, reason, critique=critique, usage=usage, judge=answered)
        else:
            note = f"cut:{gone}" if gone else ""
            verdict = Verdict(scores.preference, note, critique=critique, usage=usage, judge=answered)
        return Reply(
            self.context.cut_off(verdict, answer_tokens),
            replied=reply.choice is not None and reason != "unfinished",
            text=await large.call(self._without_key, await large.call(reply_text, reply.choice)),
            sanitised=broken,
            detail=reply.detail,
            model=reply.model,
            fingerprint=reply.fingerprint,
            currency="" if self.prices is None else self.prices.currency,
            overflow=reply.overflow,
        )

    def _limited(self, tokens: int | None) -> dict[str, object]:
        """The parameters, with no limit on tokens above ``tokens``."""
        parameters = dict(self._parameters)
        for name in ("max_tokens", "max_completion_tokens"):
            given = parameters.get(name)
            if tokens is not None and isinstance(given, int) and given > tokens:
                parameters[name] = tokens
        return parameters
