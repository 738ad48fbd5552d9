"""What goes over the wire: requests, replies and errors, as the OpenAPI page shows them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from starlette.responses import Response
from torch import Tensor

from rmcore._base.errors import InputError
from rmcore.engine.group_score import GroupScore
from rmcore.engine.usage import usage_summary
from rmcore.integrations.server.assembly import MemberResult
from rmcore.integrations.server.batching import ScoredGroup
from rmcore.integrations.server.settings import ServeSettings

__all__ = [
    "OPEN_PATHS",
    "ErrorReply",
    "GroupReply",
    "GroupRequest",
    "GroupsBody",
    "HealthReply",
    "MemberReply",
    "MemberRequest",
    "Message",
    "RewardReply",
    "RewardRequest",
    "check_encodable",
    "describe",
    "error_response",
    "first_errors",
    "group_reply",
    "json_response",
    "member_reply",
    "win_rates",
]

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What may be read without a token."""

Row = list[float | None]
_STRICT = ConfigDict(extra="forbid", strict=True)


def _is_list(value: object) -> str:
    return "list" if isinstance(value, (list, tuple)) else "one"


def _kind_of_response(value: object) -> str:
    return "message" if isinstance(value, (dict, BaseModel)) else _is_list(value)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise ValueError("no Unicode text: it holds a lone surrogate") from None
    return text


def check_encodable(value: object) -> None:
    """Raise InputError for a JSON value that holds a lone surrogate somewhere."""
    try:
        _encodable(json.dumps(value, ensure_ascii=False))
    except ValueError as error:
        raise InputError(f"message: {error}") from None


def _integral(value: object) -> object:
    # JSON knows no integers: 1.0 is one.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_encodable)]
Integer = Annotated[int, BeforeValidator(_integral)]


class Message(BaseModel):
    """One message of a conversation, as chat completions have it.

    Besides role and content: name, reasoning_content, tool_calls and tool_call_id. A field that is null or empty counts
    as absent; anything else is refused by name.
    """

    model_config = ConfigDict(extra="allow", strict=True)  # what holds something unknown is refused by name later on
    role: Text = Field(min_length=1, examples=["user"])
    content: Any = Field(
        default=None, description="Text, or text parts; null for an assistant's message that says it otherwise."
    )


MAX_MESSAGES = 4096
"""Messages of a prompt or a response: what is checked one by one."""

Conversation = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
PromptField = Annotated[
    Annotated[Text, Tag("one")] | Annotated[Conversation, Tag("list")],
    Discriminator(_is_list),
    Field(description="Plain text, or a conversation."),
]
ResponseField = Annotated[
    Annotated[Text, Tag("one")] | Annotated[Message, Tag("message")] | Annotated[Conversation, Tag("list")],
    Discriminator(_kind_of_response),
    Field(description="Plain text, a message, or the several messages of a policy that called tools."),
]
Name = Annotated[Integer, Field(ge=-(2**53), le=2**53)] | Annotated[Text, Field(max_length=512)]
HeadVersion = Annotated[
    int | None, Field(description="Which version of a head that learns scored the group; null of one that does not.")
]


class GroupRequest(BaseModel):
    """A prompt and the responses to compare."""

    model_config = _STRICT
    prompt: PromptField = Field(examples=["What is a tree?"])
    responses: list[ResponseField] = Field(min_length=1, examples=[["A plant.", "A fish."]])
    id: Name | None = Field(default=None, description="Comes back in the reply; with equal content it marks a retry.")


GroupsBody = Annotated[
    Annotated[GroupRequest, Tag("one")] | Annotated[list[GroupRequest], Field(min_length=1), Tag("list")],
    Discriminator(_is_list),
]


class Decisions(BaseModel):
    """How many pairs each decided."""

    head: int
    judge: int
    judge_failed: int = Field(description="No verdict: the head's preference stands.")
    identical: int = Field(description="Equal responses: 0 by rule.")
    nobody: int = Field(description="The model cannot tell (equal when cut, or unread) and no judge was asked: null.")
    flips: int = Field(description="Verdicts that changed with the order of the responses.")
    failures: dict[str, int] = Field(description="Why there was no verdict.")


class Cost(BaseModel):
    """What the verdicts cost."""

    calls: int
    attempts: int
    cache_hits: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = Field(description="Of the calls that have a price; null if nothing is known.")
    unpriced_calls: int


class Seconds(BaseModel):
    """Where the time went."""

    waited: float
    scoring: float


class GroupReply(BaseModel):
    """A scored group; row i, column j is response i against response j. Null: no preference is known."""

    id: Name | None
    advantages: Row = Field(description="RLOO advantages.")
    rewards: Row = Field(description="Give the advantages back under a leave-one-out baseline.")
    rewards_group_mean: Row = Field(description="The same under a group-mean baseline without std scaling.")
    advantage_variance: Row | None = Field(
        description="Of the advantages, as far as the head's posterior leaves them open; null where it is not known "
        "(concat mode, or a design that leaves pairs out)."
    )
    preference: list[Row] = Field(description="Antisymmetric, in logits.")
    uncertainty: list[Row] = Field(description="u ≥ 1, symmetric.")
    routed: list[list[bool]]
    one_order: bool
    head_version: HeadVersion
    decisions: Decisions
    cost: Cost
    seconds: Seconds


class RewardRequest(BaseModel):
    """OpenRLHF's call: a list of whole groups, or one response whose siblings come in calls of their own."""

    model_config = ConfigDict(extra="ignore", strict=True)
    query: list[Text] = Field(description="Prompt and response, special tokens included.")
    prompts: list[Text]
    labels: Any = Field(default=None, description="Not used.")


class RewardReply(BaseModel):
    """OpenRLHF's answer, one value a query."""

    rewards: list[float]
    scores: list[float] = Field(description="Mean win rate against the siblings, in (0, 1).")
    extra_logs: dict[str, Any] = Field(description="What OpenRLHF logs: of a single response, its group's figures.")


class MemberRequest(BaseModel):
    """One member of a group whose siblings come in calls of their own."""

    model_config = _STRICT
    group_id: Name | None = Field(
        default=None, description="Without it, and without a slot, the prompt says who belongs together."
    )
    attempt: Name = Field(default=0, description="A new value makes a new group of the same id.")
    slot: Annotated[Integer, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="Which member this is; below k."
    )
    k: Integer = Field(ge=1, lt=2**31, description="How many members the group has.")
    prompt: PromptField
    response: ResponseField


class Reward(BaseModel):
    """Rewards that give the advantage back under either baseline."""

    leave_one_out: float | None
    group_mean: float | None


class MemberReply(BaseModel):
    """One member's part of its group."""

    group_id: Name | None
    attempt: Name
    slot: int
    reward: Reward
    advantage: float | None
    advantage_variance: float | None = Field(description="As far as the head leaves it open; null if not known.")
    preference: Row = Field(description="Against each of `slots`, in their order.")
    uncertainty: Row
    routed: list[bool]
    slots: list[int] = Field(description="The members that were scored together.")
    complete: bool = Field(description="False if the time limit passed before all had come.")
    head_version: HeadVersion


class HealthReply(BaseModel):
    """Answers as long as the process lives."""

    status: Literal["ok", "draining"]
    ready: bool
    model: str
    version: str


class ErrorBody(BaseModel):
    """What went wrong."""

    type: str
    message: str


class ErrorReply(BaseModel):
    """Every error looks like this."""

    error: ErrorBody


# -- replies ---------------------------------------------------------------------------------------------------------


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII JSON, so that no text can break the encoding."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, status, headers, "application/json")


def error_response(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the one form all have."""
    return json_response({"error": {"type": kind, "message": message[:2000]}}, status, headers)


def group_reply(scored: ScoredGroup, name: int | str | None) -> dict[str, Any]:
    """A :class:`GroupReply` as JSON values."""
    group = scored.group
    by = Counter(decision.by for decision in group.decisions)
    figures = usage_summary(scored.usage)
    return {
        "id": name,
        **_values(group),
        "preference": _rows(group.preference),
        "uncertainty": _rows(group.uncertainty),
        "routed": group.routed.tolist(),
        "one_order": group.one_order,
        "head_version": group.head_version,
        "decisions": {
            "head": group.size * (group.size - 1) // 2 - len(group.decisions),
            "judge": by["judge"],
            "judge_failed": by["judge_failed"],
            "identical": by["identical"],
            "nobody": by["nobody"],
            "flips": sum(d.by == "judge" and d.verdict is not None and d.verdict.flipped for d in group.decisions),
            "failures": dict(Counter(d.reason for d in group.decisions if d.by == "judge_failed")),
        },
        "cost": {name: figures[name] for name in Cost.model_fields},
        "seconds": {"waited": scored.waited_s, "scoring": scored.scoring_s},
    }


async def member_reply(request: MemberRequest, result: MemberResult) -> dict[str, Any]:
    """A :class:`MemberReply` as JSON values. A member that is left alone of several has no preference: null, not 0."""
    group, i = result.group, result.index
    alone = len(result.slots) == 1 and result.size > 1
    names = ("rewards", "rewards_group_mean", "advantages", "advantage_variance")
    values = await result.worked_out.get("values", lambda: _values(group), group.size)
    leave_one_out, group_mean, advantage, variance = (
        None if alone or (row := values[name]) is None else row[i] for name in names
    )
    return {
        "group_id": request.group_id,
        "attempt": request.attempt,
        "slot": result.slots[i] if request.slot is None else request.slot,
        "reward": {"leave_one_out": leave_one_out, "group_mean": group_mean},
        "advantage": advantage,
        "advantage_variance": variance,
        "preference": _row(group.preference[i]),
        "uncertainty": _row(group.uncertainty[i]),
        "routed": group.routed[i].tolist(),
        "slots": list(result.slots),
        "complete": result.complete,
        "head_version": group.head_version,
    }


def _values(group: GroupScore) -> dict[str, Row | None]:
    variance = group.advantage_variance
    return {
        "advantages": _row(group.advantages),
        "rewards": _row(group.rewards),
        "rewards_group_mean": _row(group.rewards_for("group-mean")),
        "advantage_variance": None if variance is None else _row(variance),
    }


def win_rates(group: GroupScore) -> list[float]:
    """(K,) mean probability of winning against a sibling, σ(p̃); NaN without a preference."""
    rates = group.preference.sigmoid().clone()
    rates.fill_diagonal_(math.nan)
    return rates.nanmean(1).tolist()


def _row(values: Tensor) -> Row:
    return [_number(value) for value in values.tolist()]


def _rows(values: Tensor) -> list[Row]:
    return [[_number(value) for value in row] for row in values.tolist()]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def first_errors(errors: Sequence[Mapping[str, Any]], count: int = 5) -> str:
    """Pydantic's errors in one line, without what was sent."""
    told = []
    for error in errors[:count]:
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
        told.append(f"{where.lstrip('.')}: {error['msg']}")
    more = f"; and {len(errors) - count} more" if len(errors) > count else ""
    return "; ".join(told) + more


def describe(page: dict[str, Any], settings: ServeSettings) -> dict[str, Any]:
    """The OpenAPI page with what only the settings know: limits, and whether a token is needed."""
    schemas, paths = page["components"]["schemas"], page["paths"]
    request, member = (schemas[name]["properties"] for name in ("GroupRequest", "MemberRequest"))
    request["responses"]["maxItems"] = settings.max_responses
    member["k"] |= {"maximum": settings.max_responses}
    member["slot"] |= {"maximum": settings.max_responses - 1}
    for text in (request["prompt"], member["prompt"], request["responses"]["items"], member["response"]):
        next(kind for kind in text["oneOf"] if kind.get("type") == "string")["maxLength"] = settings.max_chars
    groups = paths["/v1/groups"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    next(kind for kind in groups["oneOf"] if kind.get("type") == "array")["maxItems"] = settings.max_groups
    if settings.token is not None:
        page["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in paths.items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"token": []}]
    return page
