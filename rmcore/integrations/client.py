"""The group server's client, for trainers that score from many processes: one class, a method an endpoint.

An answer may take as long as the slowest sibling, so a try waits long, and a try that is lost is made again: the server
shares results, so asking twice is safe. No failure ever becomes a reward: each raises, saying what went wrong.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import InputError, JudgeError, RmcoreError, reject
from rmcore._base.http import Connections, check_base_url
from rmcore._base.numbers import Within, check_number
from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response
from rmcore._base.retry import RetryPolicy, retry_delay_s
from rmcore.integrations.server.assembly import ConflictError, LateError
from rmcore.integrations.server.doubts import AGAIN
from rmcore.integrations.server.members import prompt_digest
from rmcore.integrations.server.placing import group_key, owner, ranked

if TYPE_CHECKING:
    import httpx

__all__ = ["GroupClient", "GroupResult", "MemberPart", "ServerError", "member_part"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Number: TypeAlias = float | None

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RETRIED = frozenset({408, 429, 502, 503, 504})
_LOST = frozenset({None, 500, 502, 503, 504})
_REFUSED = {409: ConflictError, 410: LateError, 400: InputError, 413: InputError, 422: InputError}
# The deadline ends the tries, not their number.
_RETRY = RetryPolicy(max_attempts=1_000_000, max_retry_after_s=math.inf)


class ServerError(RmcoreError, RuntimeError):
    """No answer from the group server. ``status`` is the last reply's, None if there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one try came to: a status, or the reason why there is none."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: bytes = b""
    reason: str = ""
    unreachable: bool = False  # nothing was sent

    @property
    def may_turn_out_well(self) -> bool:
        """Whether the same request may be answered next time. A 500 that is not the server's own is a proxy's."""
        said = self._error("type")
        return (self.status in _RETRIED and said != "no_preference") or (self.status == 500 and not said)

    @property
    def lost(self) -> bool:
        """Whether the request may have reached a server that has ended since."""
        return not self.unreachable and self.status in _LOST

    @property
    def cause(self) -> str:
        """Status and the server's own words, short and printable; or the reason."""
        if self.status is None:
            return self.reason
        said = self._error("message") or self.text[:200].decode("utf-8", "replace")
        said = "".join(c if c.isprintable() else " " for c in said)[:500].strip()
        return f"HTTP {self.status}" + (f" ({said})" if said else "")

    def _error(self, name: str) -> str:
        try:
            return str(json.loads(self.text)["error"][name])
        except (ValueError, TypeError, KeyError):
            return ""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A scored group, from ``POST /v1/groups``.

    Attributes:
        advantages: A_i; None for a response without a preference, here and below.
        rewards: S_i/m, for a leave-one-out baseline.
        rewards_group_mean: S_i/(m−1), for a group-mean baseline without std scaling.
        advantage_variance: of the advantages; None where the server's model tells none, as in concat mode.
        preference: (K, K) p̃, row i against column j.
        uncertainty: (K, K) u.
        record: the whole reply: who decided which pairs, cost, seconds.
    """

    advantages: tuple[Number, ...]
    rewards: tuple[Number, ...]
    rewards_group_mean: tuple[Number, ...]
    preference: tuple[tuple[Number, ...], ...]
    uncertainty: tuple[tuple[Number, ...], ...]
    record: Mapping[str, Any]
    advantage_variance: tuple[Number, ...] | None = None


@dataclass(frozen=True, slots=True)
class MemberPart:
    """One member's part of its group, from ``POST /v1/rendezvous``.

    Attributes:
        slot: which of the members this is.
        advantage: A_i over the members present; None without a preference (alone of several, for one).
        reward: S_i/m, for a leave-one-out baseline.
        reward_group_mean: S_i/(m−1), for a group-mean baseline without std scaling.
        advantage_variance: as of :class:`GroupResult`.
        preference, uncertainty: against each of ``slots``, itself included.
        slots: the members scored together.
        complete: whether all were there in time.
        record: the whole reply.
    """

    slot: int
    advantage: Number
    reward: Number
    reward_group_mean: Number
    preference: tuple[Number, ...]
    uncertainty: tuple[Number, ...]
    slots: tuple[int, ...]
    complete: bool
    record: Mapping[str, Any]
    advantage_variance: Number = None


class GroupClient:
    """Asks a server started with ``rmcore serve``. Safe on several event loops; pickles as its settings.

    Args:
        url: as in ``http://127.0.0.1:8400``; http or https, without credentials, query or fragment. Of several servers
            all addresses, in a sequence or with commas between: the members of a group go to the same one, whoever
            sends them (:func:`~rmcore.integrations.server.placing.owner`); whole groups go to any, and to the next if
            one cannot be reached. The members of a server that is down wait until it is back.
        token_env: environment variable with the server's bearer token, read at every call and kept nowhere; if it is
            not set, none is sent.
        timeout_s: for a call, all tries and waits together.
        attempt_timeout_s: for one try. It must be above the server's time limit and its scoring, or a slow group is
            asked for twice (which is safe).
        transport: an ``httpx.AsyncBaseTransport`` instead of the network; not pickled.
        clock, random_source: for deadlines and waits, and for jitter.

    All methods raise

        InputError: the server refused the request as malformed (400, 413, 422); its subclasses
        ConflictError: it contradicts what siblings said (409),
        LateError: the group was scored without this member (410);
        ServerError: wrong token, wrong address, or no good answer before the deadline, whose last cause is named.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token_env: str = "RMCORE_SERVE_TOKEN",  # noqa: S107 - a variable's name
        timeout_s: float = 600.0,
        attempt_timeout_s: float = 180.0,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        self.urls, loopback = _addresses(url)
        if not isinstance(token_env, str) or not _ENV_NAME.fullmatch(token_env):
            # The value is not shown: it may be the token itself, passed by mistake.
            raise InputError("token_env: got no variable name, expected the NAME of an environment variable")
        for name, value in (("timeout_s", timeout_s), ("attempt_timeout_s", attempt_timeout_s)):
            check_number(name, value, Within(above=0), "seconds above 0")
        self.token_env = token_env
        self.timeout_s = timeout_s
        self.attempt_timeout_s = attempt_timeout_s
        self.clock: Clock = clock or SystemClock()
        self._trust_env = not loopback  # a proxy cannot reach this machine's own servers
        self._random = random_source or random.Random()
        self._connect(transport)

    @property
    def url(self) -> str:
        """The address; of several, all with commas between, as they were given."""
        return ",".join(self.urls)

    def _connect(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._process = os.getpid()
        self._connections = Connections(
            timeout_s=self.attempt_timeout_s,
            trust_env=self._trust_env,
            certificates=any(url.startswith("https:") for url in self.urls),
            transport=transport,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy sent to another process opens connections of its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_connections", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    async def groups(
        self, prompt: Prompt, responses: Sequence[Response], *, id: int | str | None = None
    ) -> GroupResult:
        """Score one whole group.

        Args:
            prompt: text or message list.
            responses: K ≥ 1 responses, each text or messages (:mod:`rmcore._base.prompt`).
            id: comes back in ``record``.
        """
        answers = [canonical_response(response, f"responses[{k}]") for k, response in enumerate(responses)]
        body: dict[str, Any] = {"prompt": canonical_prompt(prompt), "responses": answers}
        if id is not None:
            body["id"] = id
        # So that a try whose answer was lost is not judged, and paid for, again. Not from the random source: copies of
        # this client in other processes would draw the same keys.
        headers = {"idempotency-key": uuid.uuid4().hex}
        at = ranked(headers["idempotency-key"].encode(), self.urls)
        reply = await self._post(at, "/v1/groups", body, headers)
        return _read(reply, lambda value: _group_result(value, len(responses)), "/v1/groups")

    async def rendezvous(
        self,
        group_id: int | str,
        slot: int,
        k: int,
        prompt: Prompt,
        response: Response,
        *,
        attempt: int | str = 0,
    ) -> MemberPart:
        """Wait for the siblings and return this member's part of the scored group.

        Args:
            group_id: what the trainer calls the group.
            slot: which member this is, from 0.
            k: how many the group has.
            prompt: the same for all members.
            response: this member's, text or messages.
            attempt: a new value makes a new group of the same id.
        """
        body = {
            "group_id": group_id,
            "attempt": attempt,
            "slot": slot,
            "k": k,
            "prompt": canonical_prompt(prompt),
            "response": canonical_response(response),
        }
        at = [owner(group_key(group_id, attempt), self.urls)]
        return _read(await self._post(at, "/v1/rendezvous", body), member_part, "/v1/rendezvous")

    async def meet(self, prompt: Prompt, response: Response, k: int) -> MemberPart:
        """As :meth:`rendezvous`, for callers that know no name of the group: equal prompts are one.

        Two equal prompts under way at once share their groups, and equal responses are members of their own.

        Args:
            prompt: the same for all members, text or messages.
            response: this member's, likewise.
            k: how many responses make a group.
        """
        asked = canonical_prompt(prompt)
        body = {"k": k, "prompt": asked, "response": canonical_response(response)}
        at = [owner(group_key("content", prompt_digest(asked)), self.urls)]
        return _read(await self._post(at, "/v1/rendezvous", body), member_part, "/v1/rendezvous")

    async def get_reward(self, query: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
        """OpenRLHF's call: ``{"rewards": [...], "scores": [...], "extra_logs": {...}}``, one value a query.

        Args:
            query: prompt and response in one text each, special tokens included. A single one waits for its siblings.
            prompts: the prompt each starts with.

        Raises:
            InputError: something that is no text; otherwise what the other calls raise.
        """
        for name, texts in (("query", query), ("prompts", prompts)):
            for k, text in enumerate(texts):
                if not isinstance(text, str):  # the query must begin with the prompt, character by character
                    reject(f"{name}[{k}]", type(text).__name__, "text, as the policy's chat template gives it")
        body = {"query": list(query), "prompts": list(prompts)}
        at = [owner(group_key(prompts[0]), self.urls)] if len(prompts) == 1 else ranked(os.urandom(8), self.urls)
        reply = await self._post(at, "/get_reward", body)
        return _read(reply, lambda value: _reward_reply(value, len(query)), "/get_reward")

    async def aclose(self) -> None:
        """Close the connections of every loop that still runs. The client can be used again; it then reconnects."""
        await self._connections.aclose()

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _post(
        self, at: Sequence[str], path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of a good answer; tried again until the deadline where that can help, at the next server of ``at``
        where one cannot be reached.
        """
        if self._process != os.getpid():  # forked: the parent's connections are not ours
            self._connect(self._connections.transport)
        content = json.dumps(body, allow_nan=False).encode("ascii")  # ASCII: a lone surrogate is escaped
        sent = {"content-type": "application/json", "accept": "application/json", **(headers or {})}
        deadline = self.clock.now() + self.timeout_s
        tries = elsewhere = 0
        while True:
            left = deadline - self.clock.now()
            url = at[elsewhere % len(at)]
            answer = await self._try(f"{url}{path}", content, sent, min(left, self.attempt_timeout_s))
            tries += 1
            elsewhere += answer.unreachable
            if answer.lost:  # and who had it may have answered its siblings
                sent[AGAIN] = "1"
            if answer.status == 200:
                try:
                    return json.loads(answer.text)
                except ValueError:
                    raise ServerError(f"{url}{path}: got a reply that is not JSON", 200) from None
            if answer.status is not None and not answer.may_turn_out_well:
                raise self._refusal(f"{url}{path}", answer)
            delay = retry_delay_s(_RETRY, tries - 1, answer.headers, self.clock.wall(), self._random.random())
            if delay is None or self.clock.now() + delay >= deadline:
                raise ServerError(
                    f"{url}{path}: got {answer.cause} after {tries} {'try' if tries == 1 else 'tries'}, expected "
                    f"an answer within {self.timeout_s:g} s",
                    answer.status,
                )
            log.info("%s: %s; next try in %.1f s", path, answer.cause, delay)
            await self.clock.sleep(delay)

    async def _try(self, address: str, content: bytes, headers: Mapping[str, str], seconds: float) -> _Answer:
        """One exchange, at most ``seconds`` long. Never raises because of the network or the server."""
        import httpx

        token = os.environ.get(self.token_env, "")
        sent = dict(headers) | ({"authorization": f"Bearer {token}"} if token else {})
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                with self._connections.here().client() as client:
                    response = await client.post(address, content=content, headers=sent, timeout=max(seconds, 1e-3))
                    return _Answer(response.status_code, response.headers, response.content)
        except (TimeoutError, httpx.TimeoutException):
            return _Answer(reason="no answer in time")
        except (httpx.TransportError, OSError) as error:
            # The type only: messages of HTTP libraries can quote headers, and one of them holds the token.
            unreachable = isinstance(error, httpx.ConnectError)
            return _Answer(reason=f"a failed connection ({type(error).__name__})", unreachable=unreachable)

    def _refusal(self, address: str, answer: _Answer) -> Exception:
        message = f"{address}: got {answer.cause}"
        if answer.status in _REFUSED:
            return _REFUSED[answer.status](message)
        if answer.status in (401, 403):
            found = "it was refused" if os.environ.get(self.token_env) else "it is not set"
            message += f", expected the server's token in the variable {self.token_env}; {found}"
        return ServerError(message, answer.status)


def _addresses(given: str | Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The addresses, and whether all are this machine's."""
    urls = [url.strip() for url in given.split(",")] if isinstance(given, str) else list(given)
    if not urls or len(set(urls)) != len(urls):
        reject("url", f"{len(urls)} addresses" + " of which some are equal" * bool(urls), "one or more, all different")
    try:
        checked = [check_base_url(url) for url in urls]
    except JudgeError as error:
        raise InputError(str(error).replace("base_url", "url", 1)) from None
    return tuple(url for url, _ in checked), all(loopback for _, loopback in checked)


def _read(reply: Any, make: Callable[[Any], T], path: str) -> T:
    try:
        return make(reply)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{path}: got a reply of another form ({error!r}), expected one of rmcore serve", 200
        ) from None


def _group_result(reply: Mapping[str, Any], count: int) -> GroupResult:
    variance = reply.get("advantage_variance")  # an older server sends none
    result = GroupResult(
        _row(reply["advantages"]),
        _row(reply["rewards"]),
        _row(reply["rewards_group_mean"]),
        tuple(_row(row) for row in reply["preference"]),
        tuple(_row(row) for row in reply["uncertainty"]),
        reply,
        None if variance is None else _row(variance),
    )
    if len(result.advantages) != count:
        raise ValueError(f"{len(result.advantages)} advantages for {count} responses")
    return result


def member_part(reply: Mapping[str, Any]) -> MemberPart:
    """A reply of ``/v1/rendezvous`` read; raises KeyError, TypeError or ValueError where it is none."""
    return MemberPart(
        int(reply["slot"]),
        _number(reply["advantage"]),
        _number(reply["reward"]["leave_one_out"]),
        _number(reply["reward"]["group_mean"]),
        _row(reply["preference"]),
        _row(reply["uncertainty"]),
        tuple(int(slot) for slot in reply["slots"]),
        bool(reply["complete"]),
        reply,
        _number(reply.get("advantage_variance")),
    )


def _reward_reply(reply: Mapping[str, Any], count: int) -> dict[str, Any]:
    rewards, scores = ([float(value) for value in reply[name]] for name in ("rewards", "scores"))
    if len(rewards) != count or len(scores) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} queries")
    return {"rewards": rewards, "scores": scores, "extra_logs": dict(reply.get("extra_logs") or {})}


def _row(values: Sequence[Any]) -> tuple[Number, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> Number:
    return None if value is None else float(value)
