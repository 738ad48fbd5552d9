"""NeMo-Gym's ``genrm_compare`` resources server, spoken by a group server: ``rmcore serve --nemo-gym``.

    POST /compare       a conversation and N responses → a reward each, every comparison, and what was saved
    POST /verify        one rollout of a cohort; waits for its siblings and returns its reward
    POST /seed_session, /close_session, /aggregate_metrics    what agents of NeMo-Gym call around it

Only pairs that the router is unsure of go to the generative reward model behind it; the others have the reward model's
own preference. A reward is on GenRM's scale from 1 to 5: 1 + 4 · (mean probability of beating a sibling), so group
means and differences are what a trainer of NeMo-RL expects; and what ``gym_bonuses`` add for length and style. A
request may have a ``principle`` of its own, by which the GenRM judges its pairs.

Each comparison is told as ``score_1``, ``score_2`` (3 ± 2J) and ``ranking``, with ``decided_by`` and, where the GenRM
gave no verdict, ``reason``: a reply that cannot be read leaves the reward model's preference and is counted, and never
becomes 3.0 and 3.5.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from rmcore._base import large
from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, canonical_prompt
from rmcore.engine.group_score import GroupScore
from rmcore.integrations.server.guard import follow
from rmcore.integrations.server.gym_bonuses import Shape
from rmcore.integrations.server.members import prompt_digest
from rmcore.integrations.server.schema import check_encodable, error_response, json_response, win_rates
from rmcore.integrations.server.service import RewardService
from rmcore.judge.base import takes_principles
from rmcore.judge.question.genrm import scores_of

_MIDDLE = 3.0

__all__ = ["CompareRequest", "VerifyRequest", "add_nemo_gym_routes", "conversation"]


class CompareRequest(BaseModel):
    """A conversation and the responses to compare, as objects of OpenAI's Responses API."""

    model_config = ConfigDict(extra="allow")
    conversation_history: list[dict[str, Any]] = Field(min_length=1)
    response_objs: list[dict[str, Any]]
    principle: str | None = None


class VerifyRequest(BaseModel):
    """One rollout. What else it holds comes back in the reply."""

    model_config = ConfigDict(extra="allow")
    responses_create_params: dict[str, Any]
    response: dict[str, Any]
    principle: str | None = None
    task_index: int | None = Field(default=None, alias="_ng_task_index")
    rollout_index: int | None = Field(default=None, alias="_ng_rollout_index")
    group_id: str | None = Field(default=None, alias="_ng_group_id")
    group_attempt: int = Field(default=0, alias="_ng_group_attempt", ge=0)


class AggregateRequest(BaseModel):
    """Verified rollouts of a whole run."""

    model_config = ConfigDict(extra="allow")
    verify_responses: list[dict[str, Any]]


def add_nemo_gym_routes(app: FastAPI, service: RewardService) -> None:
    """Add the routes to a group server's application."""

    @app.post("/compare")
    async def compare(body: CompareRequest) -> Response:
        return await _compare(service, body)

    @app.post("/verify")
    async def verify(body: VerifyRequest, request: Request) -> Response:
        return await _verify(service, body, request)

    @app.post("/seed_session")
    async def seed_session() -> Response:
        return json_response({})

    @app.post("/close_session")
    async def close_session() -> Response:
        return json_response({})

    @app.post("/aggregate_metrics")
    async def aggregate_metrics(body: AggregateRequest) -> Response:
        counted = [one for one in body.verify_responses if not one.get("mask_sample")]
        rewards = [float(one["reward"]) for one in counted if isinstance(one.get("reward"), (int, float))]
        metrics: dict[str, float] = {"masked": float(len(body.verify_responses) - len(counted))}
        if rewards:
            metrics |= {"mean/reward": statistics.fmean(rewards), "std/reward": statistics.pstdev(rewards)}
        return json_response({"group_level_metrics": [], "agent_metrics": metrics, "key_metrics": metrics})


async def _compare(service: RewardService, body: CompareRequest) -> Response:
    """Rewards of one group."""
    principle = _principle(service, body.principle)
    if not body.response_objs:
        return json_response({"rewards": [], "comparison_results": [], "metrics": {}})
    prompt = await large.call(conversation, body.conversation_history)
    responses = [_output_text(one, f"response_objs[{k}]") for k, one in enumerate(body.response_objs)]
    shapes = [_shape(service, *both) for both in zip(body.response_objs, responses, strict=True)]
    if len(responses) > service.settings.max_responses:
        reject("response_objs", len(responses), f"at most {service.settings.max_responses}")
    group = await service.scorer.score(prompt, responses, principle=principle)
    rewards = _rewards(service, group, shapes)
    silent = [k for k, reward in enumerate(rewards) if not math.isfinite(reward)]
    if silent and len(rewards) > 1:
        return error_response(503, "no_preference", f"no preference is known for responses {silent}")
    if silent:
        rewards = [_MIDDLE]  # one response, and nobody to compare it with
    return json_response({"rewards": rewards, "comparison_results": _comparisons(group), "metrics": _metrics(group)})


async def _verify(service: RewardService, body: VerifyRequest, request: Request) -> Response:
    """The reward of one rollout, when its siblings are there."""
    principle = _principle(service, body.principle)
    size = service.settings.group_size
    if size is None:
        reject("group size", "none", "rmcore serve --group-size N, the rollouts of a prompt")
    prompt = await large.call(conversation, body.responses_create_params.get("input"))
    response = _output_text(body.response, "response")
    # What of: a name for the group, or the task's index, which comes again in every epoch, and the prompt.
    about: dict[str, Any] = {"principle": principle, "note": _shape(service, body.response, response)}
    by_name = body.group_id is not None and body.rollout_index is not None
    key = (body.group_id, body.group_attempt) if by_name else (prompt_digest(prompt),)
    if (answer := await service.peers.answer(request, "nemo-gym", *key)) is not None:
        return answer
    if body.group_id is not None and body.rollout_index is not None:
        if not 0 <= body.rollout_index < size:
            reject("_ng_rollout_index", body.rollout_index, f"from 0 to {size - 1}")
        name = ("nemo-gym", body.group_id)
        result = await service.assembly.join(
            name, body.rollout_index, size, prompt, response, attempt=body.group_attempt, **about
        )
    else:
        result = await service.assembly.join_by_content(prompt, response, size, kin=body.task_index, **about)
        follow(request.scope, result)
    group, notes = result.group, result.notes
    rewards, metrics = await result.worked_out.get(
        "gym", lambda: (_rewards(service, group, notes), _metrics(group)), group.size
    )
    reward = rewards[result.index]
    told: dict[str, Any] = {"reward": reward, "mask_sample": False, "genrm": metrics}
    if body.group_id is not None:
        told["_ng_group_attempt"] = body.group_attempt
    if not math.isfinite(reward):
        # A number must stand there; the flag says that it is none.
        why = "no preference is known for this response"
        told |= {"reward": 0.0, "mask_sample": True, "failure_kind": "rmcore:no_preference", "failure_reason": why}
    return json_response(body.model_dump(by_alias=True, exclude_unset=True) | told)


def _principle(service: RewardService, given: str | None) -> str:
    """What a request's pairs are judged by; empty for the judge's own principle, which it may name, too."""
    judge = service.scorer.engine.judge
    if not given or given == getattr(judge, "principle", ""):
        return ""
    if not takes_principles(judge):
        reject("principle", "one of the request's own", "none: there is no judge here that takes one with a pair")
    if len(given) > service.settings.max_chars:
        reject("principle", f"{len(given)} characters", f"at most {service.settings.max_chars}")
    check_encodable(given)
    return given


def _shape(service: RewardService, response: Mapping[str, Any], answer: str) -> Shape | None:
    """What bonuses depend on, where there are any."""
    if not service.settings.gym_bonuses:
        return None
    return Shape.of(_reasoning(response), answer)


def _reasoning(response: Mapping[str, Any]) -> str:
    """The summaries of its reasoning items."""
    items = [one for one in response["output"] if isinstance(one, Mapping) and one.get("type") == "reasoning"]
    parts = [part for item in items for part in (item.get("summary") or []) if isinstance(part, Mapping)]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def conversation(given: Any) -> Canonical:
    """The messages of a Responses API ``input`` (a text, or items), without what is none."""
    if isinstance(given, str):
        return canonical_prompt(given)
    messages = []
    for k, item in enumerate(given if isinstance(given, list) else []):
        if not isinstance(item, Mapping) or item.get("type", "message") != "message":
            continue
        messages.append(
            {"role": item.get("role", "user"), "content": _text(item.get("content"), f"input[{k}].content")}
        )
    if not messages:
        reject("input", "no message", "a text, or messages with role and content")
    return canonical_prompt(messages)


def _output_text(response: Mapping[str, Any], where: str) -> str:
    """The output texts of a Responses API object; reasoning and tool calls are not shown to a judge."""
    output = response.get("output")
    if not isinstance(output, list):
        reject(where, "no output", "an object of the Responses API with a list `output`")
    items = [item for item in output if isinstance(item, Mapping) and item.get("type") == "message"]
    return "".join(_text(item.get("content"), f"{where}.output") for item in items)


def _text(content: Any, where: str) -> str:
    """The text of a content, what a refusal says included; what is no text is refused, or it would be missing."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        reject(where, type(content).__name__, "a text, or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        name = "refusal" if kind == "refusal" else "text"
        if kind not in ("input_text", "output_text", "text", "refusal") or not isinstance(part.get(name), str):
            reject(where, f"a part of type {kind!r:.60}", "parts of text")
        texts.append(part[name])
    return "".join(texts)


def _rewards(service: RewardService, group: GroupScore, shapes: Sequence[Any]) -> list[float]:
    """1 to 5 by the mean probability of beating a sibling, and what bonuses add; NaN where no preference is known."""
    rewards = [1 + 4 * rate for rate in win_rates(group)]
    bonuses = service.settings.gym_bonuses
    return bonuses.applied(rewards, shapes) if bonuses else rewards


def _comparisons(group: GroupScore) -> list[dict[str, Any]]:
    decided = {(decision.i, decision.j): decision for decision in group.decisions}
    told = []
    for i, j in _compared(group):
        logit = float(group.preference[i, j])
        scores = scores_of(math.tanh(logit / 2)) if math.isfinite(logit) else None
        one = decided.get((i, j))
        told.append(
            {
                "response_i": i,
                "response_j": j,
                "judge_idx": 0,
                "score_1": None if scores is None else scores.score_1,
                "score_2": None if scores is None else scores.score_2,
                "ranking": None if scores is None else scores.ranking,
                "decided_by": "head" if one is None else one.by,
                "reason": "" if one is None else one.reason,
                "uncertainty": _finite(float(group.uncertainty[i, j])),
            }
        )
    return told


def _compared(group: GroupScore) -> Sequence[tuple[int, int]]:
    pairs = [(i, j) for i in range(group.size) for j in range(i + 1, group.size)]
    return pairs if group.compared is None else [pair for pair in pairs if bool(group.compared[pair])]


def _metrics(group: GroupScore) -> dict[str, float]:
    """What NeMo-Gym tells of a comparison, and what was asked of the GenRM and what was not."""
    pairs = _compared(group)
    js = [math.tanh(float(group.preference[pair]) / 2) for pair in pairs]
    scores = [value for j in js if math.isfinite(j) for value in (3 + 2 * j, 3 - 2 * j)]
    asked = sum(decision.by in ("judge", "judge_failed") for decision in group.decisions)
    verdicts = {id(d.verdict): d.verdict for d in group.decisions if d.verdict is not None}.values()
    spread = (statistics.fmean(scores), statistics.pstdev(scores)) if scores else ()
    return {
        **dict(zip(("mean_individual_score", "std_individual_score"), spread, strict=False)),
        "genrm_pairs": float(len(pairs)),
        "genrm_pairs_asked": float(asked),
        "genrm_pairs_saved": float(len(pairs) - asked),
        "genrm_pairs_failed": float(sum(decision.by == "judge_failed" for decision in group.decisions)),
        "genrm_calls": float(sum(verdict.usage.calls for verdict in verdicts)),
        **({} if group.head_version is None else {"head_version": float(group.head_version)}),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
