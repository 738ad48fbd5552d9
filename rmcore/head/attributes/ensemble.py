"""URME: attribute heads of several seeds, and their two measures of disagreement (arXiv:2410.00847, Eq. 7 and 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.attributes.fit import FitOptions, Objective, PairStates, default_options, fit_attributes, fit_gate
from rmcore.head.attributes.head import AttributeConfig, AttributeHead
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.attributes.serving import alike, weights_of
from rmcore.head.posterior import check_finite
from rmcore.ops import score_attributes

__all__ = ["AttributeEnsemble", "EnsembleScores", "Measure", "fit_ensemble", "fit_heads"]

Measure: TypeAlias = Literal["gap", "covariance"]


@dataclass(frozen=True, eq=False, slots=True)
class EnsembleScores:
    """N responses as M heads see them; float64 on the CPU.

    Attributes:
        members: M heads' own scores.
        rewards: (M, N).
    """

    members: tuple[AttributeScores, ...]
    rewards: Tensor

    @property
    def mean(self) -> Tensor:
        """(N,) mean reward."""
        return self.rewards.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """(N,) variance of the M rewards (over M, as of a mixture), in their units: aleatoric ones can be added."""
        return self.rewards.var(0, correction=0)

    @property
    def score_variance(self) -> Tensor | None:
        """(N,) expected aleatoric variance: the members' mean of Σ w² σ²."""
        found = [member.score_variance for member in self.members]
        return torch.stack([one for one in found if one is not None]).mean(0) if None not in found else None

    @property
    def gap(self) -> Tensor:
        """(N,) max |r_i − r_j| (Eq. 7)."""
        return self.rewards.amax(0) - self.rewards.amin(0)

    @property
    def covariance_norm(self) -> Tensor:
        """(N,) max ‖Σ_i‖_F = max √(Σ_k σ_k⁴), of normals' diagonal covariances (Eq. 8).

        Raises InputError for heads of quantiles, which have none.
        """
        norms = []
        for member in self.members:
            if member.attribute_std is None:
                reject("members", "heads of quantiles", "normals, whose covariance has a norm")
            norms.append(member.attribute_std.square().square().sum(1).sqrt())
        return torch.stack(norms).amax(0)

    def uncertainty(self, measure: Measure = "gap") -> Tensor:
        """(N,) :attr:`gap` or :attr:`covariance_norm`; raises InputError for another measure."""
        if measure not in ("gap", "covariance"):
            reject("measure", repr(measure), "'gap' or 'covariance'")
        return self.gap if measure == "gap" else self.covariance_norm

    def penalised(self, penalty: float, measure: Measure = "gap") -> Tensor:
        """(N,) mean − λ u, whose largest is best-of-n's choice; raises InputError for a negative or infinite λ."""
        if not (math.isfinite(penalty) and penalty >= 0):
            reject("penalty", penalty, "a finite number, at least 0")
        return self.mean - penalty * self.uncertainty(measure)

    def kept(self, threshold: float, measure: Measure = "gap") -> Tensor:
        """(N,) bool: u ≤ threshold. A pair is kept, as in the paper, where both its answers are.

        Raises InputError for a threshold of NaN, and for another measure.
        """
        if math.isnan(threshold):
            reject("threshold", threshold, "a number")
        return self.uncertainty(measure) <= threshold

    def kept_pairs(self, pairs: Tensor, threshold: float, measure: Measure = "gap") -> Tensor:
        """(P,) bool of pairs (P, 2) of the N responses: the paper's filter, which drops one where either u is above."""
        if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            reject("pairs", f"{tuple(pairs.shape)} {pairs.dtype}", "(P, 2) int64")
        return self.kept(threshold, measure)[pairs].all(1)


class AttributeEnsemble:
    """M heads of the same attributes over the same states.

    Args:
        heads: at least 2.

    Raises InputError for fewer, or heads of other attributes or widths.
    """

    def __init__(self, heads: Sequence[AttributeHead]) -> None:
        if len(heads) < 2:
            reject("heads", len(heads), "at least 2")
        if len({(head.config.hidden_size, head.config.names, head.config.spread) for head in heads}) > 1:
            reject("heads", "heads of different configurations", "one width, one list of attributes, one spread")
        self.heads = tuple(heads)

    @torch.no_grad()
    def scores(
        self, hidden: Tensor, gate_hidden: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> EnsembleScores:
        """Of states (N, h), and those (N, h) that gates read where they are others; ``dtype`` as of a single head.

        Heads of one form are scored by one call, which reads the states once.
        """
        if alike(self.heads):
            first = self.heads[0]
            first.check_rows(hidden, gate_hidden)
            weight = first.value.weight
            found = score_attributes(
                hidden.to(weight), weights_of(self, self.heads, dtype),
                gate_hidden=None if gate_hidden is None else gate_hidden.to(weight),
            )  # fmt: skip
            parts = zip(found.outputs.unbind(1), found.weights.unbind(1), strict=True)
            members = tuple(first.scores_of(outputs, weights) for outputs, weights in parts)
        else:
            members = tuple(head.scores(hidden, gate_hidden, dtype=dtype) for head in self.heads)
        rewards = torch.stack([member.score for member in members])
        return EnsembleScores(members, rewards)


def fit_ensemble(
    config: AttributeConfig,
    hidden: Tensor,
    labels: Tensor,
    *,
    size: int = 3,
    pairs: PairStates | None = None,
    objective: Objective | None = None,
    options: FitOptions | None = None,
    gate_options: FitOptions | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> AttributeEnsemble:
    """Train ``size`` heads, each with a start and mini-batches of its own; arguments as of :func:`fit_heads`.

    Raises InputError as that, and for a size below 2.
    """
    if size < 2:
        reject("size", size, "at least 2")
    how: dict[str, Any] = {"objective": objective, "options": options, "gate_options": gate_options, "seed": seed}
    return AttributeEnsemble(fit_heads(config, hidden, labels, size=size, pairs=pairs, progress=progress, **how))


def fit_heads(
    config: AttributeConfig,
    hidden: Tensor,
    labels: Tensor,
    *,
    size: int = 1,
    pairs: PairStates | None = None,
    objective: Objective | None = None,
    options: FitOptions | None = None,
    gate_options: FitOptions | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[AttributeHead, ...]:
    """Train heads, each with a start and mini-batches of its own: stage 1 on labels, stage 2 on pairs.

    Args:
        config: of each head.
        hidden: (N, h) states.
        labels: (N, A), see :func:`fit_attributes`.
        size: M; the paper's is 3.
        pairs: for the gates; needed where ``config`` has one.
        objective: of stage 1.
        options: of stage 1; each head's seed is ``seed`` and its number.
        gate_options: of stage 2, likewise.
        seed: first of the heads' seeds.
        progress: called with (what is trained, steps done, steps in all).

    Raises InputError as :func:`fit_attributes` and :func:`fit_gate` do, and for pairs without a gate or the reverse.
    """
    if (pairs is None) != (config.gate is None):
        got = "a gate without pairs" if pairs is None else "pairs without a gate"
        reject("pairs", got, "both, or neither")
    check_finite(hidden)
    scale = float(hidden.double().square().mean().sqrt())
    heads = []
    for member in range(size):
        which = f" of head {member + 1} of {size}" if size > 1 else ""
        head = AttributeHead(config, seed=seed + member, state_scale=scale)
        first = replace(options or default_options(config.spread), seed=seed + member)
        told = None if progress is None else partial(progress, f"attributes{which}")
        fit_attributes(head, hidden, labels, objective=objective, options=first, progress=told)
        if pairs is not None:
            second = replace(gate_options or FitOptions(lr=1e-3), seed=seed + member)
            told = None if progress is None else partial(progress, f"gate{which}")
            fit_gate(head, pairs, options=second, progress=told)
        heads.append(head.eval())
    return tuple(heads)
