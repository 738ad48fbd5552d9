"""The trainable SNGP head: spectral-normalised layer, random Fourier features, logit (design 2.1 to 2.3).

Hidden states (B, h) → spectral-normalised layer → random Fourier features → logit and variance (design section 2).
Sources: SNGP, Liu et al. 2020 (arXiv:2006.10108); its pairwise use for routing to a judge, NeurIPS 2025.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmcore import ops
from rmcore._base.errors import reject
from rmcore.head.config import HeadConfig
from rmcore.head.posterior import check_finite
from rmcore.ops import reference
from rmcore.ops.quantize import MAX_DEPTH, ColumnRange, quantize_projection
from rmcore.ops.weights import SERVING_DTYPES, FeatureMap, default_dtype, power_of_two_scale

__all__ = ["SNGPHead"]


class _Folded(NamedTuple):
    """Layer and features in float64, as few matrices as is legal, before they are rounded."""

    projection: Tensor | None
    phase: Tensor | None
    layer_weight: Tensor | None
    layer_bias: Tensor | None
    feature_scale: float


class SNGPHead(nn.Module):
    """The trainable head: hidden (..., h) → logit (...), differentiable in W, b_s and β.

    In training mode each forward takes one power-iteration step on W and stops the gradient through σ; in eval mode
    nothing changes. The posterior is not part of training: fit it afterwards with :func:`rmcore.head.fit.fit`, which
    returns a :class:`FrozenHead`.

    Args:
        config: a :class:`HeadConfig`, or its ``hidden_size``; further fields as keywords.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    omega: Tensor
    b: Tensor
    right_vector: Tensor
    length_scale: Tensor

    def __init__(self, config: HeadConfig | int, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(config, HeadConfig):
            config = HeadConfig(config, **kwargs)
        elif kwargs:
            config = replace(config, **kwargs)
        self.config = config
        width = config.layer_size or config.hidden_size
        generator = torch.Generator().manual_seed(config.seed)
        if config.layer_size is None:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        else:
            # Scaled so that σ(W) starts near 1 (Marchenko-Pastur edge): the bound is active but not crushing.
            edge = math.sqrt(config.layer_size) + math.sqrt(config.hidden_size)
            weight = torch.randn(config.layer_size, config.hidden_size, generator=generator) / edge
            self.weight = nn.Parameter(weight)
            self.bias = nn.Parameter(torch.zeros(config.layer_size))
        v = torch.randn(config.hidden_size, generator=generator)
        self.register_buffer("right_vector", v / v.norm())
        if config.features == "rff":
            omega, b = reference.draw_features(
                config.num_features, width, seed=config.seed, orthogonal=config.orthogonal
            )
        else:
            omega, b = torch.empty(0), torch.empty(0)
        self.register_buffer("omega", omega)
        self.register_buffer("b", b)
        scale = float("nan") if config.length_scale is None else config.length_scale
        self.register_buffer("length_scale", torch.tensor(scale, dtype=torch.float64))
        self.beta = nn.Parameter(torch.zeros(config.num_features))
        self.beta0 = nn.Parameter(torch.zeros(()), requires_grad=config.mode == "concat")

    def normalized_weight(self, *, converged: bool = False) -> Tensor | None:
        """W̄ (m, h), or None without a layer. ``converged`` iterates until σ stands still instead of one step."""
        if self.weight is None:
            return None
        weight = self.weight.detach()
        if converged:
            sigma = _converged_norm(weight, self.right_vector)
        elif self.training:
            sigma, vector = ops.power_iteration(weight, self.right_vector, 1)
            self.right_vector.copy_(vector)
        else:
            sigma = (weight @ self.right_vector).norm()
        return reference.spectral_normalize(self.weight, self.config.norm_bound, sigma)

    @torch.no_grad()
    def step_power_iteration(self, steps: int = 1) -> None:
        """Take steps of power iteration on W; without a layer there is nothing to do.

        For whoever trains in eval mode, where σ is taken along the vector as it stands: once an optimiser step, say,
        however many forward passes that has.
        """
        if self.weight is not None:
            _, vector = ops.power_iteration(self.weight.detach(), self.right_vector, steps)
            self.right_vector.copy_(vector)

    def hidden_to_z(self, hidden: Tensor, *, converged: bool = False) -> Tensor:
        """The input of the features, z (..., m)."""
        weight = self.normalized_weight(converged=converged)
        if weight is None:
            return hidden
        return reference.normalized_layer(
            hidden, weight, self.bias, activation=self.config.activation, layernorm=self.config.layernorm
        )

    @torch.no_grad()
    def set_length_scale(self, hidden: Tensor) -> float:
        """ℓ by the median rule over these rows (N, h), times the configured factor; kept and returned.

        Raises InputError where all rows are equal, NonFiniteError where one is NaN or Inf.
        """
        check_finite(hidden)
        z = self.hidden_to_z(hidden.float(), converged=True)
        try:
            scale = float(reference.median_length_scale(z)) * self.config.length_scale_factor
        except ValueError:
            reject("hidden", "rows that are all equal", "rows that differ, to take a length-scale from")
        self.length_scale.fill_(scale)
        return scale

    def features(self, hidden: Tensor) -> Tensor:
        """φ (..., D). Raises InputError where the length-scale is not set yet."""
        z = self.hidden_to_z(hidden)
        if self.config.features == "linear":
            return reference.linear_features(z)
        return reference.random_fourier_features(
            z,
            self.omega,
            self.b,
            length_scale=self._checked_length_scale(),
            kernel_scale=self.config.kernel_scale,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Logit g (...) of hidden rows (..., h). In difference mode the logit of a pair is a difference of two."""
        return reference.logit(self.features(hidden), self.beta, self.beta0)

    @torch.no_grad()
    def freeze_features(
        self, dtype: torch.dtype | None = None, calibration: Tensor | ColumnRange | None = None
    ) -> FeatureMap:
        """The serving form of layer and features: σ converged, folded where legal, rounded to ``dtype``.

        Args:
            dtype: serving dtype; None takes the device's default.
            calibration: (N, h) hidden rows, or the range of their columns; their largest magnitude sets the
                power-of-two input scale of fp16 heads, their columns' means and spreads what int8 heads take rows
                through first.
        """
        config = self.config
        dtype = default_dtype(self.beta.device) if dtype is None else dtype
        self._check_serving(dtype)
        scale = _input_scale(dtype, calibration)
        layer = self.normalized_weight(converged=True)
        layer = None if layer is None else layer.double() / scale
        bias = None if self.bias is None else self.bias.double()
        folded = (
            self._fold_linear(layer, bias, scale) if config.features == "linear" else self._fold(layer, bias, scale)
        )
        feature_map = FeatureMap(
            features=config.features,
            activation=config.activation,
            layernorm=config.layernorm,
            hidden_size=config.hidden_size,
            num_features=config.num_features,
            dtype=dtype,
            input_scale=scale,
            feature_scale=folded.feature_scale,
            layer_weight=None if folded.layer_weight is None else folded.layer_weight.to(dtype).contiguous(),
            layer_bias=None if folded.layer_bias is None else folded.layer_bias.float(),
            **_rounded(folded, dtype, calibration),
        )
        for name, tensor in feature_map.tensors().items():
            check_finite(tensor, f"{name} in {dtype}")
        return feature_map

    @property
    def _folds(self) -> bool:
        """Nothing non-linear stands between the layer and the features."""
        return self.config.activation == "none" and not self.config.layernorm

    def _check_serving(self, dtype: torch.dtype) -> None:
        """Raise InputError where heads of this shape are not served in ``dtype``."""
        config = self.config
        if dtype not in SERVING_DTYPES:
            reject("dtype", dtype, f"one of {', '.join(map(str, SERVING_DTYPES))}")
        if dtype == torch.int8:
            if config.features == "linear" or not (self._folds or self.weight is None):
                reject("dtype", "int8 for linear features, tanh or layernorm", "a 16-bit dtype, or float32")
            if max(config.hidden_size, config.num_features) > MAX_DEPTH:
                sizes = f"int8 for h = {config.hidden_size}, D = {config.num_features}"
                reject("dtype", sizes, f"at most {MAX_DEPTH:,} of each, or another dtype")
        if config.features == "linear" and self.weight is not None and not self._folds:
            reject("config", "linear features after tanh or layernorm", "rff features, or a plain layer")

    def _fold_linear(self, layer: Tensor | None, bias: Tensor | None, scale: float) -> _Folded:
        """z itself is the feature: W̄ is the projection, or rows are taken as they are."""
        return _Folded(layer, bias, None, None, 1.0 / scale if layer is None else 1.0)

    def _fold(self, layer: Tensor | None, bias: Tensor | None, scale: float) -> _Folded:
        """Random Fourier features: Ω W̄ / 2πℓ in one matrix where nothing stands between, else both matrices."""
        fold = layer is not None and self._folds
        projection, phase = reference.fold_projection(
            self.omega.double(), self.b.double(), self._checked_length_scale(), *((layer, bias) if fold else ())
        )
        feature_scale = self.config.kernel_scale * math.sqrt(2.0 / self.config.num_features)
        if layer is None:
            projection = projection / scale
        return _Folded(projection, phase, *((None, None) if fold else (layer, bias)), feature_scale)

    def _checked_length_scale(self) -> float:
        scale = float(self.length_scale)
        if not math.isfinite(scale):
            reject("length_scale", "none yet", "a value", "Set it in the config, or call set_length_scale or fit")
        return scale


def _input_scale(dtype: torch.dtype, calibration: Tensor | ColumnRange | None) -> float:
    """The power of two that fp16 heads multiply hidden rows by."""
    if calibration is None or dtype != torch.float16:
        return 1.0
    seen = torch.stack([calibration.low, calibration.high]) if isinstance(calibration, ColumnRange) else calibration
    if not seen.numel():
        return 1.0
    check_finite(seen, "calibration")
    # Unseen rows may be larger than the calibration rows: leave a factor of eight below fp16's 65504.
    return power_of_two_scale(float(seen.abs().max()), 8192.0)


def _rounded(folded: _Folded, dtype: torch.dtype, calibration: Tensor | ColumnRange | None) -> dict[str, Any]:
    """Projection and phase in ``dtype``, with what an int8 map has beside them, as fields of a ``FeatureMap``."""
    projection, phase = folded.projection, folded.phase
    if dtype != torch.int8:
        return {
            "projection": None if projection is None else projection.to(dtype).contiguous(),
            "phase": None if phase is None else phase.float(),
        }
    assert projection is not None
    assert phase is not None
    check_finite(projection, f"projection in {dtype}")
    if isinstance(calibration, Tensor):
        check_finite(calibration, "calibration")
    return dict(quantize_projection(projection, phase, calibration))


def _converged_norm(weight: Tensor, vector: Tensor, *, tolerance: float = 1e-7, limit: int = 2000) -> Tensor:
    # Small matrices: exactly. Large ones: an SVD costs minutes, power iteration reads W a few hundred times.
    if min(weight.shape) <= 512:
        return reference.spectral_norm(weight.double()).to(weight.dtype)
    weight, vector = weight.double(), vector.double()
    sigma = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for _ in range(0, limit, 20):
        previous = sigma
        sigma, vector = ops.power_iteration(weight, vector, 20)
        if float((sigma - previous).abs()) <= tolerance * float(sigma):
            break
    return sigma.to(torch.float32)
