"""Which pairs go to the judge: small policies with one verb, ``select``.

A router says with ``whole_batch`` whether it needs all candidate pairs of a score call at once, or can be asked
micro-batch by micro-batch, so that judge calls start while the backbone still runs. Routers that keep to a budget
(:class:`BudgetedRouter`) reserve before the judge is called and are told afterwards what it cost.

A router ranks by one of five scores, highest first:

- ``u``: the epistemic uncertainty (default, as in the paper). Finds what is *unlike the training data*, where the head
  is confidently wrong.
- ``margin``: −|p|, the closest calls. Better than u *in* distribution, harmful off it: a confidently wrong head has
  large margins exactly where it errs.
- ``error_probability``: −|g| / √v, how likely the sign of g is wrong under the posterior.
- ``novelty``: how far the two responses are from the training rows (:mod:`rmcore.head.rows`); difference mode only.
- ``rank_sum``: the ranks by u and by margin added; never the best, seldom bad.

or by an object that scores pairs, :class:`~rmcore.engine.routing.learned_score.LearnedScore`: P(the head is wrong),
learned from the verdicts. None of the others wins everywhere; that one finds out which does on the stream at hand.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.numbers import SEED, Within, check_number

if TYPE_CHECKING:
    from rmcore.judge.base import JudgeUsage

__all__ = [
    "AlwaysRoute",
    "BudgetRouter",
    "BudgetedRouter",
    "Candidates",
    "NeverRoute",
    "PairScore",
    "RandomRouter",
    "RankBy",
    "Reservation",
    "Router",
    "ThresholdRouter",
    "VerdictRouter",
    "check_threshold_score",
    "is_budgeted",
    "rank_score",
    "score_name",
]

RankBy: TypeAlias = Literal["u", "margin", "error_probability", "novelty", "rank_sum"]


@runtime_checkable
class PairScore(Protocol):
    """A score of pairs that is an object: one that learns from verdicts, say."""

    name: str

    def __call__(self, candidates: Candidates) -> Tensor:
        """(Q,) float64, highest first."""
        ...

    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """As :meth:`VerdictRouter.observe`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next score depends on, JSON values."""
        ...

    def load_state_dict(self, state: object) -> None:
        """Go on from a state; raise CheckpointError where it does not fit, and change nothing then."""
        ...


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pairs a router may choose from, one value a pair, all (Q,) float on the CPU.

    Attributes:
        logit: g.
        variance: v.
        uncertainty: u = √(1 + a v).
        columns: what else is known of the pairs, by name: ``group``, and ``novelty`` where the head knows it, Inf where
            u is.

    Pairs whose inputs tell nothing (different responses, one input) have g = 0 and v = u = Inf: first in line by every
    score.
    """

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logit)

    def __getitem__(self, rows: Tensor) -> Candidates:
        """Some of the pairs, by a mask or by numbers."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Candidates(self.logit[rows], self.variance[rows], self.uncertainty[rows], columns)


class Router(Protocol):
    """Anything that chooses pairs.

    A router may carry ``whole_batch``: True if choosing a pair depends on the rest of the batch, False if pairs can be
    chosen micro-batch by micro-batch, as they come. Without it True is assumed.
    """

    def select(self, candidates: Candidates) -> Tensor:
        """(Q,) bool, True where the pair goes to the judge."""
        ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one ``reserve`` of a :class:`BudgetedRouter`, or of a ``Budget``, set aside. Hand it to ``settle``, once.

    Attributes:
        id: names it; unique within its router or budget.
        pairs: for how many pairs.
        amount: what was set aside in each of the router's budgets, in that budget's unit and order; a budget's own is
            one number.
    """

    id: int
    pairs: int
    amount: tuple[float, ...] = ()


@runtime_checkable
class BudgetedRouter(Router, Protocol):
    """A router that reserves what its pairs may cost and is told what they did cost.

    Any number of reservations may be open at once, and they may be settled in any order and from any thread.
    """

    def begin_step(self) -> None:
        """A step begins; the engine calls it once at the start of every score call."""
        ...

    def reserve(self, candidates: Candidates) -> tuple[Tensor, Reservation]:
        """The mask as of ``select``, and what was set aside for it.

        Candidates with u = inf (a non-finite hidden state, with the engine's ``nonfinite="route"``) come first in line
        but are bound by the budget like any other.
        """
        ...

    def settle(self, reservation: Reservation, usage: JudgeUsage | None) -> None:
        """What the pairs of a reservation cost; to be called exactly once a reservation.

        ``None`` means that nobody knows (the calls were cancelled, say): everything reserved then counts as spent.
        """
        ...


@runtime_checkable
class VerdictRouter(Router, Protocol):
    """A router that learns from what became of the pairs it chose."""

    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """What the judge said; the engine calls it exactly once a choice, when the score call is over.

        Args:
            candidates: the very object that was given to ``select`` or ``reserve``.
            routed: (Q,) bool, the choice.
            preference: (Q,) float64, the verdict in [-1, 1]; NaN where there is none.
        """
        ...


def is_budgeted(router: object) -> TypeGuard[BudgetedRouter]:
    """As ``isinstance(router, BudgetedRouter)``, which before Python 3.12 takes longer than a kernel."""
    return all(getattr(router, verb, None) is not None for verb in ("reserve", "settle", "begin_step", "select"))


_SCORES = ("u", "margin", "error_probability", "novelty", "rank_sum")


def _ranks(score: Tensor) -> Tensor:
    # Average ranks, so that ties (u = 1 exactly, say) are not ordered by their position in the batch.
    _, inverse, counts = torch.unique(score, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def score_name(by: RankBy | PairScore) -> str:
    """What to call a score."""
    return by if isinstance(by, str) else by.name


def rank_score(candidates: Candidates, by: RankBy | PairScore) -> Tensor:
    """(Q,) float64 score by which pairs are routed, highest first. See the module's text for the choice.

    Inf for pairs with u = Inf, of which nothing is known, whatever the score makes of them.
    """
    score = by(candidates) if not isinstance(by, str) and callable(by) else _named_score(candidates, by)
    return torch.where(candidates.uncertainty.isinf(), math.inf, score.double())


def _named_score(candidates: Candidates, by: RankBy | PairScore) -> Tensor:
    _check_score(by)
    u, g, v = (t.double() for t in (candidates.uncertainty, candidates.logit, candidates.variance))
    if by == "u":
        return u
    if by == "margin":
        return -(g / u).abs()
    if by == "error_probability":
        # v = 0 means the posterior is certain of the sign: last in line, unless g = 0 too and there is no sign.
        ratio = g.abs() / v.sqrt()
        return -torch.where(v > 0, ratio, torch.where(g == 0, 0.0, math.inf))
    if by == "novelty":
        n = candidates.columns.get("novelty")
        if n is None:
            reject(
                "by", "'novelty' of pairs without that column", "pairs of a difference-mode head with a row posterior"
            )
        return n
    return _ranks(u) + _ranks(-(g / u).abs())


@dataclass(frozen=True)
class ThresholdRouter:
    """Routes pairs whose score exceeds ``threshold``.

    With ``by="u"`` that is u > threshold (u ≥ 1, so 1.0 routes everything with any uncertainty), as in the paper; the
    other scores have their own scales, see :func:`rank_score`. ``rank_sum`` depends on the batch and has no threshold.
    """

    threshold: float
    by: RankBy = "u"
    whole_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, Within(finite=False))
        check_threshold_score(self.by)

    def select(self, candidates: Candidates) -> Tensor:
        """Pairs above the threshold."""
        return rank_score(candidates, self.by) > self.threshold


@dataclass(frozen=True)
class BudgetRouter:
    """Routes the highest-scoring pairs of the batch: a ``fraction`` of them (rounded down), or at most ``count``.

    Equal scores are taken in the order of the batch.

    Args:
        fraction: in [0, 1]; exactly one of this and the next is given.
        count: at least 0.
        by: the score, such as ``u``, ``margin``, ``rank_sum`` or ``novelty`` (:func:`rank_score`).

    Raises InputError for both or neither, for one out of bounds, and for a score there is not.
    """

    fraction: float | None = None
    count: int | None = None
    by: RankBy = "u"
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_budget(self.fraction, self.count)
        _check_score(self.by)

    def select(self, candidates: Candidates) -> Tensor:
        """The top of the batch."""
        chosen = torch.zeros(len(candidates), dtype=torch.bool)
        budget = _budget(self.fraction, self.count, len(candidates))
        order = torch.argsort(rank_score(candidates, self.by), descending=True, stable=True)
        chosen[order[:budget]] = True
        return chosen


class RandomRouter:
    """The baseline: as many pairs as a :class:`BudgetRouter`, drawn at random.

    Args:
        fraction, count: as in :class:`BudgetRouter`.
        seed: of the draws; successive batches draw on.
    """

    whole_batch: ClassVar[bool] = True

    def __init__(self, fraction: float | None = None, count: int | None = None, *, seed: int = 0) -> None:
        _check_budget(fraction, count)
        check_number("seed", seed, SEED)
        self.fraction, self.count, self.seed = fraction, count, seed
        self._generator = torch.Generator().manual_seed(seed)

    def select(self, candidates: Candidates) -> Tensor:
        """A random subset; pairs with u = Inf, of which nothing is known, before all others."""
        chosen = torch.zeros(len(candidates), dtype=torch.bool)
        budget = _budget(self.fraction, self.count, len(candidates))
        order = torch.randperm(len(candidates), generator=self._generator)
        order = order[candidates.uncertainty[order].isinf().argsort(descending=True, stable=True)]
        chosen[order[:budget]] = True
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Where its draws are, JSON values."""
        generator = base64.b64encode(self._generator.get_state().numpy().tobytes()).decode("ascii")
        return {"format": "rmcore-random-router", "version": 1, "generator": generator}

    def load_state_dict(self, state: object) -> None:
        """Draw on from a state; what to route is not part of it. Raises CheckpointError where it is no such state."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import RandomRouterState

        text = checked(RandomRouterState, state, "router").generator
        try:
            words = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
            generator = torch.Generator()
            generator.set_state(words)
        except (ValueError, RuntimeError):
            refuse("router.generator", text, "the state of torch's generator, in base64")
        self._generator = generator


@dataclass(frozen=True)
class NeverRoute:
    """The head alone."""

    whole_batch: ClassVar[bool] = False

    def select(self, candidates: Candidates) -> Tensor:
        """No pair."""
        return torch.zeros(len(candidates), dtype=torch.bool)


@dataclass(frozen=True)
class AlwaysRoute:
    """The judge alone."""

    whole_batch: ClassVar[bool] = False

    def select(self, candidates: Candidates) -> Tensor:
        """Every pair."""
        return torch.ones(len(candidates), dtype=torch.bool)


def _check_score(by: object) -> None:
    if not isinstance(by, str) or by not in _SCORES:
        reject("by", repr(by), f"one of {', '.join(_SCORES)}")


def check_threshold_score(by: RankBy | PairScore) -> None:
    """Raise InputError unless ``by`` is a score that a threshold can be compared with."""
    if not isinstance(by, str) and isinstance(by, PairScore):
        return
    _check_score(by)
    if by == "rank_sum":
        reject("by", "'rank_sum'", "a score with a scale of its own", "Use BudgetRouter for rank_sum")


def _check_budget(fraction: float | None, count: int | None) -> None:
    if (fraction is None) == (count is None):
        reject("fraction, count", (fraction, count), "exactly one of them")
    if fraction is not None:
        check_number("fraction", fraction, Within(least=0, most=1), "a number in [0, 1]")
    if count is not None:
        check_number("count", count, Within(whole=True, least=0), "a non-negative number of pairs")


def _budget(fraction: float | None, count: int | None, pairs: int) -> int:
    # The small term keeps 0.1 * 10 (0.9999...) from losing a pair to rounding.
    return min(pairs, count if count is not None else math.floor((fraction or 0.0) * pairs + 1e-9))
