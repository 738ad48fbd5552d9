"""The kernels as functions of plain tensors, for who has matrices and no head.

``score_tensors``, ``accumulate_tensors`` and ``pair_variance_tensors`` take the head as tensors (``power_iteration`` of
:mod:`rmcore.ops` always does); :func:`prepare` and :func:`prepare_features` make the packed form that
``rmcore.ops.score`` and its neighbours take. Notation of :mod:`rmcore.ops.reference`:

    t = z projectionᵀ + phase      c = cos(2πt), or t for linear features      φ = feature_scale · c
    z = x, or layernorm(activation(x layer_weightᵀ + layer_bias)) where there is a layer that does not fold

``projection`` is in turns, Ω W̄ / (2πℓ): :func:`rmcore.ops.reference.fold_projection` makes it and ``phase``. Its dtype
(float16, bfloat16 or float32) is the one the kernels serve in.

Repeated calls with the same tensor objects pack once: the packed form is kept until one of the tensors is freed,
written in place (their version counters tell) or passed with other settings. One form is kept for each set of tensors.
Tensors made under ``torch.inference_mode`` have no version counter, so they are packed at every call. Traced by
``torch.compile`` these functions raise: prepare before, and compile ``rmcore.ops.score``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops import functional
from rmcore.ops.dispatch import Backend
from rmcore.ops.functional import Scores
from rmcore.ops.reference import Activation, Likelihood, mean_field_amplitude
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = [
    "Accumulated",
    "FeatureSettings",
    "accumulate_tensors",
    "pair_variance_tensors",
    "prepare",
    "prepare_features",
    "score_tensors",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Accumulated(NamedTuple):
    """P (D, D), of which only the lower triangle means something; the gradient (D,); Σ log-likelihood ()."""

    precision: Tensor
    gradient: Tensor
    log_likelihood: Tensor


class FeatureSettings(TypedDict, total=False):
    """What features are besides their projection and phase: keyword arguments of every function here, as
    :func:`prepare_features` documents them.
    """

    layer_weight: Tensor | None
    layer_bias: Tensor | None
    activation: Activation
    layernorm: bool
    features: Literal["rff", "linear"]
    feature_scale: float | None


# -- the prepared form -----------------------------------------------------------------------------------------------


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        reject(name, type(tensor).__name__, "a torch.Tensor")
    if tensor.shape != shape or not tensor.dtype.is_floating_point:
        reject(name, f"{tuple(tensor.shape)} {tensor.dtype}", f"{shape} in a floating-point dtype")
    if tensor.device != like.device:
        reject(name, f"device {tensor.device}", f"the projection's device {like.device}")


def prepare_features(
    projection: Tensor,
    phase: Tensor,
    *,
    layer_weight: Tensor | None = None,
    layer_bias: Tensor | None = None,
    activation: Activation = "none",
    layernorm: bool = False,
    features: Literal["rff", "linear"] = "rff",
    feature_scale: float | None = None,
) -> FeatureMap:
    """The features x (B, h) → φ (B, D), as ``rmcore.ops.accumulate`` takes them.

    Args:
        projection: (D, h), or (D, m) after a layer; float16, bfloat16 or float32: the serving dtype.
        phase: (D,), any floating-point dtype; kept in float32.
        layer_weight: (m, h) W̄, already normalised, rounded to the serving dtype; None where nothing stands between.
        layer_bias: (m,).
        activation: after the layer: ``none`` or ``tanh``.
        layernorm: after that, without affine part.
        features: ``rff`` (cosine) or ``linear``.
        feature_scale: φ = feature_scale · c; None is √(2/D) for rff and 1 for linear features.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    if not isinstance(projection, Tensor):
        reject("projection", type(projection).__name__, "a torch.Tensor")
    if projection.dim() != 2 or projection.dtype not in _DTYPES:
        got = f"{tuple(projection.shape)} {projection.dtype}"
        reject("projection", got, "(D, h) or (D, m) float16, bfloat16 or float32")
    size, width = projection.shape
    if activation not in ("none", "tanh"):
        reject("activation", repr(activation), "none or tanh")
    if features not in ("rff", "linear"):
        reject("features", repr(features), "rff or linear")
    if layer_weight is None and (layer_bias is not None or activation != "none" or layernorm):
        reject("layer_weight", "None beside a bias, an activation or layernorm", "(m, h)")
    if features == "linear" and layer_weight is not None:
        reject("features", "'linear' after a layer", "rff, or the layer's matrix as projection")
    _check("phase", phase, (size,), projection)
    hidden_size = width if layer_weight is None else layer_weight.shape[-1]
    _check("layer_weight", layer_weight, (width, hidden_size), projection)
    _check("layer_bias", layer_bias, (width,), projection)
    if feature_scale is None:
        feature_scale = math.sqrt(2.0 / size) if features == "rff" else 1.0
    # Detached, so that what is kept does not keep the caller's tensor objects alive (see _Kept).
    return FeatureMap(
        features=features,
        projection=projection.detach().contiguous(),
        phase=phase.detach().float().contiguous(),
        layer_weight=None if layer_weight is None else layer_weight.detach().to(projection.dtype).contiguous(),
        layer_bias=None if layer_bias is None else layer_bias.detach().float().contiguous(),
        activation=activation,
        layernorm=layernorm,
        hidden_size=hidden_size,
        num_features=size,
        dtype=projection.dtype,
        feature_scale=float(feature_scale),
    )


def prepare(
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    factor: Tensor,
    *,
    beta0: float = 0.0,
    amplitude: float | None = None,
    **settings: Unpack[FeatureSettings],
) -> HeadWeights:
    """A head from plain tensors, packed once, as ``rmcore.ops.score`` and ``rmcore.ops.pair_variance`` take it.

    Args:
        projection: see :func:`prepare_features`, as all that is not named here.
        phase: (D,).
        beta: (D,) for φ; g = βᵀφ + beta0.
        factor: (D, D), U for φ: v = ‖Uφ‖². Only its lower triangle is read; rounded to the projection's dtype.
        beta0: β₀.
        amplitude: a of u = √(1 + a v); None is π/8.
        settings: :class:`FeatureSettings`.

    Raises:
        InputError: a shape, dtype or device does not fit.
        FactorizationError: the factor does not fit the serving dtype's range.
    """
    feature_map = prepare_features(projection, phase, **settings)
    size = feature_map.num_features
    _check("beta", beta, (size,), projection)
    _check("factor", factor, (size, size), projection)
    amplitude = mean_field_amplitude() if amplitude is None else amplitude
    return HeadWeights.build(feature_map, beta.detach(), beta0, factor.detach().tril(), amplitude)


# -- packed once for each set of tensors -----------------------------------------------------------------------------

_Prepared = TypeVar("_Prepared", FeatureMap, HeadWeights)


@dataclass(frozen=True)
class _Kept:
    """A prepared form, and what must not have changed. Weak references: freed tensors take their entry with them."""

    tensors: tuple[weakref.ref[Tensor] | None, ...]
    versions: tuple[int, ...]
    settings: Mapping[str, object]
    prepared: FeatureMap | HeadWeights


_kept: dict[tuple[int, ...], _Kept] = {}


_LAYER = ("layer_weight", "layer_bias")
_DEFAULTS: dict[str, object] = {**(prepare_features.__kwdefaults__ or {}), **(prepare.__kwdefaults__ or {})}


def _once(make: Callable[..., _Prepared], tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> _Prepared:
    """What ``make`` prepares of these arguments; TypeError for a setting that there is not."""
    if torch.compiler.is_compiling():
        reject("hidden", "plain tensors under torch.compile", "a head made by ops.prepare before compiling")
    layer: Any = settings.get("layer_weight"), settings.get("layer_bias")
    given = (*tensors.values(), *layer)
    if not all(isinstance(t, Tensor) and not t.is_inference() for t in given if t is not None):
        return make(**tensors, **settings)
    key = tuple(map(id, given))
    versions = tuple(0 if t is None else t._version for t in given)
    # A default that is given is no other setting than one left out.
    wanted = {
        name: value
        for name, value in settings.items()
        if name not in _LAYER and (name not in _DEFAULTS or value != _DEFAULTS[name])
    }
    found = _kept.get(key)
    if found is not None and found.versions == versions and found.settings == wanted:
        alive = all(ref is None or ref() is t for ref, t in zip(found.tensors, given, strict=True))
        if alive:
            return found.prepared  # type: ignore[return-value]  # the key holds as many tensors as its form takes
    prepared = make(**tensors, **settings)

    def forget(_: object) -> None:
        _kept.pop(key, None)

    references = tuple(None if t is None else weakref.ref(t, forget) for t in given)
    _kept[key] = _Kept(references, versions, wanted, prepared)
    return prepared


# -- the kernels -----------------------------------------------------------------------------------------------------


def score_tensors(
    hidden: Tensor,
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    factor: Tensor,
    *,
    beta0: float = 0.0,
    amplitude: float | None = None,
    backend: Backend = "auto",
    out: Tensor | None = None,
    **settings: Unpack[FeatureSettings],
) -> Scores:
    """Logit g = βᵀφ + β₀, variance v = ‖Uφ‖², uncertainty u = √(1 + a v), preference p = g/u of rows.

    ``hidden`` (B, h), any floating-point dtype; the head's tensors and settings as in :func:`prepare`; ``backend`` and
    ``out`` as in :func:`rmcore.ops.score`. Packs on the first call with these tensors (module docstring).

    Returns:
        :class:`~rmcore.ops.Scores`, each (B,) float32.

    Raises:
        InputError: a shape, dtype or device does not fit.
        FactorizationError: the factor does not fit the serving dtype's range.
        BackendError: the named backend cannot run here.
    """
    tensors = {"projection": projection, "phase": phase, "beta": beta, "factor": factor}
    weights = _once(prepare, tensors, {"beta0": beta0, "amplitude": amplitude, **settings})
    return functional.score(hidden, weights, backend=backend, out=out)


def pair_variance_tensors(
    hidden: Tensor,
    group_sizes: Tensor,
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    factor: Tensor,
    *,
    backend: Backend = "auto",
    **settings: Unpack[FeatureSettings],
) -> tuple[Tensor, Tensor]:
    """Difference mode: g_ij = βᵀ(φ_i − φ_j) and v_ij = ‖U(φ_i − φ_j)‖² of all pairs i < j of every group.

    ``hidden`` (ΣK, h) and ``group_sizes`` (G,) as in :func:`rmcore.ops.pair_variance`; the head's tensors and settings
    as in :func:`prepare`. Packs on the first call with these tensors (module docstring).

    Returns:
        g (Q,), v (Q,) float32, in the order of :func:`rmcore.ops.pair_variance`.

    Raises:
        InputError: a shape, dtype or device does not fit.
        FactorizationError: the factor does not fit the serving dtype's range.
        BackendError: the named backend cannot run here.
    """
    tensors = {"projection": projection, "phase": phase, "beta": beta, "factor": factor}
    weights = _once(prepare, tensors, settings)
    return functional.pair_variance(hidden, group_sizes, weights, backend=backend)


def accumulate_tensors(
    hidden: Tensor,
    labels: Tensor,
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    *,
    precision: Tensor | None = None,
    gradient: Tensor | None = None,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    beta0: float = 0.0,
    likelihood: Likelihood = "logistic",
    backend: Backend = "auto",
    **settings: Unpack[FeatureSettings],
) -> Accumulated:
    """One pass over data: P + ΦᵀWΦ, gradient + Φᵀ(y − p), Σ log-likelihood.

    ``hidden`` (R, h), ``labels`` (N,), ``pairs`` (N, 2), ``sample_weight`` (N,), ``beta`` (D,) for φ, ``beta0`` and
    ``likelihood`` as in :func:`rmcore.ops.accumulate`; the features' tensors and settings as in
    :func:`prepare_features`, packed on the first call with these tensors (module docstring).

    ``precision`` (D, D) and ``gradient`` (D,), float32 or float64, are added to in place (P: its lower triangle) and
    returned; None starts from float64 zeros.

    Raises:
        InputError: a shape, dtype or device does not fit, or a pair index is out of range.
        BackendError: the named backend cannot run here.
    """
    feature_map = _once(prepare_features, {"projection": projection, "phase": phase}, settings)
    d, device = feature_map.num_features, projection.device
    precision = torch.zeros(d, d, dtype=torch.float64, device=device) if precision is None else precision
    gradient = torch.zeros(d, dtype=torch.float64, device=device) if gradient is None else gradient
    total = functional.accumulate(
        hidden,
        labels,
        feature_map,
        beta,
        precision=precision,
        gradient=gradient,
        pairs=pairs,
        sample_weight=sample_weight,
        beta0=beta0,
        likelihood=likelihood,
        backend=backend,
    )
    return Accumulated(precision, gradient, total)
