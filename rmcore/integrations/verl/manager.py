"""verl's reward manager."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, canonical_prompt
from rmcore.engine.advantage import check_tau, reliability_weights
from rmcore.integrations.client import MemberPart, ServerError
from rmcore.integrations.ray.groups import Groups
from rmcore.integrations.rows import alone
from rmcore.integrations.verl.estimator import ADVANTAGE_ESTIMATOR
from rmcore.integrations.verl.source import ACTOR_SETTINGS, CLIENT_SETTINGS, groups_of

__all__ = ["PairwiseRewardManager"]

log = logging.getLogger(__name__)

Returns: TypeAlias = Literal["advantage", "leave-one-out"]
"""What a sample's score is: A_i itself, or S_i/m, from which a leave-one-out baseline makes A_i."""

_WHERE = "reward.reward_kwargs.rmcore"
_OURS = frozenset({"returns", "reliability_tau"})
_SETTINGS = CLIENT_SETTINGS | ACTOR_SETTINGS | _OURS


class PairwiseRewardManager:
    """verl's reward manager; verl makes one in each reward-loop worker.

    Settings come from ``reward.reward_kwargs.rmcore``. With ``url`` (or the environment variable ``RMCORE_SERVE_URL``)
    samples meet at ``rmcore serve``; ``token_env``, ``timeout_s`` and ``attempt_timeout_s`` are those of
    :class:`~rmcore.integrations.client.GroupClient`. With ``model`` they meet in an actor of verl's cluster, one for
    all workers, that holds the model; there the judge is the generative reward model that verl serves, if it does
    (``judge_fraction``, ``judge_kind``, ``judge_orders``, ``judge_max_tokens``, ``store``, ``device``, ``num_gpus``,
    ``time_limit_s``: :class:`~rmcore.integrations.verl.source.ActorEngine`). ``returns`` and ``reliability_tau`` are
    for both.

    Samples without ``uid`` and ``session_id``, as the trainer has them where verl's reward model shares its GPUs with
    the policy, meet by their prompts.

    The score is A_i for the estimator ``rmcore``, and for ``grpo`` with ``norm_adv_by_std_in_grpo=False`` (the A_i of a
    group sum to 0, so its mean takes nothing away); S_i/m for ``rloo`` and ``rloo_vectorized``. With any other
    estimator the advantages would be something else, so it is refused unless ``returns`` says what is wanted.

    With ``reliability_tau`` the score is made of w_i·A_i, w_i = 1/(1 + variance/τ) with the variance that the head's
    posterior leaves open of A_i (:func:`~rmcore.engine.advantage.reliable_advantages`). ``rmcore`` hands it through;
    the baselines of ``rloo`` and ``grpo`` take the group's mean away. The server's model must be of difference mode.

    Args:
        config: verl's whole configuration.
        tokenizer: the policy's, to decode responses.
        compute_score, reward_model_tokenizer: what verl gives every manager; not used.
        reward_router_address: of the generative reward model that verl serves; None where it serves none.
        client: instead of what the settings name; a seam for tests.

    Raises:
        InputError: a setting is missing or does not fit, named as verl knows it.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: object = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: object = None,
        *,
        client: Groups | None = None,
    ) -> None:
        settings = _at(config, _WHERE) or {}
        unknown = sorted(str(name) for name in settings if name not in _SETTINGS)
        if unknown:
            reject(_WHERE, f"the keys {unknown}", f"only {sorted(_SETTINGS)}")
        self.tokenizer = tokenizer
        self.returns = _checked_returns(config, settings.get("returns"))
        self.reliability_tau: float | None = settings.get("reliability_tau")
        if self.reliability_tau is not None:
            check_tau(self.reliability_tau, "reward.reward_kwargs.rmcore.reliability_tau")
        self.n = _samples(config, "actor_rollout_ref.rollout.n")
        self.val_n = _samples(config, "actor_rollout_ref.rollout.val_kwargs.n", default=1)
        self.client = client or groups_of(
            {name: settings[name] for name in settings if name not in _OURS},
            _WHERE,
            router_address=reward_router_address,
            judge_model=_at(config, "reward.reward_model.model_path"),
        )
        _check_asked(config, reward_router_address)
        for warning in _inexact(config):
            log.warning("advantages will not be exactly RLOO over the preferences: %s", warning)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The score of one sample, when its whole group is scored.

        Args:
            data: a ``DataProto`` of one trajectory; of several outputs the last counts, as in verl's own managers.

        Returns:
            ``reward_score`` and, in ``reward_extra_info``, the same figures for every sample.

        Raises:
            InputError: the sample lacks a field, or contradicts its siblings.
            LateError: the group was scored without it.
            ServerError: no answer, or this response has no preference to any other.
        """
        item = data[-1:][0]
        about = item.non_tensor_batch
        size = self._group_size(about)
        prompt = _messages(about)
        response = await asyncio.to_thread(self._decode, item)
        if not _told(about, "uid") and not _told(about, "session_id"):
            where = "a sample without uid"
            part = await self.client.meet(prompt, response, size)
        else:
            uid, slot = self._place(about)
            where = f"uid {uid}, session_id {slot}"
            attempt = int(about.get("global_steps", 0))
            part = await self.client.rendezvous(uid, slot, size, prompt, response, attempt=attempt)
        advantage = part.advantage
        if advantage is None or part.reward is None:
            raise ServerError(
                f"{where}: got no preference between this response and any other of the group's "
                f"{len(part.slots)} present, expected one"
            )
        extra = _extra_info(part, advantage)
        if self.reliability_tau is not None:
            extra["rmcore_reliability"] = _weight(part, self.reliability_tau)
        score = advantage if self.returns == "advantage" else part.reward
        return {"reward_score": score * extra.get("rmcore_reliability", 1.0), "reward_extra_info": extra}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Tensor:
        """(B, response length) with each score at its response's last token, as verl's base class does it.

        A sample without a response token has no token to carry a score: its row stays 0. (verl's own code writes it at
        index −1, a padded position, from where it leaks into sums over the row.)
        """
        prompt_length = data.batch["prompts"].size(1)
        lengths = data.batch["attention_mask"][:, prompt_length:].sum(dim=1)
        result = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        rows = torch.arange(result.size(0), device=result.device)
        there = lengths > 0
        result[rows[there], lengths[there] - 1] = result.new_tensor(scores)[there]
        return result

    def _decode(self, item: Any) -> str:
        ids = item.batch["responses"]
        length = int(item.batch["attention_mask"][-ids.shape[-1] :].sum()) if ids.shape[-1] else 0
        return str(self.tokenizer.decode(ids[:length], skip_special_tokens=True))

    def _place(self, about: Mapping[str, Any]) -> tuple[str, int]:
        for name in ("uid", "session_id"):
            if not _told(about, name):
                reject(
                    f"non_tensor_batch[{name!r}]",
                    "nothing",
                    "what tells the samples of a group apart",
                    "Only verl's v1 trainer passes it: set trainer.use_v1=True",
                )
        return str(about["uid"]), int(about["session_id"])

    def _group_size(self, about: Mapping[str, Any]) -> int:
        """verl does not say whether a sample is one of validation, so where the sizes differ the data must."""
        if self.n == self.val_n:
            return self.n
        extra = about.get("extra_info")
        split = extra.get("split") if isinstance(extra, Mapping) else None
        if split is None:
            reject(
                "actor_rollout_ref.rollout.val_kwargs.n",
                self.val_n,
                f"{self.n} as actor_rollout_ref.rollout.n, or a 'split' in each row's extra_info ('train' or another)",
            )
        return self.n if split == "train" else self.val_n


def _told(about: Mapping[str, Any], name: str) -> bool:
    """Whether a sample has a value there: None, a NaN and an empty text would make one group of all that have none."""
    value = about.get(name)
    return not (value is None or value == "" or (isinstance(value, float) and math.isnan(value)))


def _at(config: Any, path: str, default: Any = None) -> Any:
    """A value of a nested configuration: OmegaConf's, a mapping or an object."""
    for name in path.split("."):
        if config is None:
            return default
        config = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if config is None else config


def _samples(config: Any, path: str, default: int | None = None) -> int:
    value = _at(config, path, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        reject(path, repr(value), "a number of samples, at least 1")
    return value


def _checked_returns(config: Any, chosen: Any) -> Returns:
    estimator = _estimator(config)
    divides = _at(config, "algorithm.norm_adv_by_std_in_grpo", True)
    fitting: dict[str, Returns] = {
        ADVANTAGE_ESTIMATOR: "advantage",
        "rloo": "leave-one-out",
        "rloo_vectorized": "leave-one-out",
    }
    if not divides:
        fitting["grpo"] = "advantage"
    if chosen is None:
        if estimator not in fitting:
            reject(
                "algorithm.adv_estimator",
                estimator + (" with norm_adv_by_std_in_grpo" if estimator == "grpo" else ""),
                f"{ADVANTAGE_ESTIMATOR}, rloo, rloo_vectorized, or grpo with algorithm.norm_adv_by_std_in_grpo=False",
                "Or say in reward.reward_kwargs.rmcore.returns what a score shall be: advantage or leave-one-out",
            )
        return fitting[estimator]
    if chosen not in ("advantage", "leave-one-out"):
        reject("reward.reward_kwargs.rmcore.returns", repr(chosen), "'advantage' or 'leave-one-out'")
    if fitting.get(estimator, chosen) != chosen:
        reject("reward.reward_kwargs.rmcore.returns", chosen, f"{fitting[estimator]} for adv_estimator={estimator}")
    return chosen


def _estimator(config: Any) -> str:
    named = _at(config, "algorithm.adv_estimator")
    return str(getattr(named, "value", named))


def _inexact(config: Any) -> list[str]:
    """Settings that keep verl's advantages from being RLOO over the preferences, and what to do."""
    found = []
    if _at(config, "algorithm.use_kl_in_reward", False):
        found.append("algorithm.use_kl_in_reward subtracts a KL term from the score; set it to False")
    estimator = _estimator(config)
    divides = estimator == "grpo" and _at(config, "algorithm.norm_adv_by_std_in_grpo", True)
    if divides or estimator not in (ADVANTAGE_ESTIMATOR, "rloo", "rloo_vectorized", "grpo"):
        found.append(f"algorithm.adv_estimator={estimator} makes something else of a score; set {ADVANTAGE_ESTIMATOR}")
    if _at(config, "actor_rollout_ref.rollout.n", 1) < 2:
        found.append(alone("actor_rollout_ref.rollout.n"))
    return found


def _check_asked(config: Any, router_address: str | None) -> None:
    """verl's reward worker calls a manager only if it has a reward function of the user's, or serves no model."""
    if router_address is not None and _at(config, "reward.custom_reward_function.path") is None:
        reject(
            "reward.custom_reward_function.path",
            "nothing, so that verl scores with its reward model alone and never calls this manager",
            "any function",
            "reward.custom_reward_function.path=pkg://rmcore.integrations.verl (its compute_score is then not called)",
        )


def _messages(about: Mapping[str, Any]) -> Canonical:
    """``raw_prompt`` in canonical form; verl hands the messages over as a list or as an array of objects."""
    raw = about.get("raw_prompt")
    if raw is None:
        reject("non_tensor_batch['raw_prompt']", "nothing", "the prompt's messages")
    return canonical_prompt(raw.tolist() if hasattr(raw, "tolist") else raw, "raw_prompt")


def _extra_info(part: MemberPart, advantage: float) -> dict[str, float]:
    # verl stacks these over samples, so every sample must have the same keys.
    others = [u for s, u in zip(part.slots, part.uncertainty, strict=True) if s != part.slot and u is not None]
    return {
        "rmcore_advantage": advantage,
        "rmcore_uncertainty": math.fsum(others) / len(others) if others else 1.0,
        "rmcore_judge_rate": _judge_rate(part),
        "rmcore_members": float(len(part.slots)),
    }


def _weight(part: MemberPart, tau: float) -> float:
    """1/(1 + variance/τ) of this member; raises InputError where the server's model tells no variance."""
    if part.advantage_variance is None:
        reject(
            "reward.reward_kwargs.rmcore.reliability_tau",
            "given, and no variance from the server",
            "None, or a model in difference mode served without a design",
        )
    return float(reliability_weights(torch.tensor(part.advantage_variance, dtype=torch.float64), tau))


def _judge_rate(part: MemberPart) -> float:
    routed = part.record.get("routed", ())
    others = [bool(r) for s, r in zip(part.slots, routed, strict=False) if s != part.slot]
    return sum(others) / len(others) if others else 0.0
