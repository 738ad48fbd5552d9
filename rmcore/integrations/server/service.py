"""What stands behind the routes: one engine, its batches, groups that are being put together, kept answers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from starlette.types import Scope

from rmcore._base import large
from rmcore._base.clock import Clock
from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_prompt, canonical_response, text_length
from rmcore.engine.engine import RewardEngine
from rmcore.engine.group_score import GroupScore
from rmcore.engine.monitor import group_figures
from rmcore.engine.options import check_reliability
from rmcore.integrations.server.assembly import GroupAssembly, MemberResult
from rmcore.integrations.server.batching import BatchScorer, ScoredGroup
from rmcore.integrations.server.guard import Guard, follow
from rmcore.integrations.server.members import prompt_digest
from rmcore.integrations.server.metrics import ServerMetrics
from rmcore.integrations.server.peers import Peers
from rmcore.integrations.server.remote_rm import grouped, prompt_text, response_text
from rmcore.integrations.server.replies import ReplyStore
from rmcore.integrations.server.schema import (
    GroupRequest,
    MemberRequest,
    Message,
    PromptField,
    ResponseField,
    RewardRequest,
    check_encodable,
    group_reply,
    win_rates,
)
from rmcore.integrations.server.settings import ServeSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["RewardService"]


log = logging.getLogger(__name__)

T = TypeVar("T")

_TOLD_S = 10.0
_FEW = 4
"""Groups whose answers are made on the event loop: a millisecond each, and a thread has its price too."""


class RewardService:
    """The verbs of the routes, and their limits.

    Args:
        engine: scores the groups.
        settings: limits and times.
        model: a name for ``/health``.
        clock: of all waits; a seam for tests.
        save_state: called in a thread after each batch: what a crash must not lose is then on disk.
        transport: to the other servers of ``settings.peers``, instead of the network; a seam for tests.
    """

    def __init__(
        self,
        engine: RewardEngine,
        settings: ServeSettings,
        *,
        model: str = "",
        clock: Clock | None = None,
        save_state: Callable[[], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings, self.model = settings, model
        self.peers = Peers(settings, transport)
        if settings.reliability_tau is not None:
            check_reliability(settings.reliability_tau, mode=engine.head.config.mode, design=engine.design)
        self.scorer = BatchScorer(
            engine,
            max_groups=settings.batch_groups,
            max_wait_s=settings.batch_wait_s,
            max_queue=settings.max_queue,
            max_in_flight=settings.batches_in_flight,
            clock=clock,
            observe=self._observe,
            save_state=save_state,
        )
        self.assembly = GroupAssembly(
            self._score_assembled,
            time_limit_s=settings.time_limit_s,
            keep_s=settings.keep_s,
            max_members=settings.max_members,
            doubt_s=0.0 if settings.first_start else settings.time_limit_s,
            clock=clock,
        )
        self.replies = ReplyStore(settings.keep_s, settings.replay_bytes, clock)
        self.guard: Guard | None = None
        self.draining = False
        self.metrics = ServerMetrics(self)

    async def drain(self) -> None:
        """Take nothing new; return when everything accepted has its result, at the latest ``drain_s`` and scoring."""
        self.draining = True
        telling = asyncio.create_task(self._tell_of_drain(), name="rmcore drain told")
        try:
            self.scorer.close()  # open groups are admitted already
            await self.assembly.drain(self.settings.drain_s)
            await self.scorer.drain()
            await self.peers.aclose()
        finally:
            telling.cancel()

    async def _tell_of_drain(self) -> None:
        while True:
            await self.scorer.clock.sleep(_TOLD_S)
            log.warning(
                "draining: %d groups open, %d members waiting, %d groups in the queue, %d batches under way",
                self.assembly.open_groups,
                self.assembly.waiting,
                self.scorer.queued,
                self.scorer.in_flight,
            )

    # -- the routes' verbs -------------------------------------------------------------------------------------------

    async def score_groups(self, requests: list[GroupRequest]) -> list[dict[str, Any]]:
        """``/v1/groups``."""
        if len(requests) > self.settings.max_groups:
            reject("groups", len(requests), f"at most {self.settings.max_groups} in a request")
        scored = await self.scorer.submit(await large.call(self._groups, requests))
        names = [request.id for request in requests]
        return await _beside(len(scored), lambda: [group_reply(*one) for one in zip(scored, names, strict=True)])

    def _groups(self, requests: list[GroupRequest]) -> list[tuple[Canonical, list[Canonical]]]:
        limits = self.settings
        groups: list[tuple[Canonical, list[Canonical]]] = []
        for k, request in enumerate(requests):
            where = f"groups[{k}]." if len(requests) > 1 else ""
            if len(request.responses) > limits.max_responses:
                reject(f"{where}responses", len(request.responses), f"at most {limits.max_responses}")
            responses = [self._response(one, f"{where}responses[{i}]") for i, one in enumerate(request.responses)]
            groups.append((self._prompt(request.prompt, f"{where}prompt"), responses))
        return groups

    def member_key(self, request: MemberRequest) -> tuple[object, ...]:
        """What the members of a group have in common, for :class:`~rmcore.integrations.server.peers.Peers`."""
        if request.group_id is not None:
            return request.group_id, request.attempt
        return "content", prompt_digest(self._prompt(request.prompt, "prompt"))

    async def join(self, request: MemberRequest, scope: Scope | None = None) -> MemberResult:
        """``/v1/rendezvous``; by ``scope`` an answer by content that does not go out is known for lost."""
        if request.k > self.settings.max_responses:
            reject("k", request.k, f"at most {self.settings.max_responses}")
        if (request.group_id is None) != (request.slot is None):
            reject("group_id, slot", "one without the other", "both, or neither for a group by its prompt")
        if request.slot is not None and request.slot >= request.k:
            reject("slot", request.slot, f"below k = {request.k}")
        response = self._response(request.response, "response")
        prompt = self._prompt(request.prompt, "prompt")
        if request.group_id is None or request.slot is None:
            result = await self.assembly.join_by_content(prompt, response, request.k)
            if scope is not None:
                follow(scope, result)
            return result
        return await self.assembly.join(
            request.group_id, request.slot, request.k, prompt, response, attempt=request.attempt
        )

    async def rewards(
        self, body: RewardRequest, scope: Scope
    ) -> tuple[list[float], list[float], list[int | None], dict[str, float]]:
        """``/get_reward``: rewards and win rates, NaN where there is no preference; the head's versions; and, for a
        single response, what its group says of itself, which OpenRLHF averages over a step's samples.
        """
        if len(body.query) != len(body.prompts):
            reject("prompts", len(body.prompts), f"{len(body.query)}, one a query")
        count, size = len(body.query), self.settings.group_size
        if count > self.settings.max_groups * self.settings.max_responses:
            reject("query", count, f"at most {self.settings.max_groups * self.settings.max_responses}")
        for name, texts in (("query", body.query), ("prompts", body.prompts)):
            for k, text in enumerate(texts):
                self._check_length(text, f"{name}[{k}]", times=2)
        responses = [
            response_text(query, prompt, self.settings.end_tokens, f"query[{k}]")
            for k, (query, prompt) in enumerate(zip(body.query, body.prompts, strict=True))
        ]
        prompts = [prompt_text(prompt, self.settings, f"prompts[{k}]") for k, prompt in enumerate(body.prompts)]
        if count == 0:
            return [], [], [], {}
        if count == 1 and size is not None:
            result = await self.assembly.join_by_content(prompts[0], responses[0], size)
            follow(scope, result)
            if len(result.slots) == 1:
                return [math.nan], [math.nan], [None], {}
            group, i = result.group, result.index
            own, win, figures = await result.worked_out.get(
                "rewards", lambda: (*self._rewards_of(group), group_figures(group)), group.size
            )
            return [own[i]], [win[i]], [group.head_version], figures
        groups = grouped(body.prompts, size)
        for places in groups:
            if len(places) > self.settings.max_responses:
                reject("prompts", f"{len(places)} equal ones", f"at most {self.settings.max_responses}")
        scored = await self.scorer.submit([(prompts[p[0]], [responses[k] for k in p]) for p in groups])
        rewards, rates, versions = [math.nan] * count, [math.nan] * count, list[int | None]([None] * count)
        found = await _beside(len(scored), lambda: [self._rewards_of(one.group) for one in scored])
        for places, one, values in zip(groups, scored, found, strict=True):
            for k, reward, rate in zip(places, *values, strict=True):
                rewards[k], rates[k], versions[k] = reward, rate, one.group.head_version
        return rewards, rates, versions, {}

    # -- inside ------------------------------------------------------------------------------------------------------

    def _rewards_of(self, group: GroupScore) -> tuple[list[float], list[float]]:
        """Rewards and win rates. A response of which the model's inputs tell nothing gets 0 and ½: its advantage is 0.

        OpenRLHF has no word for "no reward", and the run would end without one. Its siblings' rewards are made for that
        0, so their advantages are what they would be without it. Where scoring failed there is none: NaN.
        """
        tau = self.settings.reliability_tau
        rewards = group.rewards_for(self.settings.baseline, missing_as_zero=True, tau=tau)
        rates = torch.tensor(win_rates(group), dtype=torch.float64)
        silent = torch.zeros(group.size, dtype=torch.bool)
        for decision in group.decisions:
            if decision.no_signal:
                silent[[decision.i, decision.j]] = True
        neutral = silent & rewards.isnan()
        if bool(neutral.any()):
            log.warning("%d of %d responses carry no signal: their advantage is 0", int(neutral.sum()), group.size)
        return rewards.masked_fill(neutral, 0.0).tolist(), rates.masked_fill(neutral, 0.5).tolist()

    async def _score_assembled(
        self, prompt: Prompt, responses: Sequence[Response], *, principle: str = ""
    ) -> GroupScore:
        return await self.scorer.score(prompt, responses, principle=principle, admitted=True)

    def _prompt(self, prompt: PromptField, where: str) -> Canonical:
        canonical = canonical_prompt(prompt if isinstance(prompt, str) else [_as_sent(one) for one in prompt], where)
        self._check_length(canonical, where)
        return canonical

    def _response(self, response: ResponseField, where: str) -> Canonical:
        if isinstance(response, str):
            canonical: Canonical = response
        elif isinstance(response, list):
            canonical = canonical_response([_as_sent(message) for message in response], where)
        else:
            canonical = canonical_response(_as_sent(response), where)
        self._check_length(canonical, where)
        return canonical

    def _check_length(self, text: Canonical, where: str, times: int = 1) -> None:
        most, length = times * self.settings.max_chars, text_length(text)
        if length > most:
            reject(where, f"{length} characters", f"at most {most}")

    def _observe(self, scored: Sequence[ScoredGroup]) -> None:
        self.metrics.batch_groups.observe(len(scored))
        self.metrics.batch_seconds.observe(scored[0].scoring_s)
        for one in scored:
            self.metrics.wait_seconds.observe(one.waited_s)


def _as_sent(message: Message) -> dict[str, Any]:
    """A message's fields as they came, the unknown ones too."""
    fields = message.model_dump(exclude_unset=True)
    check_encodable(fields)
    return fields


async def _beside(groups: int, work: Callable[[], T]) -> T:
    """``work()`` on so many groups, beside the event loop unless they are few."""
    return work() if groups <= _FEW else await asyncio.to_thread(work)
