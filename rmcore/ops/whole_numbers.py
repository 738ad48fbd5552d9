"""What int8 kernels compute, in plain torch and float64: the same whole numbers, everything else exact.

Truth for a kernel's arithmetic where :mod:`rmcore.ops.reference` with a head's weights is truth for its rounding too:
the self-check and the GPU probe hold int8 kernels against this, to the tolerance of 16-bit ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.quantize import WHOLE
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["WholeRows", "factor", "features", "score", "whole_rows"]

_MOST_OUTLIERS, _FAR, _NEARBY, _PANEL, _LOW = 32, 12.0, 0.25, 64, 254.0


class WholeRows(NamedTuple):
    """Rows x = factor (whole + low / 254) + apart, but for what rounding took; each (B, h), factor (B, 1), float32."""

    whole: Tensor
    low: Tensor
    factor: Tensor
    apart: Tensor


def whole_rows(x: Tensor, two_terms: bool, *, outliers: bool = True) -> WholeRows:
    """Rows (B, h) float32 as the kernels take them (csrc/cpu/activations.h and outliers.h, kernels/rows_int8.py).

    Without ``outliers`` all values of a row share its factor, as the differences of a pair's features do.
    """
    sizes = x.abs()
    edge, total = sizes.amax(1), sizes.sum(1)
    span = float(-(-x.shape[1] // _PANEL) * _PANEL)
    limit = edge.clone()
    far = (edge * span > _FAR * total) & outliers
    while bool(far.any()):
        nearby = edge * _NEARBY
        beyond = sizes > nearby[:, None]
        fits = far & (beyond.sum(1) <= _MOST_OUTLIERS)
        rest = sizes.masked_fill(beyond, 0.0)
        edge, total = torch.where(fits, rest.amax(1), edge), torch.where(fits, rest.sum(1), total)
        limit = torch.where(fits, nearby, limit)
        far = fits & (edge * span > _FAR * total)
    apart = torch.where(sizes > limit[:, None], x, torch.zeros_like(x))
    # A number divided by a tensor, torch multiplies by the reciprocal, and on a GPU so it does the other way round: two
    # roundings where the kernels have one, and a value near the edge of two whole numbers becomes the other one.
    largest = torch.full_like(edge, WHOLE)
    scaled = (x - apart) * torch.where(edge > 1e-30, largest / edge, torch.zeros_like(edge))[:, None]
    whole = scaled.round()
    low = ((scaled - whole) * _LOW).round() if two_terms else torch.zeros_like(whole)
    return WholeRows(whole, low, (edge / largest)[:, None], apart)


def features(hidden: Tensor, feature_map: FeatureMap) -> Tensor:
    """c (B, D) float64 of hidden rows (B, h) and an int8 map, before c is rounded itself."""
    assert feature_map.projection is not None
    assert feature_map.projection_scale is not None
    assert feature_map.phase is not None
    x = hidden.float()
    if feature_map.hidden_shift is not None and feature_map.hidden_scale is not None:
        x = (x - feature_map.hidden_shift) * (feature_map.hidden_scale * feature_map.input_scale)
    else:
        x = x * feature_map.input_scale
    rows = whole_rows(x, 2 * feature_map.hidden_size <= feature_map.num_features)
    near = rows.factor.double() * (rows.whole.double() + rows.low.double() / _LOW) + rows.apart.double()
    projection = feature_map.projection.double() * feature_map.projection_scale.double()[:, None]
    return reference.phase_features(near, projection, feature_map.phase.double())


def factor(weights: HeadWeights) -> Tensor:
    """U (D, D) float64 as an int8 head stores it, for c."""
    assert weights.factor_row_scale is not None
    assert weights.factor_diagonal is not None
    tiles = reference.unpack_lower(weights.factor, weights.num_features).double()
    stored = tiles * weights.factor_row_scale.double()[:, None] + torch.diag(weights.factor_diagonal.double())
    return stored * math.sqrt(weights.factor_scale)


def score(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """(4, B) float64: g, v, u, p of hidden rows (B, h) and an int8 head."""
    c = features(hidden, weights.map)
    g = reference.logit(c, weights.beta.double(), weights.beta0)
    whole = (WHOLE * c).round() / WHOLE
    v = reference.variance(whole, factor(weights))
    u = reference.uncertainty(v, weights.amplitude)
    return torch.stack([g, v, u, g / u])
