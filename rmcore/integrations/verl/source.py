"""Where verl's samples meet: what ``reward.reward_kwargs.rmcore`` says, made into a client or an actor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rmcore._base.errors import reject
from rmcore.engine.engine import RewardEngine
from rmcore.integrations.client import GroupClient
from rmcore.integrations.ray.groups import Groups, start_groups
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["ACTOR_SETTINGS", "CLIENT_SETTINGS", "ActorEngine", "groups_of"]

log = logging.getLogger(__name__)

CLIENT_SETTINGS = frozenset({"url", "token_env", "timeout_s", "attempt_timeout_s"})
ACTOR_SETTINGS = frozenset(
    {"model", "judge_fraction", "judge_kind", "judge_orders", "judge_max_tokens", "store", "device", "num_gpus"}
    | {"time_limit_s"}
)


@dataclass(frozen=True)
class ActorEngine:
    """Makes the engine of the actor: the saved model, and as judge the generative reward model that verl serves.

    Attributes:
        model: folder or hub name of the reward model.
        router_address: verl's ``reward_router_address``, ``host:port``; None: no judge.
        judge_model: what verl serves there (``reward.reward_model.model_path``).
        judge_fraction: of the pairs, those sent to it.
        judge_kind: ``chat`` asks in words, ``genrm`` in the roles of Nemotron's GenRM.
        judge_orders: ``both``, or ``one`` at half the calls.
        judge_max_tokens: of an answer; None leaves it to the model.
        store: of verdicts: a path on the actor's node, or a ``postgresql://`` URL.
        device: of the backbone; None takes a GPU where Ray gave one.
    """

    model: str
    router_address: str | None = None
    judge_model: str = ""
    judge_fraction: float = 0.0
    judge_kind: Literal["chat", "genrm"] = "chat"
    judge_orders: Literal["both", "one"] = "both"
    judge_max_tokens: int | None = None
    store: str | None = field(default=None, repr=False)  # a URL may hold a password
    device: str | None = None

    def __call__(self) -> RewardEngine:
        """The engine."""
        from rmcore.engine.routing import LearnedRouter
        from rmcore.judge import ChatJudge, GenRMJudge
        from rmcore.model.reward_model import RewardModel

        model = RewardModel.from_pretrained(self.model, device=self.device)
        if self.router_address is None:
            return RewardEngine(model)
        kind = GenRMJudge if self.judge_kind == "genrm" else ChatJudge
        judge = kind(
            f"http://{self.router_address}/v1",
            self.judge_model,
            None,
            orders=self.judge_orders,
            max_tokens=self.judge_max_tokens,
            store=self.store,
        )
        return RewardEngine(model, judge, LearnedRouter(self.judge_fraction, prior=model.error_prior))


def groups_of(
    settings: Mapping[str, Any], where: str, *, router_address: str | None = None, judge_model: str | None = None
) -> Groups:
    """A client of the group server, or the actor that all of verl's workers share.

    Args:
        settings: ``url`` and other arguments of :class:`~rmcore.integrations.client.GroupClient`, or ``model`` and
            others of :class:`ActorEngine`, with ``num_gpus`` of the actor and ``time_limit_s`` of a group (900).
        where: what the settings are called, for messages.
        router_address: what verl gave.
        judge_model: what verl serves there.

    Raises:
        InputError: neither is named, or both, or a setting of the other way.
    """
    url = settings.get("url") or (None if settings.get("model") else os.environ.get("RMCORE_SERVE_URL"))
    if url is None and not settings.get("model"):
        reject(
            f"{where}.url",
            "nothing",
            "the address of rmcore serve",
            f"Pass +{where}.url=http://host:8400 or set RMCORE_SERVE_URL on every node; or, for an actor in verl's own "
            f"cluster instead of a server, +{where}.model",
        )
    of_the_other = (ACTOR_SETTINGS if url else CLIENT_SETTINGS) & settings.keys()
    if of_the_other:
        reject(
            where, f"{sorted(of_the_other)} beside {'url' if url else 'model'}", "settings of a server, or of an actor"
        )
    if url:
        if router_address is not None:
            log.warning(
                "the generative reward model at verl's router is not asked: with %s.url the judge is the group "
                "server's own (--judge-url); set %s.model instead to have it judge",
                where,
                where,
            )
        return GroupClient(url if isinstance(url, str) else list(url), **_chosen(settings, CLIENT_SETTINGS - {"url"}))
    return _actor(settings, where, router_address, judge_model)


def _actor(settings: Mapping[str, Any], where: str, router_address: str | None, judge_model: str | None) -> Groups:
    given = _chosen(settings, ACTOR_SETTINGS - {"num_gpus", "time_limit_s"})
    fraction = given.get("judge_fraction")
    if router_address is None and fraction:
        reject(
            f"{where}.judge_fraction",
            fraction,
            "none, as verl serves no reward model",
            "reward.reward_model.enable=True",
        )
    if router_address is not None and not fraction:
        reject(f"{where}.judge_fraction", fraction, "the share of pairs that verl's reward model shall judge, above 0")
    if given.get("judge_kind", "chat") not in ("chat", "genrm"):
        reject(f"{where}.judge_kind", repr(given["judge_kind"]), "'chat' or 'genrm'")
    make = ActorEngine(**given, router_address=router_address, judge_model=judge_model or "")
    within = settings.get("time_limit_s", 900.0)
    limits = ServeSettings(time_limit_s=within, answer_within_s=2 * within)  # nobody waits for it by HTTP
    said = json.dumps([given, router_address, judge_model, limits.time_limit_s], sort_keys=True)
    name = f"rmcore-groups-{hashlib.sha256(said.encode()).hexdigest()[:16]}"  # other settings are another actor
    return start_groups(make, limits, name=name, **_chosen(settings, frozenset({"num_gpus"})))


def _chosen(settings: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: settings[name] for name in sorted(names) if name in settings}
