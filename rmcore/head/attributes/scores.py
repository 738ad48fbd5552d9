"""What a multi-attribute reward model says of responses before its weights make one score of it, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["AttributeScores"]

_BY_RESPONSE = ("attributes", "attribute_weights", "attribute_std", "quantiles", "probabilities")


@dataclass(frozen=True, eq=False, slots=True)
class AttributeScores:
    """N responses, A attributes; float64 on the CPU. A part that the model does not have is None.

    The score is ``(attributes · attribute_weights).sum(1)``: weights are those behind a transform matrix and a gate,
    which may be others for each prompt. What spread there is, is the model's own idea of the answers' spread in its
    training data (aleatoric); how much the fit knows is a posterior's matter (:attr:`ResponseScores.variance`).

    Attributes:
        names: A names, the authors' own where they gave any.
        attributes: (N, A) means.
        attribute_weights: (N, A).
        attribute_std: (N, A) σ of normals (URM).
        quantiles: (N, A, Q) at ``levels`` (QRM); not sorted where the model does not.
        levels: (Q,) in (0, 1).
        probabilities: (N, A, B) of the values ``bins`` (LDL).
        bins: (B,).
    """

    names: tuple[str, ...]
    attributes: Tensor
    attribute_weights: Tensor
    attribute_std: Tensor | None = None
    quantiles: Tensor | None = None
    levels: Tensor | None = None
    probabilities: Tensor | None = None
    bins: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """(N,) Σ_k w_k μ_k."""
        return (self.attributes * self.attribute_weights).sum(1)

    @property
    def score_quantiles(self) -> Tensor | None:
        """(N, Q) the score at each level: the weights' sum of the attributes' quantile functions, as QRM has it."""
        return None if self.quantiles is None else (self.attribute_weights[..., None] * self.quantiles).sum(1)

    @property
    def score_probabilities(self) -> Tensor | None:
        """(N, B) of the values ``bins``: the weights' mixture of the attributes' distributions, as LDL has it."""
        return None if self.probabilities is None else (self.attribute_weights[..., None] * self.probabilities).sum(1)

    @property
    def score_variance(self) -> Tensor | None:
        """(N,) variance of the score, in the score's own units: it can be added to a posterior's.

        Normals: Σ w² σ², attributes taken as independent. Quantiles: of the score's quantile function. Bins: of the
        score's distribution.
        """
        if self.attribute_std is not None:
            return (self.attribute_weights * self.attribute_std).square().sum(1)
        if self.quantiles is not None:
            found = self.score_quantiles
            return None if found is None else found.var(1, correction=0)
        found = self.score_probabilities
        if found is None or self.bins is None:
            return None
        mean = found @ self.bins
        return found @ self.bins.square() - mean.square()

    @property
    def aleatoric(self) -> Tensor | None:
        """(N,) the measure that the authors rank by: of normals Σ σ² over the attributes (URM), else score_variance."""
        return self.score_variance if self.attribute_std is None else self.attribute_std.square().sum(1)

    def split(self, sizes: Sequence[int]) -> list[AttributeScores]:
        """Of groups of these sizes, one after another."""
        parts = {name: value.split(list(sizes)) for name in _BY_RESPONSE if (value := getattr(self, name)) is not None}
        return [replace(self, **{name: part[k] for name, part in parts.items()}) for k in range(len(sizes))]

    def masked(self, unread: Tensor) -> AttributeScores:
        """With NaN for the responses (N,) bool that nobody read."""
        if not bool(unread.any()):
            return self
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _BY_RESPONSE}
        return replace(
            self,
            **{
                name: value.masked_fill(unread.view(-1, *[1] * (value.dim() - 1)), torch.nan)
                for name, value in parts.items()
                if value is not None
            },
        )
