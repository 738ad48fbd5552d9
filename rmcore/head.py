"""The SNGP head: trainable (:class:`SNGPHead`) and frozen for serving (:class:`FrozenHead`).

Hidden states (B, h) → spectral-normalised layer → random Fourier features → logit and variance (design section 2).
Sources: SNGP, Liu et al. 2020 (arXiv:2006.10108); its pairwise use for routing to a judge, NeurIPS 2025.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from rmcore import ops, reference
from rmcore.errors import NonFiniteError, reject
from rmcore.ops import Backend, Scores
from rmcore.posterior import Posterior, check_finite
from rmcore.quantize import MAX_DEPTH, quantize_projection
from rmcore.reference import Activation, Likelihood
from rmcore.weights import SERVING_DTYPES, FeatureMap, HeadWeights, default_dtype, power_of_two_scale

__all__ = ["FrozenHead", "HeadConfig", "PairMode", "PairScores", "SNGPHead"]

PairMode: TypeAlias = Literal["difference", "concat"]


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, all of it JSON.

    Attributes:
        hidden_size: h of the hidden states.
        num_features: D. With linear features it is the width of z and may be left at 0.
        mode: ``difference`` (one hidden row a response) or ``concat`` (one a pair).
        features: ``rff`` or ``linear``.
        layer_size: m, the width of the spectral-normalised layer; None for no layer (z = x).
        norm_bound: c, the bound on the layer's spectral norm.
        activation: non-linearity after the layer, ``none`` or ``tanh``.
        layernorm: normalise z.
        orthogonal: draw Ω in orthogonal blocks.
        kernel_scale: κ; the kernel's variance is κ².
        length_scale: ℓ; None takes ``length_scale_factor`` times the median distance when fitting.
        length_scale_factor: multiple of the median distance.
        ridge: s, the prior precision of β.
        likelihood: of the posterior, ``logistic`` or ``gaussian``.
        amplitude: a of u = √(1 + a v); None takes π/8, the mean-field value (κ² is already in v).
        seed: of Ω, b and the layer's initial weights.
    """

    hidden_size: int
    num_features: int = 1024
    mode: PairMode = "difference"
    features: Literal["rff", "linear"] = "rff"
    layer_size: int | None = None
    norm_bound: float = 0.95
    activation: Activation = "none"
    layernorm: bool = False
    orthogonal: bool = False
    kernel_scale: float = 1.0
    length_scale: float | None = None
    length_scale_factor: float = 1.0
    ridge: float = 1.0
    likelihood: Likelihood = "logistic"
    amplitude: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "mode": ("difference", "concat"),
            "features": ("rff", "linear"),
            "activation": ("none", "tanh"),
            "likelihood": ("logistic", "gaussian"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                reject(name, repr(getattr(self, name)), f"one of {', '.join(allowed)}")
        if self.features == "linear":
            object.__setattr__(self, "num_features", self.layer_size or self.hidden_size)
        for name in ("hidden_size", "num_features", "layer_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, float) or value < 1):
                reject(name, value, "a positive integer")
        for name in ("norm_bound", "kernel_scale", "length_scale", "length_scale_factor", "ridge"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                reject(name, value, "a positive finite number")
        if self.amplitude is not None and not (math.isfinite(self.amplitude) and self.amplitude >= 0):
            reject("amplitude", self.amplitude, "a non-negative finite number or None")
        if self.layer_size is None and (self.activation != "none" or self.layernorm):
            reject("activation, layernorm", (self.activation, self.layernorm), "none, False where layer_size is None")

    @property
    def resolved_amplitude(self) -> float:
        """A, with the default filled in."""
        return reference.mean_field_amplitude() if self.amplitude is None else self.amplitude

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """From :meth:`to_dict`; an unknown key is rejected by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            reject("head config", f"unknown keys {sorted(unknown)}", "keys of HeadConfig")
        return cls(**values)


class SNGPHead(nn.Module):
    """The trainable head: hidden (..., h) → logit (...), differentiable in W, b_s and β.

    In training mode each forward takes one power-iteration step on W and stops the gradient through σ; in eval mode
    nothing changes. The posterior is not part of training: fit it afterwards with :func:`rmcore.fit.fit`, which returns
    a :class:`FrozenHead`.

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
        """ℓ by the median rule over these rows (N, h), times the configured factor; kept and returned."""
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
    def freeze_features(self, dtype: torch.dtype | None = None, calibration: Tensor | None = None) -> FeatureMap:
        """The serving form of layer and features: σ converged, folded where legal, rounded to ``dtype``.

        Args:
            dtype: serving dtype; None takes the device's default.
            calibration: (N, h) hidden rows; their largest magnitude sets the power-of-two input scale of fp16 heads,
                their columns' means and spreads what int8 heads take rows through first.
        """
        config, device = self.config, self.beta.device
        dtype = default_dtype(device) if dtype is None else dtype
        if dtype not in SERVING_DTYPES:
            reject("dtype", dtype, f"one of {', '.join(map(str, SERVING_DTYPES))}")
        scale = 1.0
        if calibration is not None and dtype == torch.float16 and calibration.numel():
            check_finite(calibration, "calibration")
            # Unseen rows may be larger than the calibration rows: leave a factor of eight below fp16's 65504.
            scale = power_of_two_scale(float(calibration.abs().max()), 8192.0)
        layer = self.normalized_weight(converged=True)
        layer = None if layer is None else layer.double() / scale
        bias = None if self.bias is None else self.bias.double()
        folds = layer is not None and config.activation == "none" and not config.layernorm
        layer_weight = layer_bias = projection = phase = None
        if dtype == torch.int8 and (config.features == "linear" or not (folds or layer is None)):
            reject("dtype", "int8 for linear features, tanh or layernorm", "a 16-bit dtype, or float32")
        if dtype == torch.int8 and max(config.hidden_size, config.num_features) > MAX_DEPTH:
            sizes = f"int8 for h = {config.hidden_size}, D = {config.num_features}"
            reject("dtype", sizes, f"at most {MAX_DEPTH:,} of each, or another dtype")
        if config.features == "linear":
            # z itself is the feature. W̄ is then the projection, unless a non-linearity follows it.
            if layer is not None and not folds:
                reject("config", "linear features after tanh or layernorm", "rff features, or a plain layer")
            projection, phase = layer, bias
            feature_scale = 1.0 / scale if layer is None else 1.0
        else:
            ell = self._checked_length_scale()
            folded_layer, folded_bias = (layer, bias) if folds else (None, None)
            projection, phase = reference.fold_projection(
                self.omega.double(), self.b.double(), ell, folded_layer, folded_bias
            )
            if layer is None:
                projection = projection / scale
            elif not folds:
                layer_weight, layer_bias = layer, bias
            feature_scale = config.kernel_scale * math.sqrt(2.0 / config.num_features)
        quantized: dict[str, Tensor] = {}
        if dtype == torch.int8:
            assert projection is not None
            assert phase is not None
            check_finite(projection, f"projection in {dtype}")
            if calibration is not None:
                check_finite(calibration, "calibration")
            quantized = quantize_projection(projection, phase, calibration)
            projection, phase = quantized.pop("projection"), quantized.pop("phase")
        feature_map = FeatureMap(
            features=config.features,
            projection=None if projection is None else projection.to(dtype).contiguous(),
            phase=None if phase is None else phase.float(),
            layer_weight=None if layer_weight is None else layer_weight.to(dtype).contiguous(),
            layer_bias=None if layer_bias is None else layer_bias.float(),
            activation=config.activation,
            layernorm=config.layernorm,
            hidden_size=config.hidden_size,
            num_features=config.num_features,
            dtype=dtype,
            input_scale=scale,
            feature_scale=feature_scale,
            **quantized,
        )
        for name, tensor in feature_map.tensors().items():
            check_finite(tensor, f"{name} in {dtype}")
        return feature_map

    def _checked_length_scale(self) -> float:
        scale = float(self.length_scale)
        if not math.isfinite(scale):
            reject("length_scale", "none yet", "a value", "Set it in the config, or call set_length_scale or fit")
        return scale


class PairScores(NamedTuple):
    """Difference mode: every pair i < j of every group, flat, in the order of ``ops.pair_variance``; each (Q,)."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


class FrozenHead:
    """A fitted head that serves: immutable features, β, and the posterior's factor.

    ``update`` is the one thing that changes it: it adds data to the posterior and marks the factor stale, and the next
    call that needs the factor rebuilds it first.

    Args:
        config: what the head is; ``length_scale`` filled in.
        feature_map: the frozen features.
        beta: (D,) for φ.
        beta0: logit offset.
        posterior: the posterior fitted with exactly this ``feature_map``, or None for a head that will not learn.
        weights: the serving weights, where already built (loading); otherwise from the posterior.
    """

    def __init__(
        self,
        config: HeadConfig,
        feature_map: FeatureMap,
        beta: Tensor,
        beta0: float = 0.0,
        posterior: Posterior | None = None,
        weights: HeadWeights | None = None,
    ) -> None:
        if posterior is None and weights is None:
            reject("posterior, weights", "neither", "one of them")
        self.config = config
        self.feature_map = feature_map
        self.beta = beta.detach().double()
        self.beta0 = float(beta0)
        self.posterior = posterior
        self._weights = weights
        self._served_count = posterior.count if posterior is not None and weights is not None else -1

    @property
    def weights(self) -> HeadWeights:
        """The serving weights, rebuilt first if the posterior has new data."""
        stale = self.posterior is not None and self.posterior.count != self._served_count
        if self._weights is None or stale:
            assert self.posterior is not None
            self._weights = HeadWeights.build(
                self.feature_map, self.beta, self.beta0, self.posterior.factor(), self.config.resolved_amplitude
            )
            self._served_count = self.posterior.count
        return self._weights

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.beta.device

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.feature_map.dtype

    @torch.no_grad()
    def score(
        self, hidden: Tensor, *, backend: Backend = "auto", nonfinite: Literal["raise", "keep"] = "raise"
    ) -> Scores:
        """Score hidden rows (B, h), each a pair in concat mode. See :func:`rmcore.ops.score`.

        Raises:
            NonFiniteError: a row is NaN or Inf, or overflows the serving dtype, unless ``nonfinite="keep"``, which
                returns NaN or Inf for that row.
        """
        scores = ops.score(hidden, self.weights, backend=backend)
        if nonfinite == "raise":
            _check_results(scores.logit, scores.variance, hidden)
        return scores

    @torch.no_grad()
    def score_pairs(
        self,
        hidden: Tensor,
        group_sizes: Tensor,
        *,
        backend: Backend = "auto",
        nonfinite: Literal["raise", "keep"] = "raise",
    ) -> PairScores:
        """Difference mode: all pairs of each group from one row a response. See :func:`rmcore.ops.pair_variance`.

        Raises:
            NonFiniteError: a row is NaN or Inf, or overflows the serving dtype, unless ``nonfinite="keep"``, which
                returns NaN for the pairs of that row; all other pairs are as if the row were not there.
        """
        if self.config.mode != "difference":
            reject("mode", self.config.mode, "a difference-mode head")
        weights = self.weights
        g, v = ops.pair_variance(hidden, group_sizes, weights, backend=backend)
        finite = (g + v).isfinite()
        if not bool(finite.all()):
            if nonfinite == "raise":
                check_finite(hidden)
                raise NonFiniteError(
                    "hidden: got finite rows that overflow the head's dtype, expected results to be finite"
                )
            self._isolate_bad_rows(hidden, group_sizes, g, v, finite, backend)
        u = reference.uncertainty(v, weights.amplitude)
        return PairScores(g, v, u, reference.preference(g, u))

    def _isolate_bad_rows(
        self, hidden: Tensor, group_sizes: Tensor, g: Tensor, v: Tensor, finite: Tensor, backend: Backend
    ) -> None:
        """Score the good rows of every spoilt group again: a kernel may share work between the rows of a group."""
        row = pair = 0
        for k in group_sizes.tolist():
            rows, pairs = slice(row, row + k), slice(pair, pair + k * (k - 1) // 2)
            row, pair = rows.stop, pairs.stop
            if bool(finite[pairs].all()):
                continue
            # A finite row is bad too where it overflows in the head.
            own = ops.score(hidden[rows], self.weights, backend=backend)
            good = (own.logit + own.variance).isfinite() & hidden[rows].isfinite().all(dim=1)
            i, j = torch.triu_indices(k, k, 1, device=good.device)
            usable = good[i] & good[j]
            g[pairs], v[pairs] = torch.nan, torch.nan
            if bool(usable.any()):
                count = good.sum().to(group_sizes)[None]
                again = ops.pair_variance(hidden[rows][good], count, self.weights, backend=backend)
                g[pairs][usable], v[pairs][usable] = again

    @torch.no_grad()
    def update(
        self, hidden: Tensor, labels: Tensor, *, pairs: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> None:
        """Add data to the posterior at the present β; the factor is rebuilt before it next serves.

        Raises InputError where the head was saved without its posterior.
        """
        if self.posterior is None:
            reject("posterior", "none", "a head fitted here or saved with include_posterior=True")
        self.posterior.accumulate(
            hidden, labels, self.feature_map, self.beta, pairs=pairs, sample_weight=sample_weight, beta0=self.beta0
        )

    def to(self, device: torch.device | str) -> FrozenHead:
        """The same head on another device."""
        return FrozenHead(
            self.config,
            self.feature_map.to(device),
            self.beta.to(device),
            self.beta0,
            None
            if self.posterior is None
            else Posterior.from_gram(
                self.posterior.gram.to(device),
                self.posterior.count,
                ridge=self.posterior.ridge,
                likelihood=self.posterior.likelihood,
            ),
            self.weights.to(device),
        )


def _check_results(logit: Tensor, variance: Tensor, hidden: Tensor) -> None:
    bad = ~(logit.isfinite() & variance.isfinite())
    if bool(bad.any()):
        rows = tuple(bad.nonzero()[:, 0].tolist())
        check_finite(hidden)
        raise NonFiniteError(
            f"hidden: got rows {list(rows[:8])} that overflow the head's dtype, expected finite results", rows
        )


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
