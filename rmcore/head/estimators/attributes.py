"""URM and URME as estimators (arXiv:2410.00847): the spread that attribute heads see in answers, and their disputes.

A member's reward of a row is r = Σ_k w_k μ_k, the variance that it sees in it n = Σ_k w_k² σ_k². Answers are drawn
apart, so a pair has n_i + n_j of that: two equal rows too, if they are two answers. URM is one head and tells the
aleatoric part alone; URME several, whose rewards differ by the epistemic one, and the total is both (law of total
variance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore.head.attributes.ensemble import AttributeEnsemble, EnsembleScores, Measure, fit_heads
from rmcore.head.attributes.fit import FitOptions, Objective, PairStates, fit_pairs
from rmcore.head.attributes.gating import GateConfig
from rmcore.head.attributes.head import AttributeConfig, AttributeHead
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.attributes.storage import head_tensors, heads_of
from rmcore.head.estimators.protocol import PairEstimate, VarianceKind, check_training, check_width, refuse_update
from rmcore.head.estimators.samples import sample_deviations, sampled_estimate
from rmcore.head.estimators.tensors import read_tensors, write_tensors

__all__ = ["URM", "URME", "AttributeLabels", "HeadTraining"]


@dataclass(frozen=True, eq=False)
class AttributeLabels:
    """Responses that people gave attributes.

    Attributes:
        names: of the A attributes.
        hidden: (N, h) the responses' rows.
        labels: (N, A), NaN where nobody labelled.
    """

    names: tuple[str, ...]
    hidden: Tensor
    labels: Tensor


@dataclass(frozen=True)
class HeadTraining:
    """How the heads are trained.

    Attributes:
        gate: that makes the reward of the attributes; None for fixed weights.
        weights: the reward's fixed weights, or where a gate starts (:class:`AttributeConfig`).
        objective: of stage 1; None for maximum likelihood.
        options: of stage 1, or of the training from pairs alone.
        gate_options: of stage 2.
        groups: (N,) int64, the prompt of each pair; None: pairs that share rows are of one.
        seed: of the first head.
        progress: called with (what is trained, steps done, steps in all).
    """

    gate: GateConfig | None = field(default_factory=GateConfig)
    weights: tuple[float, ...] | None = None
    objective: Objective | None = None
    options: FitOptions | None = None
    gate_options: FitOptions | None = None
    groups: Tensor | None = None
    seed: int = 0
    progress: Callable[[str, int, int], None] | None = None


class _OfHeads:
    """What URM and URME have in common.

    Args:
        heads: of the same attributes over the same rows.
    """

    name: ClassVar[str]
    kind: ClassVar[VarianceKind]

    def __init__(self, heads: Sequence[AttributeHead]) -> None:
        self.heads = tuple(heads)

    @property
    def width(self) -> int:
        """The width of hidden rows, h."""
        return self.heads[0].config.hidden_size

    @torch.no_grad()
    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`; several heads' p̃ is of their mean p."""
        check_width(hidden, self.width)
        members = [head.scores(hidden) for head in self.heads]
        noise = [member.score_variance for member in members]
        if None in noise:
            reject("heads", "some without a spread", "normals or quantiles")
        variance = torch.stack([one for one in noise if one is not None], 1)
        found = sampled_estimate(torch.stack([m.score for m in members], 1), group_sizes, variance)
        if len(members) == 1:
            return found._replace(information=None, epistemic=None)
        said = EnsembleScores(tuple(members), torch.stack([m.score for m in members]))
        return found._replace(measures={name: said.uncertainty(name) for name in self.measures})

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is told of each row besides: several heads' gap, and of normals the norm of their covariances."""
        if len(self.heads) == 1:
            return ()
        return ("gap", "covariance") if self.heads[0].config.spread == "normal" else ("gap",)

    @torch.no_grad()
    def attributes(self, hidden: Tensor) -> AttributeScores:
        """What the heads say of rows (R, h), attribute by attribute; of several each number is the members' mean.

        The mean of products is not the product of means: the score of several is :meth:`rewards`, not that of this.
        """
        check_width(hidden, self.width)
        members = [head.scores(hidden) for head in self.heads]
        if len(members) == 1:
            return members[0]

        def mean(name: str) -> Tensor | None:
            found = [getattr(member, name) for member in members]
            return None if found[0] is None else torch.stack(found).mean(0)

        means, weights = mean("attributes"), mean("attribute_weights")
        assert means is not None
        assert weights is not None
        std = [m.attribute_std.square() for m in members if m.attribute_std is not None]
        spread = torch.stack(std).mean(0).sqrt() if std else None
        own = {"attribute_std": spread, "quantiles": mean("quantiles"), "levels": members[0].levels}
        return AttributeScores(members[0].names, means, weights, **own)

    @torch.no_grad()
    def rewards(self, hidden: Tensor) -> Tensor:
        """(R,) float64: the mean of the heads' rewards Σ w μ of rows (R, h)."""
        check_width(hidden, self.width)
        return torch.stack([head.scores(hidden).score for head in self.heads]).mean(0)

    def deviations(self, hidden: Tensor) -> Tensor:
        """As of the protocol; refused by one head, whose variance no label takes away."""
        if len(self.heads) == 1:
            reject("uncertainty", f"{self.name!r}, which tells the aleatoric part alone", "one with an epistemic part")
        check_width(hidden, self.width)
        with torch.no_grad():
            return sample_deviations(torch.stack([head.scores(hidden).score for head in self.heads], 1))

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Refused: a head's weights have no posterior that single verdicts could be added to."""
        refuse_update(self.name)

    def write(self, folder: Path) -> dict[str, Any]:
        """The heads' tensors."""
        configs = [head.config.to_dict() for head in self.heads]
        return {"heads": configs, **write_tensors(folder, head_tensors(self.heads))}

    @staticmethod
    def _read(folder: Path, values: dict[str, Any]) -> tuple[AttributeHead, ...]:
        configs = [AttributeConfig.from_dict(one) for one in values["heads"]]
        names = list(head_tensors([AttributeHead(one) for one in configs]))
        try:
            return heads_of(configs, read_tensors(folder, values, names))
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: got heads that do not fit together ({error})") from error


class URM(_OfHeads):
    """One probabilistic attribute head.

    Args:
        heads: the one.
    """

    name: ClassVar[str] = "urm"
    kind: ClassVar[VarianceKind] = "aleatoric"

    def __init__(self, heads: Sequence[AttributeHead]) -> None:
        if len(heads) != 1:
            reject("heads", len(heads), "one; several are 'urme'")
        super().__init__(heads)

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        attributes: AttributeLabels | None = None,
        **training: Any,
    ) -> URM:
        """Stage 1 on attribute labels, stage 2 on the pairs; arguments as of :meth:`URME.fit`."""
        return cls(_fit_heads(1, hidden, labels, pairs, attributes, HeadTraining(**training)))

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> URM:
        """The inverse of :meth:`write`."""
        return cls(cls._read(folder, values))


class URME(_OfHeads):
    """M probabilistic attribute heads that differ in their start and their mini-batches.

    Args:
        heads: at least two.
    """

    name: ClassVar[str] = "urme"
    kind: ClassVar[VarianceKind] = "total"

    def __init__(self, heads: Sequence[AttributeHead]) -> None:
        self.ensemble = AttributeEnsemble(heads)
        super().__init__(heads)

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        labels: Tensor,
        pairs: Tensor,
        *,
        attributes: AttributeLabels | None = None,
        members: int = 3,
        **training: Any,
    ) -> URME:
        """Stage 1 on attribute labels, stage 2 on the pairs.

        Args:
            hidden: (R, h) rows.
            labels: (N,) in [0, 1].
            pairs: (N, 2) int64.
            attributes: what stage 1 learns from. None: there is one attribute, the reward, whose mean and σ are learned
                from the pairs alone, as PURM's are.
            members: M ≥ 2; the paper's is 3.
            **training: fields of :class:`HeadTraining`.

        Raises:
            InputError: shapes or labels do not fit.
            NonFiniteError: rows that are not finite, or a training that diverged.
        """
        if members < 2:
            reject("members", members, "at least 2: one has no variance")
        return cls(_fit_heads(members, hidden, labels, pairs, attributes, HeadTraining(**training)))

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> URME:
        """The inverse of :meth:`write`."""
        return cls(cls._read(folder, values))


def _fit_heads(
    members: int, hidden: Tensor, labels: Tensor, pairs: Tensor, attributes: AttributeLabels | None, how: HeadTraining
) -> tuple[AttributeHead, ...]:
    check_training(hidden, labels, pairs)
    width, states = hidden.shape[1], PairStates.of_labels(hidden, labels, pairs, how.groups)
    if attributes is not None:
        config = AttributeConfig(width, attributes.names, weights=how.weights, gate=how.gate)
        return fit_heads(
            config,
            attributes.hidden,
            attributes.labels,
            size=members,
            pairs=None if how.gate is None else states,
            objective=how.objective,
            options=how.options,
            gate_options=how.gate_options,
            seed=how.seed,
            progress=how.progress,
        )
    scale = float(hidden.double().square().mean().sqrt())
    config = AttributeConfig(width, ("reward",), weights=(1.0,))
    heads = []
    for seed in range(how.seed, how.seed + members):
        head = AttributeHead(config, seed=seed, state_scale=scale)
        if members == 1:  # not a draw around a random anchor, but the most probable one
            with torch.no_grad():
                head.value.weight[0::2] = 0.0
        fit_pairs(head, states, options=replace(how.options or FitOptions(steps=300, lr=1e-2), seed=seed))
        heads.append(head.eval())
    return tuple(heads)
