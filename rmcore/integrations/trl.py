"""Rewards for TRL's RLOOTrainer and GRPOTrainer, in process (read from TRL 1.16).

    reward = PairwiseReward("my-reward-model", judge=ChatJudge(...), router=AdaptiveRouter(0.1))
    trainer = RLOOTrainer(model, reward_funcs=reward, args=RLOOConfig(beta=0.0, num_generations=8, ...), ...)

The advantages the trainer computes are then exactly RLOO over the judged pairwise preferences
(``GroupScores.advantages``), as long as nothing else is mixed into the reward: :func:`check_trl_config` lists what
would be.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.engine.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.engine.routing import Router
from rmcore.engine.selection import member_uncertainty
from rmcore.integrations.rows import GroupingError, group_size_of_runs, prompt_key, split_groups
from rmcore.judge.base import Judge

__all__ = ["ConfigIssue", "PairwiseReward", "check_trl_config"]

log = logging.getLogger(__name__)

_LOCALITY = (
    "Make per_device_train_batch_size * steps_per_generation a multiple of num_generations, so that every rank holds "
    "whole groups, or pass partial_groups='gather'"
)


@dataclass(frozen=True, slots=True)
class ConfigIssue:
    """A trainer setting that keeps the trainer's advantages from being RLOO over the preferences, and what to do."""

    setting: str
    got: object
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting}: got {self.got!r}. {self.why} {self.fix}"


def check_trl_config(args: Any, *, reward_funcs: int = 1) -> list[ConfigIssue]:
    """Every setting of an ``RLOOConfig`` or ``GRPOConfig`` that breaks exactness; an empty list if none does.

    Args:
        args: the trainer's configuration.
        reward_funcs: how many reward functions the trainer gets.

    Raises:
        InputError: ``args`` is neither configuration.
    """
    kind = _config_kind(args)
    issues = []

    def issue(setting: str, why: str, fix: str) -> None:
        issues.append(ConfigIssue(setting, getattr(args, setting, None), why, fix))

    if kind == "rloo":
        if args.beta:
            issue("beta", "RLOOTrainer subtracts beta times the KL from the reward.", "Set beta=0.0.")
        if args.reward_clip_range:
            issue("reward_clip_range", "Rewards beyond the range are clamped.", "Set reward_clip_range=None.")
        if args.normalize_advantages:
            issue("normalize_advantages", "Advantages are divided by their std.", "Set normalize_advantages=False.")
    else:
        if str(args.scale_rewards).lower() not in ("none", "false"):
            issue("scale_rewards", "Advantages are divided by a std.", 'Set scale_rewards="none".')
        if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
            issue(
                "multi_objective_aggregation",
                "Rewards are normalised by their std first.",
                'Set multi_objective_aggregation="sum_then_normalize".',
            )
    weights = getattr(args, "reward_weights", None)
    if weights is not None and list(weights) != [1.0]:
        issue("reward_weights", "Rewards are scaled.", "Set reward_weights=None.")
    if reward_funcs != 1:
        issues.append(
            ConfigIssue("reward_funcs", reward_funcs, "Rewards of several functions are summed.", "Pass one function.")
        )
    k, rows = args.num_generations, _rows_per_rank(args)
    if k and rows and rows % k:
        issues.append(
            ConfigIssue(
                "per_device_train_batch_size",
                args.per_device_train_batch_size,
                f"A rank gets {rows} rows, no multiple of num_generations = {k}, so groups straddle calls.",
                _LOCALITY + ".",
            )
        )
    return issues


class PairwiseReward:
    """An async reward function for ``reward_funcs=``; picklable if made from a path.

    Args:
        model: an engine, or the folder of a saved reward model, which is loaded at the first call (and again in a
            process this object is sent to).
        judge, router: of the engine made for a folder.
        num_generations: K. Default: the trainer's own, found through the call; without a trainer, the length of runs
            of equal prompts.
        mode: ``rloo`` for RLOOTrainer (rewards S_i/m), ``grpo`` for GRPOTrainer with ``scale_rewards="none"`` (rewards
            S_i/(m−1)); with the right one the trainer's advantages are RLOO's.
        group_by: the dataset column that tells prompts apart, where the data has it; ``None`` compares the prompts.
        partial_groups: ``raise`` if a rank holds no whole groups, or ``gather`` the rows of all ranks (needs
            accelerate; each rank then scores a share of the groups).
        deadline_s: seconds after which a call fails. Verdicts not in after 80% of it are given up: those pairs keep
            the head's preference. It must be below the trainer's ``ddp_timeout``, which would end the run instead.
        strict: raise if :func:`check_trl_config` finds anything; by default it is logged once as warnings.
        engine_options: further keyword arguments of :class:`~rmcore.engine.RewardEngine` for a folder.

    Attributes:
        last: the :class:`~rmcore.engine.groups.GroupScores` of the last call on this rank, for logs and tests.
    """

    def __init__(
        self,
        model: RewardEngine | str | os.PathLike[str],
        judge: Judge | None = None,
        router: Router | None = None,
        *,
        num_generations: int | None = None,
        mode: Literal["rloo", "grpo"] = "rloo",
        group_by: str | None = "prompt_id",
        partial_groups: Literal["raise", "gather"] = "raise",
        deadline_s: float = 900.0,
        strict: bool = False,
        **engine_options: Any,
    ) -> None:
        if not isinstance(model, (RewardEngine, str, os.PathLike)):
            reject("model", type(model).__name__, "a RewardEngine or the folder of a saved model")
        if isinstance(model, RewardEngine) and (judge is not None or router is not None or engine_options):
            reject("judge, router", "given beside an engine", "None: they belong to the engine")
        if num_generations is not None and num_generations < 1:
            reject("num_generations", num_generations, "at least 1, or None")
        if mode not in ("rloo", "grpo"):
            reject("mode", repr(mode), "'rloo' or 'grpo'")
        if partial_groups not in ("raise", "gather"):
            reject("partial_groups", repr(partial_groups), "'raise' or 'gather'")
        if not (math.isfinite(deadline_s) and deadline_s > 0):
            reject("deadline_s", deadline_s, "seconds above 0")
        self.__name__ = "pairwise_reward"  # what TRL calls its metrics after
        self.mode = mode
        self.num_generations = num_generations
        self.group_by = group_by
        self.partial_groups = partial_groups
        self.deadline_s = deadline_s
        self.strict = strict
        self.last: GroupScores | None = None
        self._path = None if isinstance(model, RewardEngine) else os.fspath(model)
        self._settings = {"judge": judge, "router": router, **engine_options}
        self._engine = model if isinstance(model, RewardEngine) else None
        self._checked = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            raise TypeError("PairwiseReward made from an engine cannot be pickled; make it from a model folder instead")
        return {**self.__dict__, "_engine": None, "_lock": None, "last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def engine(self) -> RewardEngine:
        """The engine, made now if this came from a folder."""
        with self._lock:
            if self._engine is None:
                from rmcore.model.reward_model import RewardModel

                options = {"judge_deadline_s": 0.8 * self.deadline_s, **self._settings}
                assert self._path is not None
                self._engine = RewardEngine(RewardModel.from_pretrained(self._path), **options)
            return self._engine

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards, one a row; ``None`` for a response without any preference.

        Raises:
            GroupingError: the rows are no whole groups; names the trainer's setting.
            TimeoutError: not done after ``deadline_s``.
        """
        trainer = getattr(log_metric, "__self__", None)
        self._check_trainer(trainer)
        answers = [canonical_response(c, f"completions[{k}]") for k, c in enumerate(completions)]
        asked = [canonical_prompt(prompt, f"prompts[{k}]") for k, prompt in enumerate(prompts)]
        if len(answers) != len(asked):
            reject("completions", len(answers), f"{len(asked)}, one a prompt")
        keys = self._keys(prompts, columns)
        async with asyncio.timeout(self.deadline_s):
            if self.partial_groups == "gather":
                rewards, scores = await self._gathered(asked, answers, keys, trainer)
            else:
                size = self._group_size(keys, trainer)
                groups = split_groups(keys, size, setting=_LOCALITY)
                rewards, scores = await self._score(groups, asked, answers)
        self.last = scores
        if log_metric is not None:
            for name, value in _metrics(scores).items():
                log_metric(f"rmcore/{name}", value)
        if log_extra is not None and self.partial_groups == "raise" and scores is not None:
            log_extra("uncertainty", [float(u) for group in scores for u in member_uncertainty(group)])
        return rewards

    async def _score(
        self, groups: list[range], prompts: Sequence[Canonical], texts: Sequence[Canonical]
    ) -> tuple[list[float | None], GroupScores | None]:
        if not groups:
            return [], None
        engine = await asyncio.to_thread(lambda: self.engine)
        scores = await engine.score_async(
            [prompts[rows[0]] for rows in groups], [[texts[row] for row in rows] for rows in groups]
        )
        baseline: Literal["leave-one-out", "group-mean"] = "leave-one-out" if self.mode == "rloo" else "group-mean"
        values = [float(value) for group in scores for value in group.rewards_for(baseline)]
        return [None if math.isnan(value) else value for value in values], scores

    async def _gathered(
        self, prompts: list[Canonical], texts: list[Canonical], keys: list[Any], trainer: Any
    ) -> tuple[list[float | None], GroupScores | None]:
        """Rows of all ranks put together, each rank's share of the groups scored, rewards handed back to their rows."""
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        # Collectives block, so they leave the event loop alone; every rank makes the same two.
        everything = await asyncio.to_thread(gather_object, [(prompts, texts, keys)])
        error: Exception | None = None
        mine: dict[int, float | None] = {}
        scores = None
        try:
            all_prompts, all_texts, all_keys = ([x for part in everything for x in part[n]] for n in range(3))
            groups = split_groups(all_keys, self._group_size(all_keys, trainer), setting="")
            share = groups[state.process_index :: state.num_processes]
            rewards, scores = await self._score(share, all_prompts, all_texts)
            mine = dict(zip([row for rows in share for row in rows], rewards, strict=True))
        except Exception as caught:  # told to all ranks, or they would wait for this one until ddp_timeout
            error = caught
        told = f"{type(error).__name__}: {error}" if error is not None else ""
        results = await asyncio.to_thread(gather_object, [(mine, told)])
        if error is not None:
            raise error
        failed = [(rank, text) for rank, (_, text) in enumerate(results) if text]
        if failed:
            raise RuntimeError(f"rank {failed[0][0]} could not score its groups: {failed[0][1]}")
        merged = {row: value for rewards, _ in results for row, value in rewards.items()}
        start = sum(len(part[1]) for part in everything[: state.process_index])
        return [merged[start + k] for k in range(len(texts))], scores

    def _keys(self, prompts: Sequence[Any], columns: dict[str, Any]) -> list[Any]:
        if self.group_by is not None and self.group_by in columns:
            keys = list(columns[self.group_by])
            if len(keys) != len(prompts):
                reject(self.group_by, f"{len(keys)} values", f"{len(prompts)}, one a row")
            return keys
        return [prompt_key(prompt, f"prompts[{k}]") for k, prompt in enumerate(prompts)]

    def _group_size(self, keys: list[Any], trainer: Any) -> int:
        if self.num_generations is not None and not _evaluating(trainer):
            return self.num_generations
        if trainer is not None and hasattr(trainer, "num_generations"):
            return int(trainer.num_generations_eval if _evaluating(trainer) else trainer.num_generations)
        return group_size_of_runs(keys)

    def _check_trainer(self, trainer: Any) -> None:
        """Once a run: the trainer's settings. Every rank has the same, so every rank raises or none does."""
        args = getattr(trainer, "args", None)
        if self._checked or args is None:
            return
        try:
            kind = _config_kind(args)
        except InputError:
            return
        timeout = getattr(args, "ddp_timeout", None)
        if timeout is not None and self.deadline_s >= timeout:
            reject("deadline_s", self.deadline_s, f"below the trainer's ddp_timeout of {timeout} s")
        if kind != self.mode:
            reject("mode", repr(self.mode), f"{kind!r} for a {type(trainer).__name__}")
        issues = check_trl_config(args, reward_funcs=len(getattr(trainer, "reward_funcs", [self])))
        partial = [issue for issue in issues if issue.setting == "per_device_train_batch_size"]
        if partial and self.partial_groups == "raise" and not _evaluating(trainer):
            raise GroupingError(str(partial[0]))
        others = [issue for issue in issues if issue not in partial]
        if others and self.strict:
            raise InputError("; ".join(map(str, others)))
        for found in others:
            log.warning("advantages will not be exactly RLOO over the preferences: %s", found)
        self._checked = not _evaluating(trainer)


def _evaluating(trainer: Any) -> bool:
    model = getattr(trainer, "model", None)
    return model is not None and not getattr(model, "training", True)


def _config_kind(args: Any) -> Literal["rloo", "grpo"]:
    # By what they have, not by class: importing TRL takes seconds, and forks rename.
    if hasattr(args, "normalize_advantages") and hasattr(args, "num_generations"):
        return "rloo"
    if not (hasattr(args, "scale_rewards") and hasattr(args, "num_generations")):
        reject("args", type(args).__name__, "an RLOOConfig or a GRPOConfig")
    return "grpo"


def _rows_per_rank(args: Any) -> int:
    steps = getattr(args, "steps_per_generation", None) or getattr(args, "gradient_accumulation_steps", 1) or 1
    return int(getattr(args, "per_device_train_batch_size", 0) or 0) * int(steps)


def _metrics(scores: GroupScores | None) -> dict[str, float]:
    """The figures worth a curve. The same names on every rank and at every step: TRL averages what it gets."""
    summary: dict[str, Any] = {} if scores is None else scores.summary()
    decided = summary.get("decided_by", {})
    pairs = max(int(summary.get("pairs", 0)), 1)
    u, usage = summary.get("uncertainty") or {}, summary.get("judge_usage", {})
    cost = usage.get("cost", 0.0)
    return {
        "judge_rate": summary.get("routed", 0) / pairs,
        "judge_failed": float(decided.get("judge_failed", 0)),
        "judge_flips": float(summary.get("judge_flips", 0)),
        "judge_calls": float(usage.get("calls", 0)),
        "judge_cache_hits": float(usage.get("cache_hits", 0)),
        "judge_cost": math.nan if cost is None else float(cost),  # an unknown price is no number, never 0
        "judge_hidden_s": float(summary.get("overlap", {}).get("hidden_s", 0.0)),
        "uncertainty": float(u.get("mean", math.nan)) if u else 1.0,
    }
