"""Rewards for TRL's RLOOTrainer and GRPOTrainer, in process (read from TRL 1.16).

    reward = PairwiseReward("my-reward-model", judge=ChatJudge(...), router=AdaptiveRouter(0.1))
    trainer = RLOOTrainer(model, reward_funcs=reward, args=RLOOConfig(beta=0.0, num_generations=8, ...), ...)

The advantages the trainer computes are then exactly RLOO over the judged pairwise preferences
(``GroupScores.advantages``), as long as nothing else is mixed into the reward: :func:`check_trl_config` lists what
would be.

:class:`PairwiseRewardTrainer` trains such a model (:mod:`rmcore.integrations.training`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rmcore._base import lazy
from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.engine.advantage import check_tau
from rmcore.engine.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.engine.options import check_engine_options, check_reliability
from rmcore.engine.routing import BudgetedRouter, Router, StatefulRouter
from rmcore.engine.selection import member_uncertainties
from rmcore.integrations.reference import (
    Answers,
    OverReference,
    ReferenceAnswers,
    ReferenceSource,
    preference_over_reference,
)
from rmcore.integrations.rows import GroupingError, alone, group_size_of_runs, prompt_key, split_groups
from rmcore.integrations.trl_config import LOCALITY, ConfigIssue, check_trl_config, config_kind
from rmcore.integrations.trl_metrics import mean_weight, score_metrics
from rmcore.judge.base import Judge
from rmcore.model.text import OverlongPolicy, TextLimit

if TYPE_CHECKING:
    from rmcore.integrations.training import PairwiseRewardConfig, PairwiseRewardTrainer
    from rmcore.integrations.trl_state import RewardStateCallback

__all__ = ["ConfigIssue", "PairwiseReward", "PairwiseRewardConfig", "PairwiseRewardTrainer", "check_trl_config"]

log = logging.getLogger(__name__)


# transformers' Trainer takes seconds to import, which a reward need not pay.
__getattr__, __dir__, _ = lazy.attach(
    __name__, {"rmcore.integrations.training": ("PairwiseRewardConfig", "PairwiseRewardTrainer")}
)


@dataclass(frozen=True)
class _Rows:
    """What a call is about, one entry a row."""

    prompts: list[Canonical]
    texts: list[Canonical]
    keys: list[Any]
    references: list[Answers] | None

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        """The rows of all ranks; their data have the same columns."""
        references = [part.references for part in parts]
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            [text for part in parts for text in part.texts],
            [key for part in parts for key in part.keys],
            None if None in references else [answers for part in references for answers in part or ()],
        )


_Scored: TypeAlias = tuple[list[float | None], GroupScores | None, OverReference | None]


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
        reference: a reference policy's answers to the prompts, over which the preference of the completions is logged
            (``rmcore/preference_over_reference``, ``win_rate_over_reference``, ``reference_share``; by the head alone,
            without a judge, and without a change to the rewards): the name of a dataset column, the ``Path`` of a file
            of groups, or a function from a prompt to an answer. None: the column ``reference_completion``, where the
            data has it. Rewards average 0, so this is the curve to look at and to choose checkpoints by.
        reference_every: compare in every so many calls; the completions are encoded once more for it. At evaluation it
            is always done.
        reliability_tau: weigh advantages by 1/(1 + variance/τ), the variance that the head's posterior leaves open of
            them (``GroupScores.advantage_variance``); τ is the one at which they count half. The trainer's baseline
            takes the group's mean of the weighted ones away (:func:`~rmcore.engine.advantage.reliable_advantages`,
            ``centred``). The mean weight is logged as ``rmcore/reliability``. None: advantages as they are.
        deadline_s: seconds after which a call fails. Verdicts not in after 80% of it are given up: those pairs keep
            the head's preference. It must be below the trainer's ``ddp_timeout``, which would end the run instead.
        strict: raise if :func:`check_trl_config` finds anything; by default it is logged once as warnings.
        max_length: most tokens of a text; None is what the model was saved with.
        overlong: what happens to longer ones, likewise (:data:`~rmcore.model.text.OverlongPolicy`). ``no-reward`` gives
            such a completion None and the rest of its group the rewards they would have without it.
        engine_options: further keyword arguments of :class:`~rmcore.engine.RewardEngine` for a folder; checked now,
            like ``judge`` and ``router``, not when the model is loaded.

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
        reference: ReferenceSource | None = None,
        reference_every: int = 1,
        reliability_tau: float | None = None,
        deadline_s: float = 900.0,
        strict: bool = False,
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
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
        if reference_every < 1:
            reject("reference_every", reference_every, "at least 1")
        if reliability_tau is not None:
            check_tau(reliability_tau, "reliability_tau")
            if isinstance(model, RewardEngine):
                check_reliability(reliability_tau, mode=model.head.config.mode, design=model.design)
        self.__name__ = "pairwise_reward"  # what TRL calls its metrics after
        self.mode = mode
        self.num_generations = num_generations
        self.group_by = group_by
        self.partial_groups = partial_groups
        self.reference = ReferenceAnswers(reference)
        self.reference_every = reference_every
        self.reliability_tau = reliability_tau
        self.deadline_s = deadline_s
        self.strict = strict
        limit = {"max_length": max_length, "overlong": overlong}
        self.limit: dict[str, Any] = {name: value for name, value in limit.items() if value is not None}
        TextLimit(**self.limit)
        self.last: GroupScores | None = None
        self._path = None if isinstance(model, RewardEngine) else os.fspath(model)
        self._settings = {"judge": judge, "router": router, **engine_options}
        self._engine = model if isinstance(model, RewardEngine) else None
        if self._path is not None:
            try:
                check_engine_options(**self._settings)
            except TypeError as error:
                raise InputError(f"engine_options: {error}; expected arguments of RewardEngine") from None
        self._checked = self._warned = self._warned_alone = False
        self._calls = 0  # in training
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
                engine = RewardEngine(RewardModel.from_pretrained(self._path), **options)
                if self.reliability_tau is not None:
                    check_reliability(self.reliability_tau, mode=engine.head.config.mode, design=engine.design)
                self._engine = engine
            return self._engine

    @property
    def keeps_state(self) -> bool:
        """Whether the engine has anything that a restart must not lose: a router with state, or a learner."""
        engine = self._engine
        router = self._settings.get("router") if engine is None else engine.router
        learner = self._settings.get("learner") if engine is None else engine.learner
        return learner is not None or isinstance(router, (BudgetedRouter, StatefulRouter))

    def callback(
        self, *, restore: bool = True, checkpoint: str | os.PathLike[str] | None = None
    ) -> RewardStateCallback:
        """The trainer callback that keeps budgets, router and learned head in its checkpoints.

        A trainer without one gets one at the first call, so it need only be made by hand to set its arguments
        (:class:`~rmcore.integrations.trl_state.RewardStateCallback`), or where the trainer cannot be seen through the
        ``log_metric`` it passes.
        """
        from rmcore.integrations.trl_state import RewardStateCallback

        return RewardStateCallback(self, restore=restore, checkpoint=checkpoint)

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
        keeper = await self._keeper(trainer, columns)
        answers = [canonical_response(c, f"completions[{k}]") for k, c in enumerate(completions)]
        asked = [canonical_prompt(prompt, f"prompts[{k}]") for k, prompt in enumerate(prompts)]
        if len(answers) != len(asked):
            reject("completions", len(answers), f"{len(asked)}, one a prompt")
        references = await asyncio.to_thread(self._references, asked, columns, trainer)
        rows = _Rows(asked, answers, self._keys(prompts, columns), references)
        try:
            if self.partial_groups == "gather":
                rewards, scores, over = await self._gathered(rows, trainer)
            else:
                async with asyncio.timeout(self.deadline_s):
                    size = self._group_size(rows.keys, trainer)
                    rewards, scores, over = await self._score(split_groups(rows.keys, size, setting=LOCALITY), rows)
        finally:
            if keeper is not None and trainer is not None:
                await asyncio.to_thread(keeper.note_spent, trainer.args)
        self.last = scores
        if log_metric is not None:
            metrics = score_metrics(scores) | ({} if over is None else over.metrics())
            if self.reliability_tau is not None:
                metrics["reliability"] = mean_weight(scores, self.reliability_tau)
            for name, value in metrics.items():
                log_metric(f"rmcore/{name}", value)
        if log_extra is not None and self.partial_groups == "raise" and scores is not None:
            log_extra("uncertainty", member_uncertainties(scores).tolist())
        return rewards

    async def _score(self, groups: list[range], rows: _Rows) -> _Scored:
        if not groups:
            return [], None, None
        engine = await asyncio.to_thread(lambda: self.engine)
        prompts = [rows.prompts[group[0]] for group in groups]
        texts = [[rows.texts[row] for row in group] for group in groups]
        scores = await engine.score_async(prompts, texts, **self.limit)
        over = None
        if rows.references is not None:
            references = [rows.references[group[0]] for group in groups]
            over = await preference_over_reference(engine, prompts, texts, references, **self.limit)
        baseline: Literal["leave-one-out", "group-mean"] = "leave-one-out" if self.mode == "rloo" else "group-mean"
        # TRL counts a None as 0 in its baseline.
        how: dict[str, Any] = {"missing_as_zero": True, "tau": self.reliability_tau}
        values = [float(r) for group in scores for r in group.rewards_for(baseline, **how)]
        return [None if math.isnan(value) else value for value in values], scores, over

    async def _gathered(self, rows: _Rows, trainer: Any) -> _Scored:
        """Rows of all ranks put together, each rank's share of the groups scored, rewards handed back to their rows."""
        from accelerate import PartialState
        from accelerate.utils import gather_object

        until = asyncio.get_running_loop().time() + self.deadline_s
        state = PartialState()
        # Collectives block, so they leave the event loop alone; every rank makes the same two.
        everything = await asyncio.to_thread(gather_object, [rows])
        error: Exception | None = None
        mine: dict[int, float | None] = {}
        scores = over = None
        try:
            everyone = _Rows.joined(everything)
            groups = split_groups(everyone.keys, self._group_size(everyone.keys, trainer), setting="")
            share = groups[state.process_index :: state.num_processes]
            async with asyncio.timeout_at(until):  # not of the collectives: a rank that is late is in both all the same
                rewards, scores, over = await self._score(share, everyone)
            mine = dict(zip([row for group in share for row in group], rewards, strict=True))
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
        start = sum(len(part.texts) for part in everything[: state.process_index])
        return [merged[start + k] for k in range(len(rows.texts))], scores, over

    async def _keeper(self, trainer: Any, columns: dict[str, Any]) -> RewardStateCallback | None:
        """The trainer's callback for this reward's state, made and attached now where it has none."""
        if not self.keeps_state:
            return None
        handler = getattr(trainer, "callback_handler", None)
        if handler is None:
            if "trainer_state" in columns and not self._warned:
                self._warned = True
                log.warning(
                    "budgets, router and learned head are not in the trainer's checkpoints, since the trainer is not "
                    "visible from here: pass reward.callback() to its callbacks, and log_metric to the reward"
                )
            return None
        from rmcore.integrations.trl_state import RewardStateCallback

        ours = (one for one in handler.callbacks if isinstance(one, RewardStateCallback) and one.reward is self)
        keeper = next(ours, None)
        if keeper is None:
            keeper = self.callback()
            trainer.add_callback(keeper)
        # An evaluation at step 0 may come before a run that resumes: not its beginning.
        if not keeper.begun and (trainer.state.global_step or not _evaluating(trainer)):
            await asyncio.to_thread(keeper.begin, trainer.args, trainer.state)
        return keeper

    def _references(self, prompts: list[Canonical], columns: dict[str, Any], trainer: Any) -> list[Answers] | None:
        if not _evaluating(trainer):
            self._calls += 1
            if (self._calls - 1) % self.reference_every:
                return None
        return self.reference.find(prompts, columns)

    def _keys(self, prompts: Sequence[Any], columns: dict[str, Any]) -> list[Any]:
        if self.group_by is not None and self.group_by in columns:
            keys = list(columns[self.group_by])
            if len(keys) != len(prompts):
                reject(self.group_by, f"{len(keys)} values", f"{len(prompts)}, one a row")
            # A row without an id belongs with its prompt's, not with all others without one.
            return [
                prompt_key(prompt, f"prompts[{k}]")
                if key is None or (isinstance(key, float) and math.isnan(key))
                else key
                for k, (key, prompt) in enumerate(zip(keys, prompts, strict=True))
            ]
        return [prompt_key(prompt, f"prompts[{k}]") for k, prompt in enumerate(prompts)]

    def _group_size(self, keys: list[Any], trainer: Any) -> int:
        if self.num_generations is not None and not _evaluating(trainer):
            if self.num_generations == 1 and not self._warned_alone:
                self._warned_alone = True
                log.warning("%s", alone("num_generations"))
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
            kind = config_kind(args)
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
