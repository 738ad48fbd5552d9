"""A router that holds a fraction of pairs, or a budget, while the uncertainty it routes by drifts.

**Why a fixed threshold fails under RL.** A threshold on u is chosen on some data: "u > 1.4 is the most uncertain
tenth". But the policy is trained *against* the reward model. Its outputs leave the data the head was fitted on, and
as they do the whole distribution of u moves, by several of its own widths in a run. The threshold that routed a tenth
then routes everything, and the judge's bill explodes; or the head is updated from verdicts, u falls, and nothing is
routed at all. What was meant as a budget was a point on a scale that moves.

**What is done instead.** Pairs above a moving quantile of the score are routed:

    k pairs of a micro-batch: those above the upper ``level``-tail of an exponentially forgetting sample of scores
    level = target + C / max(half_life, batch),    C += target · batch − k

The quantile follows the drift; C, the pairs owed, corrects what the quantile gets wrong by lagging. This is adaptive
conformal inference (Gibbs & Candès 2021, arXiv 2106.00170; conformal PID control, arXiv 2307.16895) on the upper tail,
and its guarantee needs no assumption on the stream: where the level leaves [0, 1] everything or nothing is routed, so
for every sequence of scores, an adversary's included, with n the largest micro-batch, N = max(half_life, n),

    −(target · N + n)  ≤  target · pairs − pairs wanted  ≤  (1 − target) · N + n

and the realised fraction converges to the target like 1 / pairs. Equal scores (a constant u, say) are told apart by a
seeded coin, so ties are routed in the target's proportion, neither all nor none.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.numbers import Within, check_number
from rmcore.engine.routing.budget import Budget
from rmcore.engine.routing.drift import Drift, StepLog, StepRecord
from rmcore.engine.routing.pacing import Pace
from rmcore.engine.routing.recent import Floats, ForgettingSample
from rmcore.engine.routing.routers import (
    Candidates,
    PairScore,
    RankBy,
    Reservation,
    check_threshold_score,
    rank_score,
    score_name,
)
from rmcore.engine.routing.state import generator_of, plain, read_state, write_state
from rmcore.judge.base import JudgeUsage

__all__ = ["AdaptiveRouter"]

_FORMAT, _VERSION = "rmcore-adaptive-router", 1


@dataclass
class _Open:
    """A reservation in flight."""

    reservation: Reservation
    parts: tuple[Reservation, ...] = ()  # one a budget
    spend: dict[str, float] = field(default_factory=dict)  # of its step, which may be over when it is settled


class AdaptiveRouter:
    """Holds a fraction of pairs or a budget by moving the threshold. See the module's text.

    Within a micro-batch the highest scores go first when the budget does not reach. What a budget denied is not caught
    up later: that would route the certain pairs of a calm time for the uncertain ones of a busy one.

    Until ``warmup`` pairs have been seen the top of each micro-batch is routed by rank, as by a BudgetRouter; what
    rounding down leaves over is carried on, so micro-batches of one pair get their share too.

    Pairs with u = inf (a non-finite hidden state) come first and count against the budget, but not in the fraction.

    Safe to use from several threads and tasks. Concurrent score calls share the fraction and the budgets; each begins
    a step, so give a budget per step only to a router that scores one batch at a time.

    Args:
        target_fraction: of pairs to route. Without it, it follows from the budgets: what is left over what is to come.
        budget: hard limits, none ever exceeded (:mod:`rmcore.engine.routing.budget` says exactly what that means). With
            a ``target_fraction`` they slow the router down before they run out, where it can be foreseen.
        by: the score: any but ``rank_sum``, which has no scale outside one batch. A
            :class:`~rmcore.engine.routing.learned_score.LearnedScore` then learns from the verdicts.
        warmup: pairs to see before the quantile is trusted.
        half_life: pairs after which a score counts half in the quantile. Shorter follows faster and is noisier.
        first_fraction: what to route while only budgets are given and the first step (or minute) is not over, so that
            the number of pairs to come is unknown.
        run_pairs: how many pairs the run will bring, about. Lets a budget per run be spread over it; needed if such a
            budget is all there is.
        history: steps to remember.
        seed: of the coin for ties.

    Raises:
        InputError: an argument is out of range, or nothing says how much to route.

    Example:
        >>> tokens = Budget(2_000_000, "tokens", "step", max_per_pair=6_000)
        >>> router = AdaptiveRouter(0.1, tokens)  # a tenth of the pairs, and never more than 2M tokens a step
        >>> router.begin_step()
        >>> u = torch.linspace(1, 2, 100)
        >>> mask, reservation = router.reserve(Candidates(torch.zeros(100), u**2 - 1, u))
        >>> int(mask.sum()), reservation
        (10, Reservation(id=1, pairs=10, amount=(60000.0,)))
        >>> router.settle(reservation, JudgeUsage(calls=20, prompt_tokens=30_000, completion_tokens=4_000))
        >>> tokens.stats().left
        1966000.0
    """

    whole_batch: ClassVar[bool] = False

    def __init__(
        self,
        target_fraction: float | None = None,
        budget: Budget | Sequence[Budget] | None = None,
        *,
        by: RankBy | PairScore = "u",
        warmup: int = 128,
        half_life: float = 512,
        first_fraction: float = 0.1,
        run_pairs: int | None = None,
        history: int = 1000,
        seed: int = 0,
    ) -> None:
        if target_fraction is not None:
            _check_fraction("target_fraction", target_fraction)
        _check_fraction("first_fraction", first_fraction)
        check_threshold_score(by)
        for name, value, low in (("warmup", warmup, 0), ("history", history, 1), ("seed", seed, 0)):
            _check_count(name, value, low)
        if run_pairs is not None:
            _check_count("run_pairs", run_pairs, 1)
        self.target_fraction = target_fraction
        self.budgets = _check_budgets(budget)
        self.by: RankBy | PairScore = by
        self.warmup = warmup
        self.first_fraction = first_fraction
        self.run_pairs = run_pairs
        self._paces = [Pace(b, run_pairs) for b in self.budgets]
        if target_fraction is None and not any(pace.plans for pace in self._paces):
            expected = "one of them, or run_pairs with a budget per run"
            reject("target_fraction, budget", "nothing that says how much to route", expected)
        self._sample = ForgettingSample(half_life)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._lock = threading.RLock()
        self._pairs = 0  # of the run, unusable ones included
        self._owed = 0.0  # C
        self._threshold: float | None = None
        self._history, self._names = history, [b.name for b in self.budgets]
        self._log = StepLog(score_name(by), history, self._names)
        self._open: dict[int, _Open] = {}
        self._next_id = 1

    # -- the router's verbs ------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A step begins: budgets per step are full again, the history gets a line for the one before."""
        with self._lock:
            if self._log.pairs:
                for pace in self._paces:
                    pace.end_step(self._log.pairs)
            self._log.begin_step()
            for budget in self.budgets:
                budget.begin_step()

    def select(self, candidates: Candidates) -> Tensor:
        """As :meth:`reserve`, for callers who cannot say what pairs cost: all that was reserved counts as spent."""
        mask, reservation = self.reserve(candidates)
        self.settle(reservation, None)
        return mask

    def reserve(self, candidates: Candidates) -> tuple[Tensor, Reservation]:
        """Choose pairs and set aside what they may cost.

        Returns:
            (Q,) bool, True where the pair goes to the judge; and the reservation for :meth:`settle`.
        """
        score, u = (_values(t) for t in (rank_score(candidates, self.by), candidates.uncertainty))
        usable = np.isfinite(u) & ~np.isnan(score)
        with self._lock:
            target = self._target(len(candidates))
            wanted = self._wanted(score[usable], target)
            order = np.concatenate([np.flatnonzero(~usable), np.flatnonzero(usable)[self._ranked(score[usable])]])
            wanted += int((~usable).sum())
            granted, parts = self._grant(wanted)
            chosen = torch.zeros(len(candidates), dtype=torch.bool)
            chosen[torch.from_numpy(order[:granted])] = True
            self._pairs += len(candidates)
            spend = self._log.add(
                u[usable], score[usable], len(candidates), granted, wanted - granted, target, self._threshold
            )
            if self._sample.seen >= self.warmup and self._threshold is not None:
                self._log.fix(self._threshold)
            reservation = Reservation(self._next_id, granted, tuple(amount for part in parts for amount in part.amount))
            self._next_id += 1
            if granted:
                self._open[reservation.id] = _Open(reservation, parts, spend)
            else:  # needs no settling, so nothing may stay open in the budgets either
                for budget, part in zip(self.budgets, parts, strict=True):
                    budget.settle(part, None)
        return chosen, reservation

    def settle(self, reservation: Reservation, usage: JudgeUsage | None) -> None:
        """Book what a reservation's pairs cost, exactly once; one without pairs needs no settling.

        Args:
            reservation: from :meth:`reserve`.
            usage: of all its pairs together. ``None``: unknown, so everything reserved counts as spent.

        Raises:
            InputError: the reservation is not this router's, or was settled before.
        """
        if usage is not None and not isinstance(usage, JudgeUsage):
            reject("usage", type(usage).__name__, "a JudgeUsage or None")
        if isinstance(reservation, Reservation) and not reservation.pairs:
            return
        with self._lock:
            known = self._open.get(reservation.id) if isinstance(reservation, Reservation) else None
            if known is None or known.reservation != reservation:
                reject("reservation", reservation, "a reservation of this router that was not settled before")
            del self._open[reservation.id]
            for budget, part in zip(self.budgets, known.parts, strict=True):
                known.spend[budget.name] += budget.settle(part, usage)

    @property
    def sketch(self) -> Tensor | None:
        """Training rows, where the score wants distances to them."""
        return getattr(self.by, "sketch", None)

    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """Hand the verdicts to a score that learns; see :class:`~rmcore.engine.routing.routers.VerdictRouter`."""
        if not isinstance(self.by, str):
            self.by.observe(candidates, routed, preference)

    # -- what has happened -------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float | None:
        """The score above which pairs were routed last; None before the first pair."""
        return self._threshold

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """One record a step, oldest first, the current step last; ``plot_routing`` draws it."""
        with self._lock:
            return self._log.records()

    def drift(self) -> Drift:
        """How far u has moved since the first step, and what a fixed threshold would have done."""
        with self._lock:
            return self._log.drift(self._threshold)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, and the spend, as JSON values. What is in flight counts as spent."""
        with self._lock:
            return {
                "format": _FORMAT,
                "version": _VERSION,
                "by": score_name(self.by),
                "next_id": self._next_id,
                "pairs": self._pairs,
                "owed": self._owed,
                "threshold": plain(self._threshold),
                "random": self._random.bit_generator.state,
                "sample": self._sample.state_dict(),
                "paces": [pace.state_dict() for pace in self._paces],
                "budgets": [budget.state_dict() for budget in self.budgets],
                "log": self._log.state_dict(),
            } | ({} if isinstance(self.by, str) else {"score": self.by.state_dict()})

    def load_state_dict(self, state: object) -> None:
        """Continue from a state, bit for bit if the router was made with the same arguments.

        Score, half-life and the kinds of the budgets must be the same; the target and the limits may be new ones.

        Raises:
            CheckpointError: the state is damaged, of another version or of another kind of router. Nothing is changed.
            InputError: reservations are in flight.
        """
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import RouterState

        found = checked(RouterState, state, "router")
        budgets, paces = found.budgets, found.paces
        name = score_name(self.by)
        if found.by != name:
            refuse("router.by", found.by, f"{name!r}, as this object was made with")
        if (found.score is None) != isinstance(self.by, str):
            refuse("router.score", found.score, "the state of a score that learns, where there is one, and only there")
        if not len(budgets) == len(paces) == len(self.budgets):
            kinds = [f"{budget.unit} per {budget.per}" for budget in budgets]
            refuse("router.budgets", kinds, f"the states of {len(self.budgets)} budgets and of their paces")
        with self._lock:
            if self._open:
                reject("state", f"{len(self._open)} reservations in flight", "none: settle them before loading a state")
            names = [f"router.budgets[{k}]" for k in range(len(budgets))]
            for budget, item, where in zip(self.budgets, budgets, names, strict=True):
                budget.check_state(item, where)
            log = StepLog.from_state(found.log, "router.log", name, self._history, self._names)
            parsed = {
                "_sample": ForgettingSample.from_state(found.sample, "router.sample", self._sample.half_life),
                "_log": log,
                "_paces": [
                    Pace.from_state(item, f"router.paces[{k}]", budget, self.run_pairs)
                    for k, (item, budget) in enumerate(zip(paces, self.budgets, strict=True))
                ],
                "_random": generator_of(found.random.model_dump(), "router.random"),
                "_pairs": found.pairs,
                "_owed": found.owed,
                "_threshold": found.threshold,
                "_next_id": found.next_id,
            }
            if not isinstance(self.by, str):
                self.by.load_state_dict(found.score)
            for budget, item, where in zip(self.budgets, budgets, names, strict=True):
                budget.load_state_dict(item, where)
            self.__dict__.update(parsed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON, whole or not at all."""
        write_state(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file written by :meth:`save`. Raises as :meth:`load_state_dict`, naming the file."""
        state = read_state(path)
        try:
            self.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    # -- inside the lock ---------------------------------------------------------------------------------------------

    def _target(self, pairs: int) -> float:
        """The share of the next pairs to route."""
        planned = [pace.fraction(pairs, self._pairs, self._log.pairs) for pace in self._paces]
        known = [fraction for fraction in planned if fraction is not None]
        if self.target_fraction is not None:
            known.append(self.target_fraction)
        return min(known, default=self.first_fraction)

    def _wanted(self, score: Floats, target: float) -> int:
        """How many of these to route, budgets apart; moves the threshold."""
        count = len(score)
        span = max(self._sample.half_life, count)
        tail = self._sample.tail(target + self._owed / span, score)
        # The small term keeps 0.1 · 10 (0.9999...) from losing a pair to rounding.
        by_rank = min(max(math.floor(self._owed + target * count + 1e-9), 0), count)
        coin = self._random.random()
        higher, equal = int((score > tail.threshold).sum()), int((score == tail.threshold).sum())
        by_quantile = higher + math.floor(tail.tied * equal + coin)
        wanted = by_rank if self._sample.seen < self.warmup else by_quantile
        if count:
            self._threshold = tail.threshold
        self._owed += target * count - wanted
        self._sample.add(score)
        return wanted

    def _ranked(self, score: Floats) -> Any:
        """Indices, highest score first, equal ones in random order."""
        return np.lexsort((self._random.random(len(score)), -score))

    def _grant(self, wanted: int) -> tuple[int, tuple[Reservation, ...]]:
        """Reserve in every budget as many of the wanted pairs as fit in all of them."""
        granted, parts = wanted, []
        for budget in self.budgets:
            parts.append(budget.reserve(granted))
            granted = parts[-1].pairs
        return granted, tuple(
            part if part.pairs == granted else budget.shrink(part, granted)
            for budget, part in zip(self.budgets, parts, strict=True)
        )


def _values(tensor: Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()


def _check_fraction(name: str, value: object) -> None:
    check_number(name, value, Within(least=0, most=1), "a number in [0, 1]")


def _check_count(name: str, value: object, low: int) -> None:
    check_number(name, value, Within(whole=True, least=low), f"an integer, {low} or more")


def _check_budgets(budget: object) -> tuple[Budget, ...]:
    if budget is None:
        return ()
    budgets = (budget,) if isinstance(budget, Budget) else budget
    if not isinstance(budgets, Sequence) or not all(isinstance(b, Budget) for b in budgets):
        reject("budget", type(budget).__name__, "a Budget or a sequence of them")
    names = [b.name for b in budgets]
    if len(set(names)) != len(names):
        reject("budget", f"budgets {names}", "at most one of a kind: the smaller limit is the one that counts")
    return tuple(budgets)
