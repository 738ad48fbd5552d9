"""One step of online Laplace: a head that has learned from judged pairs, made from one that has not.

What the head knows stays in as the quadratic N(β, P⁻¹), the newly judged pairs count in full, β moves to the maximum
by Newton's method over the same ``accumulate`` pass that fits a head, and P gains Σ w φφᵀ at the new β (assumed-density
filtering, Opper 1998; for logistic regression Spiegelhalter & Lauritzen 1990). No old data are needed. On the project's
preference data it is as good as fitting everything anew after each update (``bench/learning.py``).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_numbers
from rmcore.engine.learning.judged import JudgedPairs
from rmcore.head.fit import Belief, check_data, newton
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior
from rmcore.ops.dispatch import Backend

__all__ = ["LearningConfig", "UpdateReport", "fold", "posterior_of", "with_data"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningConfig:
    """How much a verdict may teach.

    Attributes:
        judge_weight: positive, what a judged pair counts, where 1 is a pair of the training data. Below 1 for a judge
            that errs more than they; above 1 where the stream has moved away from them, as an importance weight.
        flip_weight: in [0, 1], times this for a pair on which the two orders disagree. Default 0: the place of the
            answers decided, which says nothing about the answers; with any weight it would make the head surer of a
            region in which the judge has just shown that it cannot tell. A tie is an answer, and keeps its weight,
            with label 1/2.
        epsilon: in [0, 0.5), the judge's assumed error: the label of a win is 1 − ε, of a loss ε. 0 learns fastest
            from a judge that is right; the engine's ε keeps the head's logits within ±J.
        max_share: bound on the weight of one update, as a share of the data the head was first fitted on. Above it,
            all pairs of the update are weighed down alike. ``inf`` for no bound.
        max_shift: trust region: β may move by at most this times √(weight of the update), measured in the posterior's
            own standard deviations, ‖Δβ‖_P. Independent rows that each shift β by one deviation just reach 1; many
            equal rows, as from a policy that has found a blind spot of the judge, would exceed it.
        max_passes: of Newton's method in one update.
    """

    judge_weight: float = 1.0
    flip_weight: float = 0.0
    epsilon: float = 0.0
    max_share: float = 0.25
    max_shift: float = 1.0
    max_passes: int = 12

    def __post_init__(self) -> None:
        check_numbers(self, Within(above=0), "judge_weight", expected="a positive finite number")
        check_numbers(self, Within(least=0, most=1), "flip_weight", expected="a number in [0, 1]")
        check_numbers(self, Within(least=0, below=0.5), "epsilon", expected="a probability below 0.5")
        unbounded = Within(above=0, finite=False)
        check_numbers(self, unbounded, "max_share", "max_shift", expected="a positive number, or inf")
        check_numbers(self, COUNT, "max_passes", expected="a whole number, at least 1")


@dataclass(frozen=True)
class UpdateReport:
    """What one update did.

    Attributes:
        version: current after it; unchanged if there was nothing to learn; -1 from :func:`fold`, which has none.
        pairs: rows or pairs of rows folded in (in concat mode each order is one).
        weight: their total weight, after the bound.
        scaled: factor the bound put on the weights; 1 if it was not reached.
        shift: ‖Δβ‖_P, in posterior standard deviations.
        shortened: True if the trust region cut the step.
        converged: of Newton's method.
        passes: over the pairs.
        surprise: mean −log p of the labels before, nats.
        surprise_after: the same after.
        skipped: verdicts not learned from, by reason: ``failed``, ``rule``, ``flip``, ``nonfinite``, ``repeated``.
        seconds: wall time to the new head's serving weights, without the journal.
    """

    version: int
    pairs: int = 0
    weight: float = 0.0
    scaled: float = 1.0
    shift: float = 0.0
    shortened: bool = False
    converged: bool = True
    passes: int = 0
    surprise: float | None = None
    surprise_after: float | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@torch.no_grad()
def fold(
    head: FrozenHead, judged: JudgedPairs, config: LearningConfig | None = None, *, backend: Backend = "auto"
) -> tuple[FrozenHead, UpdateReport]:
    """A new head that has learned from these pairs, and what changed; ``head`` is left as it is.

    Args:
        head: a head with its posterior.
        judged: at least one pair; their weights are final.
        config: the trust region and ``max_passes``.
        backend: of the accumulate passes.

    Raises:
        InputError: shapes, labels or mode do not fit, or the head came without its posterior.
        NonFiniteError: a row holds NaN or Inf, naming it.
        FactorizationError: the new P is not positive definite in float64, or its factor does not fit the serving dtype.
    """
    config, known = config or LearningConfig(), posterior_of(head)
    check_data(head.config, judged.hidden, judged.labels, judged.pairs, judged.weights)
    weight = float(judged.weights.sum())
    if weight <= 0:
        reject("weights", "0 in all", "at least one positive weight")
    started = time.perf_counter()
    data = judged.to(head.device)
    belief = Belief(head.beta, known)
    beta, posterior, fitted = newton(
        head.feature_map,
        data.hidden,
        data.labels,
        head.config,
        pairs=data.pairs,
        beta0=head.beta0,
        sample_weight=data.weights,
        max_passes=config.max_passes,
        tolerance=1e-7,  # nats a pair; below that a handful of pairs is lost in float32 sums
        backend=backend,
        prior=belief,
    )
    move = beta - head.beta
    shift = math.sqrt(max(float(move @ (belief.empty_of_new_data("logistic").precision @ move)), 0.0))
    limit = config.max_shift * math.sqrt(weight)
    likelihood = fitted.log_posterior[-1] + shift * shift / 2
    if shortened := shift > limit:
        # The objective is concave: every point on the way is better than the start.
        log.warning("verdicts wanted to move β by %.3g posterior deviations; %.3g are allowed", shift, limit)
        beta, shift = head.beta + (limit / shift) * move, limit
        posterior, likelihood = with_data(head, beta, data, backend)
    rows = head.rows_with(data.hidden, data.pairs, data.weights, backend=backend)
    new = FrozenHead(head.config, head.feature_map, beta, head.beta0, posterior, rows=rows)
    new.build_weights()  # here, not in somebody's first score
    report = UpdateReport(
        version=-1,
        pairs=len(data),
        weight=weight,
        shift=shift,
        shortened=shortened,
        converged=fitted.converged,
        passes=fitted.passes,
        surprise=-fitted.log_posterior[0] / weight,
        surprise_after=-likelihood / weight,
        skipped=judged.skipped,
        seconds=time.perf_counter() - started,
    )
    return new, report


def posterior_of(head: FrozenHead) -> Posterior:
    """The head's posterior; raises InputError where it came without one."""
    if head.posterior is None:
        reject("head.posterior", "none", "a head fitted here or saved with include_posterior=True")
    return head.posterior


@torch.no_grad()
def with_data(head: FrozenHead, beta: Tensor, data: JudgedPairs, backend: Backend) -> tuple[Posterior, float]:
    """The posterior of ``head`` and these data at β, and the data's log-likelihood there. An update and its replay."""
    posterior = Belief(head.beta, posterior_of(head)).empty_of_new_data(head.config.likelihood)
    _, likelihood = posterior.accumulate(
        data.hidden,
        data.labels,
        head.feature_map,
        beta,
        pairs=data.pairs,
        sample_weight=data.weights,
        beta0=head.beta0,
        backend=backend,
    )
    return posterior, likelihood
