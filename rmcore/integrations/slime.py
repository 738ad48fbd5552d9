"""slime: the reward of a whole group, for ``--group-rm`` (read from its rollout/rm_hub and rollout/sglang_rollout.py).

    --group-rm --custom-rm-path rmcore.integrations.slime.group_rm --rm-url http://127.0.0.1:8400

slime hands one prompt's samples over together, so nothing has to be gathered: the group goes to ``rmcore serve`` or to
an engine in slime's own process, and the advantages A_i come back as rewards. With
``--disable-rewards-normalization`` slime uses them as they are; they sum to 0, so its group mean would not change them,
but its division by the std would.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.engine.advantage import check_tau, reliable_advantages
from rmcore.engine.engine import RewardEngine
from rmcore.engine.options import check_reliability
from rmcore.integrations.client import GroupClient, GroupResult
from rmcore.integrations.rows import alone
from rmcore.model.reward_model import RewardModel
from rmcore.model.text import OverlongPolicy, TextLimit

__all__ = ["GroupReward", "group_rm"]

log = logging.getLogger(__name__)

_SERVER_LIMITS = "rmcore serve takes --max-length, --overlong"
_FINISHED = ("completed", "truncated")


class GroupReward:
    """An async ``f(args, samples)`` for ``--custom-rm-path`` with ``--group-rm``.

        # my_reward.py, for --custom-rm-path my_reward.reward
        reward = GroupReward(RewardEngine(model, judge=ChatJudge(...), router=AdaptiveRouter(0.1)))

    Args:
        source: an engine to score in this process, or a client of the group server. None: what slime's arguments and
            the environment say, at the first call; see :func:`group_rm`.
        prompt_key: the key of ``sample.metadata`` that holds the prompt as the reward model shall see it, text or
            messages. None: ``sample.prompt``, which has the policy's chat template in it under
            ``--apply-chat-template``.
        max_length: most tokens of a text; None is what the model was saved with. A group server has its own limits
            (``rmcore serve --max-length --overlong``), so there it is refused.
        overlong: what happens to longer ones, likewise (:data:`~rmcore.model.text.OverlongPolicy`). A sample without a
            reward (``no-reward``) is masked in the loss.
        reliability_tau: rewards are w_i·A_i with w_i = 1/(1 + variance/τ), by the variance that the head's posterior
            leaves open of A_i (:func:`~rmcore.engine.advantage.reliable_advantages`). They do not sum to 0, so slime
            takes their mean away unless it runs with ``--disable-rewards-normalization``. None: A_i.
    """

    def __init__(
        self,
        source: RewardEngine | GroupClient | None = None,
        *,
        prompt_key: str | None = None,
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        reliability_tau: float | None = None,
    ) -> None:
        if source is not None and not isinstance(source, (RewardEngine, GroupClient)):
            reject("source", type(source).__name__, "a RewardEngine, a GroupClient or None")
        limit = {"max_length": max_length, "overlong": overlong}
        self.limit: dict[str, Any] = {name: value for name, value in limit.items() if value is not None}
        TextLimit(**self.limit)
        if self.limit and isinstance(source, GroupClient):
            reject("max_length, overlong", "given beside a GroupClient", f"None: {_SERVER_LIMITS}")
        if reliability_tau is not None:
            _check_weighing(source, reliability_tau)
        self.prompt_key = prompt_key
        self.reliability_tau = reliability_tau
        self._source = source
        self._lock = threading.Lock()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock."""
        kept = ("prompt_key", "limit", "reliability_tau", "_source")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._warned = False
        self._lock = threading.Lock()

    async def __call__(self, args: Any, samples: Sequence[Any], **_: Any) -> list[float]:
        """A_i of each sample, in order, or what ``reliability_tau`` makes of it.

        A sample that was aborted or failed has no full response to compare. It is left out of the group, gets
        ``remove_sample = True``, by which slime masks it in the loss, and 0.0 for a reward that nothing reads. The
        same goes for one without a preference to any other.

        Args:
            args: slime's arguments.
            samples: one prompt's samples.

        Raises:
            InputError: the samples are no group of one prompt, no source is named, or ``--reward-key`` is given.
            ServerError: no answer from the group server.
        """
        if not isinstance(samples, Sequence):  # without --group-rm slime hands over one sample
            reject("samples", type(samples).__name__, "a prompt's samples", "Pass --group-rm")
        if named := getattr(args, "reward_key", None):  # slime would look it up in a number, after the whole rollout
            reject("--reward-key", repr(named), "none, since these rewards are numbers")
        key = getattr(args, "rmcore_prompt_key", None) or self.prompt_key
        prompts = [_prompt(sample, key, k) for k, sample in enumerate(samples)]
        for k, prompt in enumerate(prompts):
            if prompt != prompts[0]:
                reject(f"samples[{k}]", "another prompt", "that of samples[0]. Pass --group-rm")
        if len(samples) == 1 and not self._warned:
            self._warned = True
            log.warning("%s", alone("--n-samples-per-prompt"))
        finished = [k for k, sample in enumerate(samples) if _status(sample) in _FINISHED]
        advantages: dict[int, float | None] = {}
        # One alone has nothing to be compared with.
        if len(finished) > 1 or len(samples) == 1 == len(finished):
            texts = [canonical_response(samples[k].response, f"samples[{k}].response") for k in finished]
            tau = getattr(args, "rmcore_reliability_tau", None) or self.reliability_tau
            scored = await self._score(self._source or self._configured(args), tau, prompts[0], texts)
            advantages = dict(zip(finished, scored, strict=True))
        rewards = []
        for k, sample in enumerate(samples):
            advantage = advantages.get(k)
            if advantage is None:
                sample.remove_sample = True
            rewards.append(0.0 if advantage is None else advantage)
        removed = sum(advantages.get(k) is None for k in range(len(samples)))
        if removed:
            log.warning(
                "%d of %d samples of a group have no advantage and are masked in the loss", removed, len(samples)
            )
        return rewards

    async def _score(
        self, source: RewardEngine | GroupClient, tau: float | None, prompt: Canonical, texts: list[Canonical]
    ) -> list[float | None]:
        if tau is not None:
            _check_weighing(source, tau)
        if isinstance(source, GroupClient):
            found = await source.groups(prompt, texts)
            return list(found.advantages) if tau is None else _weighted(found, tau)
        group = (await source.score_async([prompt], [texts], **self.limit))[0]
        advantages = group.advantages if tau is None else group.reliable_advantages(tau)
        return [value if value == value else None for value in advantages.tolist()]  # NaN: no preference

    def _configured(self, args: Any) -> RewardEngine | GroupClient:
        with self._lock:
            if self._source is None:
                url = getattr(args, "rm_url", None) or os.environ.get("RMCORE_SERVE_URL")
                path = getattr(args, "rmcore_model", None) or os.environ.get("RMCORE_MODEL")
                if not url and not path:
                    reject(
                        "--rm-url",
                        "nothing",
                        "the address of rmcore serve",
                        "Or name a saved model by RMCORE_MODEL, to score in slime's own process",
                    )
                if url and self.limit:
                    reject("max_length, overlong", "given beside --rm-url", f"None: {_SERVER_LIMITS}")
                self._source = GroupClient(url) if url else RewardEngine(RewardModel.from_pretrained(str(path)))
            return self._source


group_rm = GroupReward()
"""The function for ``--custom-rm-path rmcore.integrations.slime.group_rm``.

It asks the group server at ``--rm-url`` or ``RMCORE_SERVE_URL``; without either it loads the model that
``RMCORE_MODEL`` (or ``rmcore_model`` in the file of ``--custom-config-path``) names, and asks no judge. In the same
file ``rmcore_prompt_key`` and ``rmcore_reliability_tau`` are :class:`GroupReward`'s ``prompt_key`` and
``reliability_tau``.
"""


def _check_weighing(source: RewardEngine | GroupClient | None, tau: float) -> None:
    """A server says with its first group whether it tells variances."""
    check_tau(tau, "reliability_tau")
    if isinstance(source, RewardEngine):
        check_reliability(tau, mode=source.head.config.mode, design=source.design)


def _weighted(found: GroupResult, tau: float) -> list[float | None]:
    if found.advantage_variance is None:
        reject(
            "reliability_tau",
            "given, and no variance from the server",
            "None, or a model in difference mode served without a design",
        )
    advantages, variance = (
        torch.tensor([math.nan if one is None else one for one in values], dtype=torch.float64)
        for values in (found.advantages, found.advantage_variance)
    )
    weighted = reliable_advantages(advantages, variance, tau)
    return [value if value == value else None for value in weighted.tolist()]  # NaN: no preference


def _status(sample: Any) -> str:
    status = getattr(sample, "status", None)
    return str(getattr(status, "value", status)).lower()


def _prompt(sample: Any, key: str | None, k: int) -> Canonical:
    if isinstance(sample, (list, tuple)):
        reject(f"samples[{k}]", "several samples", "one: agents that fan out into several cannot be scored by group")
    prompt = sample.prompt
    if key is not None:
        metadata = getattr(sample, "metadata", None) or {}
        if key not in metadata:
            reject(f"samples[{k}].metadata", f"no key {key!r}", "the prompt under it")
        prompt = metadata[key]
    return canonical_prompt(prompt, f"samples[{k}].prompt" if key is None else f"samples[{k}].metadata[{key!r}]")
