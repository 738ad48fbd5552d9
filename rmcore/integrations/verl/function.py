"""verl's custom reward function, for those who keep one of verl's own managers."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.prompt import canonical_prompt
from rmcore.integrations.client import ServerError
from rmcore.integrations.ray.groups import Groups
from rmcore.integrations.verl.source import ACTOR_SETTINGS, CLIENT_SETTINGS, groups_of

__all__ = ["compute_score"]

_WHERE = "reward.custom_reward_function.reward_kwargs"
_SETTINGS = CLIENT_SETTINGS | ACTOR_SETTINGS | {"n", "val_n", "returns", "prompt_key", "judge_model"}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: dict[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: object = None,
    **settings: Any,
) -> dict[str, float]:
    """The score of one sample, when its whole group is scored.

    verl tells a function neither the prompt nor the group, so the prompt must be in the data's ``extra_info``, and
    equal prompts that are under way together are one group. :class:`~rmcore.integrations.verl.PairwiseRewardManager`
    needs neither.

    Args:
        data_source: not used.
        solution_str: the response.
        ground_truth: not used.
        extra_info: the row's; the prompt in it, text or messages, under ``prompt_key``.
        reward_router_address: of the generative reward model that verl serves, if it does.
        reward_model_tokenizer: not used.
        **settings: ``reward.custom_reward_function.reward_kwargs``: ``n`` (samples of a prompt, ``rollout.n``),
            ``val_n`` (of validation, where ``extra_info["split"]`` is not "train"; default n), ``returns``
            ("advantage", the default, for the estimator ``rmcore``, or "leave-one-out" for ``rloo``), ``prompt_key``
            ("prompt"), ``judge_model`` (what verl serves), and those of ``reward.reward_kwargs.rmcore``.

    Returns:
        ``score`` and figures that verl logs.

    Raises:
        InputError: a setting or the prompt is missing, or does not fit.
        ServerError: no answer, or this response has no preference to any other.
    """
    unknown = sorted(settings.keys() - _SETTINGS)
    if unknown:
        reject(_WHERE, f"the keys {unknown}", f"only {sorted(_SETTINGS)}")
    about = extra_info or {}
    k = _group_size(settings, about)
    key = settings.get("prompt_key", "prompt")
    if about.get(key) is None:
        reject(f"extra_info[{key!r}]", "nothing", "the prompt, text or messages", f"Name its key: {_WHERE}.prompt_key")
    prompt = about[key]
    asked = canonical_prompt(prompt.tolist() if hasattr(prompt, "tolist") else prompt, f"extra_info[{key!r}]")
    returns = settings.get("returns", "advantage")
    if returns not in ("advantage", "leave-one-out"):
        reject(f"{_WHERE}.returns", repr(returns), "'advantage' or 'leave-one-out'")
    groups = _groups(json.dumps([_plain(settings), reward_router_address], sort_keys=True))
    part = await groups.meet(asked, solution_str, k)
    score = part.advantage if returns == "advantage" else part.reward
    if score is None or part.advantage is None:
        raise ServerError(
            f"got no preference between this response and any other of the group's {len(part.slots)} present, expected "
            "one"
        )
    return {"score": score, "rmcore_advantage": part.advantage, "rmcore_members": float(len(part.slots))}


@lru_cache
def _groups(said: str) -> Groups:
    settings, router_address = json.loads(said)
    named = {name: value for name, value in settings.items() if name in CLIENT_SETTINGS | ACTOR_SETTINGS}
    return groups_of(named, _WHERE, router_address=router_address, judge_model=settings.get("judge_model"))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    # A list of addresses comes as OmegaConf's own kind of list.
    return {name: list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value
            for name, value in settings.items()}  # fmt: skip


def _group_size(settings: dict[str, Any], about: dict[str, Any]) -> int:
    n = settings.get("n")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        reject(f"{_WHERE}.n", repr(n), "the number of samples of a prompt: actor_rollout_ref.rollout.n")
    val_n = settings.get("val_n", n)
    if val_n == n:
        return int(n)
    if about.get("split") is None:
        reject(f"{_WHERE}.val_n", val_n, f"{n} as n, or a 'split' in each row's extra_info ('train' or another)")
    return int(n if about["split"] == "train" else val_n)
