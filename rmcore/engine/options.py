"""What an engine may be made with, checked on its own: before a model loads, where the engine comes after it."""

from __future__ import annotations

from typing import Literal, get_args

from rmcore._base.clock import Clock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.engine.advantage import check_tau
from rmcore.engine.comparisons import parse_design
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.routing import NeverRoute, Router
from rmcore.head.estimators import PairEstimator, VarianceKind
from rmcore.judge.base import Judge
from rmcore.model.uncertainties import HEAD, check_uncertainty
from rmcore.ops.dispatch import Backend, explain

__all__ = ["check_engine_options", "check_estimator_goes", "check_reliability"]


def check_engine_options(
    judge: Judge | None = None,
    router: Router | None = None,
    *,
    epsilon: float = 0.12,
    nonfinite: Literal["raise", "route"] = "raise",
    orders: Literal["both", "one"] = "both",
    backend: Backend = "auto",
    judge_deadline_s: float | None = None,
    micro_batch_tokens: int | None = None,
    novelty: bool | None = None,
    design: str = "all",
    uncertainty: str | PairEstimator | None = None,
    variance: VarianceKind | None = None,
    learner: VerdictLearner | None = None,
    clock: Clock | None = None,
) -> None:
    """Raise InputError for arguments that a :class:`~rmcore.engine.RewardEngine` would refuse, whatever its model.

    The arguments are the engine's, without the model.

    Raises:
        InputError: one of them does not fit, by itself or beside another.
        TypeError: a keyword that the engine does not have.
    """
    if judge is not None and not isinstance(judge, Judge):
        reject("judge", type(judge).__name__, "an object with an async judge(pairs) method")
    if router is not None and not callable(getattr(router, "select", None)):
        reject("router", type(router).__name__, "an object with a select(candidates) method")
    if judge is None and router is not None and not isinstance(router, NeverRoute):
        reject("judge", "None", f"a judge, since {type(router).__name__} may route pairs")
    check_number("epsilon", epsilon, Within(above=0, below=0.5), "a probability strictly between 0 and 0.5")
    if nonfinite not in ("raise", "route"):
        reject("nonfinite", repr(nonfinite), "'raise' or 'route'")
    if nonfinite == "route" and judge is None:
        reject("nonfinite", "'route'", "'raise', since there is no judge to route to")
    if orders not in ("both", "one"):
        reject("orders", repr(orders), "'both' or 'one'")
    explain("score", backend=backend)
    if judge_deadline_s is not None:
        check_number("judge_deadline_s", judge_deadline_s, Within(above=0), "seconds above 0, or None")
    if micro_batch_tokens is not None:
        check_number("micro_batch_tokens", micro_batch_tokens, COUNT, "at least 1, or None")
    if novelty not in (None, True, False):
        reject("novelty", repr(novelty), "True, False or None")
    if novelty is False and getattr(router, "by", None) == "novelty":
        reject("novelty", "False", "True or None, since the router goes by it")
    parse_design(design)
    if isinstance(uncertainty, str):
        check_uncertainty(uncertainty)
    elif uncertainty is not None and not callable(getattr(uncertainty, "pairs", None)):
        reject("uncertainty", type(uncertainty).__name__, "an estimator's name, an object with pairs, or None")
    if variance is not None and variance not in get_args(VarianceKind):
        reject("variance", repr(variance), "'epistemic', 'aleatoric' or 'total', or None")
    if uncertainty is not None and uncertainty != HEAD:
        check_estimator_goes("uncertainty", "given", learner=learner, nonfinite=nonfinite)
    if learner is not None and not isinstance(learner, VerdictLearner):
        reject("learner", type(learner).__name__, "a VerdictLearner, or None")
    if clock is not None and not callable(getattr(clock, "now", None)):
        reject("clock", type(clock).__name__, "an object with now, wall and sleep")


def check_estimator_goes(name: str, got: str, *, learner: VerdictLearner | None, nonfinite: str) -> None:
    """Raise InputError where an estimator cannot stand in the head's place."""
    if learner is not None:
        reject(name, f"{got} beside a learner", "None, since what learns is the head")
    if nonfinite == "route":
        reject(name, f"{got} with nonfinite='route'", "'raise': estimators take finite rows only")


def check_reliability(tau: float, *, mode: str, design: str) -> None:
    """Raise InputError where advantages cannot be weighted by their variance, which τ asks for.

    Args:
        tau: of :func:`rmcore.engine.advantage.reliability_weights`.
        mode: of the head: in concat mode pairs have no covariance.
        design: of the engine: the variance of a partial design is not known.
    """
    check_tau(tau, "reliability_tau")
    if mode != "difference":
        reject("reliability_tau", f"given in {mode} mode", "None: only in difference mode pairs have a covariance")
    if design != "all":
        reject("reliability_tau", f"given beside design={design!r}", "None, or all pairs compared")
