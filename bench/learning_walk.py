"""One way through a stream, chunk by chunk: the router picks, the judge decides, the head learns, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmcore.engine.learning.judged import JudgedPairs
from rmcore.engine.learning.online import LearningConfig, fold
from rmcore.head import FrozenHead
from rmcore.head.fit import newton

from .learning_stream import Material

__all__ = ["FRACTIONS", "Choose", "Online", "Refit", "Setup", "Walk", "above", "top", "walk"]

FRACTIONS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50)


@dataclass(frozen=True)
class Setup:
    """One way to route and to learn. ``grid`` holds fractions of a chunk, or thresholds as quantiles of the fixed
    head's u.
    """

    name: str
    chunk: int = 64
    router: str = "budget"
    judge: str = "label"
    stream: str = "mixed"
    weight: float = 1.0
    grid: Sequence[float] = FRACTIONS
    note: str = ""


@dataclass
class Walk:
    """What happened on one way through the stream, in its order."""

    right: np.ndarray
    """(N,) 1 where the routed system is right, ½ for a tie."""
    alone: np.ndarray
    judged: np.ndarray

    def accuracy(self) -> float:
        """Per cent right of the routed system."""
        return 100 * float(self.right.mean())

    def alone_later(self) -> float:
        """Per cent right of the head alone on the second half."""
        return 100 * float(self.alone[len(self.alone) // 2 :].mean())


Choose = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Takes the u of a chunk, says which of its pairs are judged."""


class Online:
    """Learns as the library does, one update a chunk."""

    def __init__(self, head: FrozenHead, weight: float) -> None:
        self.head = head
        self.settings = LearningConfig(judge_weight=weight)
        self.shifts: list[float] = []

    def learn(self, pairs: JudgedPairs) -> FrozenHead:
        """The head after one more chunk."""
        self.head, report = fold(self.head, pairs, self.settings)
        self.shifts.append(report.shift / report.weight**0.5)
        return self.head


class Refit:
    """What online learning is held against: all data kept, β and P fitted anew after each chunk."""

    def __init__(self, head: FrozenHead, train: dict[str, Tensor]) -> None:
        self.head = head
        self.hidden, self.labels, self.pairs = (train[name] for name in ("train", "labels", "pairs"))

    def learn(self, pairs: JudgedPairs) -> FrozenHead:
        """The head after one more chunk."""
        assert pairs.pairs is not None
        self.pairs = torch.cat([self.pairs, pairs.pairs + len(self.hidden)])
        self.hidden = torch.cat([self.hidden, pairs.hidden])
        self.labels = torch.cat([self.labels, pairs.labels])
        head = self.head
        beta, posterior, _ = newton(
            head.feature_map, self.hidden, self.labels, head.config, pairs=self.pairs, start=head.beta
        )
        self.head = FrozenHead(head.config, head.feature_map, beta, head.beta0, posterior)
        return self.head


def walk(
    head: FrozenHead,
    material: Material,
    order: np.ndarray,
    setup: Setup,
    choose: Choose,
    seed: int,
    learner: Online | Refit | None,
) -> Walk:
    """Through the stream once. ``choose`` takes the u of a chunk and says which of its pairs are judged."""
    rng = np.random.default_rng([seed, 1])
    preference, flipped = material.judged[setup.judge][order], material.flipped[setup.judge][order]
    truth, rows = material.truth[order], material.rows[torch.from_numpy(order)]
    result = Walk(np.zeros(len(order)), np.zeros(len(order)), np.zeros(len(order), dtype=bool))
    for start in range(0, len(order), setup.chunk):
        part = slice(start, start + setup.chunk)
        hidden = rows[part]
        count = len(hidden)
        scores = head.score_pairs(hidden.flatten(0, 1), torch.full((count,), 2, dtype=torch.int64))
        said = np.sign(scores.logit.double().numpy())
        asked = choose(scores.uncertainty.double().numpy(), rng)
        known = asked & ~np.isnan(preference[part])
        said_by_all = np.where(known, preference[part], said)
        result.alone[part] = _credit(said, truth[part])
        result.right[part] = _credit(said_by_all, truth[part])
        result.judged[part] = asked
        usable = np.flatnonzero(known & ~flipped[part])
        if learner is not None and len(usable):
            new = torch.from_numpy(usable)
            pairs = JudgedPairs(
                hidden[new].flatten(0, 1),
                torch.from_numpy(0.5 + preference[part][usable] / 2).float(),
                torch.full((len(new),), setup.weight),
                torch.arange(2 * len(new)).view(-1, 2),
            )
            head = learner.learn(pairs)
    return result


def _credit(said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.where(said == 0, 0.5, (np.sign(said) == truth).astype(float))


def top(fraction: float, *, at_random: bool = False) -> Choose:
    """The fraction of a chunk with the highest u, or any."""

    def choose(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        score = rng.random(len(u)) if at_random else u
        chosen = np.zeros(len(u), dtype=bool)
        chosen[np.argsort(-score, kind="stable")[: round(fraction * len(u))]] = True
        return chosen

    return choose


def above(threshold: float) -> Choose:
    """Every pair whose u is above a threshold."""
    return lambda u, _rng: u > threshold
