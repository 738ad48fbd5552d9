"""What in a TRL trainer's configuration keeps its advantages from being RLOO over the preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rmcore._base.errors import reject

__all__ = ["LOCALITY", "ConfigIssue", "check_trl_config", "config_kind"]

LOCALITY = (
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
    kind = config_kind(args)
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
                LOCALITY + ".",
            )
        )
    return issues


def config_kind(args: Any) -> Literal["rloo", "grpo"]:
    """Which trainer's configuration this is; raises InputError where it is neither's."""
    # By what they have, not by class: importing TRL takes seconds, and forks rename.
    if hasattr(args, "normalize_advantages") and hasattr(args, "num_generations"):
        return "rloo"
    if not (hasattr(args, "scale_rewards") and hasattr(args, "num_generations")):
        reject("args", type(args).__name__, "an RLOOConfig or a GRPOConfig")
    return "grpo"


def _rows_per_rank(args: Any) -> int:
    steps = getattr(args, "steps_per_generation", None) or getattr(args, "gradient_accumulation_steps", 1) or 1
    return int(getattr(args, "per_device_train_batch_size", 0) or 0) * int(steps)
