r"""Every formula of rmcore in plain torch: the oracle of the tests and the baseline of the benches.

No cleverness and no dtype policy: a function computes in the dtype of what it is given (float64 for truth) and
broadcasts over leading batch dimensions. Notation, used everywhere in the library (one row per pair unless said):

====  =======================================================================================================
B     rows; ``h`` hidden size; ``m`` width of the spectral-normalised layer; ``D`` number of features
x     hidden states (..., B, h); ``z = W̄ x + b_s`` (..., B, m)
φ     features (..., B, D); for random Fourier features ``φ = κ √(2/D) cos(Ω z / ℓ + b)``
g     logit ``βᵀφ + β₀``; ``P`` posterior precision (D, D); ``U = L⁻¹`` with ``P = L Lᵀ``, lower triangular
v     variance of the logit ``‖Uφ‖²``; ``u = √(1 + a v)`` uncertainty; ``p = g / u`` preference, in logits
p̃     antisymmetric preference of a group (K, K): ``p̃[i, j] > 0`` says response i is better than j
====  =======================================================================================================

Sources: SNGP, Liu et al. 2020 (arXiv:2006.10108); random Fourier features, Rahimi & Recht 2007; Laplace posterior,
MacKay 1992; uncertainty routing and its RLOO advantages, "Ask a Strong LLM Judge when Your Reward Model is
Uncertain", NeurIPS 2025; RLOO, Ahmadian et al. 2024 (arXiv:2402.14740); GRPO, Shao et al. 2024 (arXiv:2402.03300).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "MEDIAN_ROWS",
    "TILE",
    "Activation",
    "Likelihood",
    "OrderMean",
    "accumulate",
    "concat_preference",
    "difference_variance",
    "draw_features",
    "fold_projection",
    "grpo_advantages",
    "linear_features",
    "log_likelihood",
    "logit",
    "mean_field_amplitude",
    "mean_of_orders",
    "median_length_scale",
    "median_rows",
    "normalized_layer",
    "novelty",
    "pack_lower",
    "pair_novelty",
    "pair_variance",
    "phase_features",
    "power_iteration",
    "preference",
    "random_fourier_features",
    "rloo_advantages",
    "rloo_rewards",
    "score",
    "spectral_norm",
    "spectral_normalize",
    "triangular_factor",
    "uncertainty",
    "unpack_lower",
    "variance",
    "verdict_logit",
]

TILE = 128
"""Edge of the square tiles a packed triangular factor is stored in."""

Likelihood: TypeAlias = Literal["logistic", "gaussian"]
Activation: TypeAlias = Literal["none", "tanh"]
OrderMean: TypeAlias = Literal["logits", "probabilities"]


# -- 1. spectral-normalised layer ------------------------------------------------------------------------------------


def spectral_norm(weight: Tensor) -> Tensor:
    """σ(W), the largest singular value, by SVD. ``weight`` (..., m, h) → (...)."""
    return torch.linalg.svdvals(weight)[..., 0]


def power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ(W) by ``iterations`` steps of power iteration on WᵀW from ``vector``.

    One step is ``y = W v; σ = ‖y‖; v ← Wᵀy / ‖Wᵀy‖`` with ‖v‖ = 1 on entry of each step, so σ never exceeds the true
    norm. ``weight`` (m, h), ``vector`` (h,) → σ (), v (h,). A zero matrix gives σ = 0 and leaves v. 16-bit weights are
    multiplied in float32.
    """
    compute = torch.promote_types(torch.promote_types(weight.dtype, vector.dtype), torch.float32)
    weight, vector = weight.to(compute), vector.to(compute)
    v = vector / vector.norm()
    sigma = (weight @ v).norm()
    for _ in range(iterations):
        y = weight @ v
        sigma = y.norm()
        w = weight.mT @ y
        norm = w.norm()
        v = torch.where(norm > 0, w / norm.clamp_min(torch.finfo(w.dtype).tiny), v)
    return sigma, v


def spectral_normalize(weight: Tensor, bound: float, sigma: Tensor | None = None) -> Tensor:
    """W̄ = W · min(1, c/σ): a *soft* bound, a matrix already under c is untouched (design 2.1)."""
    sigma = spectral_norm(weight) if sigma is None else sigma
    return weight * (bound / sigma.clamp_min(torch.finfo(weight.dtype).tiny)).clamp_max(1.0)


def normalized_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    layernorm: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """z = layernorm(activation(W̄ x + b_s)); ``weight`` is W̄ (m, h), already normalised. (..., h) → (..., m).

    The layer norm has no affine part: a trainable gain would undo the Lipschitz bound of W̄.
    """
    z = x @ weight.mT
    if bias is not None:
        z = z + bias
    if activation == "tanh":
        # tanh saturates: an infinite value would come out as a confident answer. z − z keeps it NaN.
        z = torch.tanh(z) + (z - z)
    if layernorm:
        z = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=eps)
    return z


# -- 2. features -----------------------------------------------------------------------------------------------------


def draw_features(
    num_features: int,
    size: int,
    *,
    seed: int = 0,
    orthogonal: bool = False,
    rounding: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Ω (D, m) with N(0, 1) entries and b (D,) uniform on [0, 2π), rounded through ``rounding`` when drawn.

    Rounding here, and using the rounded values everywhere, makes low precision part of the draw rather than an error
    of the features. ``orthogonal=True`` draws blocks of m orthogonal rows with χ(m)-distributed lengths (Yu et al.
    2016): the same kernel in expectation, less variance.
    """
    generator = torch.Generator().manual_seed(seed)
    if orthogonal:
        blocks = []
        for _ in range(math.ceil(num_features / size)):
            q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
            q = q * torch.sign(torch.diagonal(r))  # makes q Haar-distributed
            lengths = torch.randn(size, size, generator=generator, dtype=torch.float64).norm(dim=1)
            blocks.append(q * lengths[:, None])
        omega = torch.cat(blocks)[:num_features]
    else:
        omega = torch.randn(num_features, size, generator=generator, dtype=torch.float64)
    b = torch.rand(num_features, generator=generator, dtype=torch.float64) * (2 * math.pi)
    return omega.to(rounding).to(dtype), b.to(rounding).to(dtype)


MEDIAN_ROWS = 2048
"""Rows that a length-scale is taken from."""


def median_length_scale(z: Tensor, *, max_rows: int = MEDIAN_ROWS, seed: int = 0) -> Tensor:
    """ℓ by the median rule: the median distance between distinct rows of ``z`` (N, m), over at most ``max_rows``.

    Raises ValueError where no two rows differ (there is no scale to take).
    """
    if z.shape[0] > max_rows:
        z = z[median_rows(z.shape[0], max_rows=max_rows, seed=seed).to(z.device)]
    distances = torch.nn.functional.pdist(z.double())
    distances = distances[distances > 0]
    if distances.numel() == 0:
        raise ValueError("median_length_scale: no two rows of z differ, so there is no distance to take a median of")
    return distances.median().to(z.dtype)


def median_rows(count: int, *, max_rows: int = MEDIAN_ROWS, seed: int = 0) -> Tensor:
    """Numbers of the rows, of ``count``, that :func:`median_length_scale` measures; all of them where they are few."""
    if count <= max_rows:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:max_rows]


def random_fourier_features(
    z: Tensor, omega: Tensor, b: Tensor, *, length_scale: float | Tensor = 1.0, kernel_scale: float = 1.0
) -> Tensor:
    """φ = κ √(2/D) cos(Ω z / ℓ + b), so that E[φ(z)ᵀφ(z')] = κ² exp(−‖z − z'‖² / 2ℓ²). (..., m) → (..., D)."""
    scale = kernel_scale * math.sqrt(2.0 / omega.shape[0])
    return scale * torch.cos(z @ omega.mT / length_scale + b)


def linear_features(z: Tensor) -> Tensor:
    """φ = z: last-layer Laplace on an ordinary reward head."""
    return z


def fold_projection(
    omega: Tensor, b: Tensor, length_scale: float | Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The serving form of layer 1 and 2 in one matrix, in *turns*: (Ω W̄ / 2πℓ, (Ω b_s / ℓ + b) / 2π mod 1).

    Legal when nothing non-linear stands between W̄ and Ω. In turns, because a kernel then reduces the phase with
    ``t − round(t)`` and no multiplication. → projection (D, h), phase (D,).
    """
    projection = omega / (2 * math.pi * length_scale)
    phase = b / (2 * math.pi)
    if bias is not None:
        phase = phase + projection @ bias
    if weight is not None:
        projection = projection @ weight
    return projection, phase - phase.floor()


def phase_features(x: Tensor, projection: Tensor, phase: Tensor) -> Tensor:
    """c = cos(2π (x projectionᵀ + phase)), the unscaled serving features: φ = κ √(2/D) c. (..., h) → (..., D)."""
    turns = x @ projection.mT + phase
    return torch.cos(2 * math.pi * (turns - turns.round()))


# -- 3. logit, 4. posterior, 5. uncertainty --------------------------------------------------------------------------


def logit(phi: Tensor, beta: Tensor, beta0: float | Tensor = 0.0) -> Tensor:
    """g = βᵀφ + β₀. (..., D) → (...)."""
    return phi @ beta + beta0


def log_likelihood(g: Tensor, labels: Tensor) -> Tensor:
    """Bernoulli log-likelihood y log σ(g) + (1−y) log σ(−g) per row; labels may be soft, in [0, 1]."""
    return labels * torch.nn.functional.logsigmoid(g) + (1 - labels) * torch.nn.functional.logsigmoid(-g)


def accumulate(
    phi: Tensor,
    labels: Tensor,
    beta: Tensor,
    *,
    beta0: float | Tensor = 0.0,
    likelihood: Likelihood = "logistic",
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one pass over the data adds: (ΦᵀWΦ, Φᵀ(y−p), Σ log-likelihood).

    ``phi`` (N, D): in difference mode the rows are φ_first − φ_second. W = diag(p(1−p)) at β for ``logistic`` and I
    for ``gaussian``; gradient and log-likelihood are the logistic ones in both. → (D, D), (D,), ().
    """
    g = logit(phi, beta, beta0)
    p = torch.sigmoid(g)
    weight = torch.ones_like(g) if sample_weight is None else sample_weight.to(g.dtype)
    curvature = weight * p * (1 - p) if likelihood == "logistic" else weight
    gram = phi.mT @ (curvature[:, None] * phi)
    return gram, phi.mT @ (weight * (labels - p)), (weight * log_likelihood(g, labels)).sum()


def triangular_factor(precision: Tensor, *, ridge: float = 1.0, likelihood: Likelihood = "logistic") -> Tensor:
    """U = √const · L⁻¹ with P = L Lᵀ; const = s for ``gaussian`` (v = s φᵀP⁻¹φ) and 1 for ``logistic``. (D, D)."""
    lower = torch.linalg.cholesky(precision)
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    factor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return factor * math.sqrt(ridge) if likelihood == "gaussian" else factor


def variance(phi: Tensor, factor: Tensor) -> Tensor:
    """v = ‖U φ‖². (..., D), (D, D) → (...)."""
    return (phi @ factor.mT).square().sum(-1)


def mean_field_amplitude() -> float:
    """a = π/8: E[σ(g)] ≈ σ(g / √(1 + π/8 · v)) for g ~ N(·, v) (MacKay 1992). κ² is in φ, hence already in v."""
    return math.pi / 8


def uncertainty(v: Tensor, amplitude: float) -> Tensor:
    """u = √(1 + a v) ≥ 1."""
    return torch.sqrt(1 + amplitude * v)


def preference(g: Tensor, u: Tensor) -> Tensor:
    """p = g / u, a calibrated logit."""
    return g / u


def score(
    phi: Tensor, beta: Tensor, factor: Tensor, *, beta0: float = 0.0, amplitude: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(g, v, u, p) of feature rows (..., D)."""
    g, v = logit(phi, beta, beta0), variance(phi, factor)
    u = uncertainty(v, mean_field_amplitude() if amplitude is None else amplitude)
    return g, v, u, preference(g, u)


# -- 6. pair modes ---------------------------------------------------------------------------------------------------


def pair_variance(phi: Tensor, beta: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Difference mode: all pairs of a group. phi (..., K, D) → g (..., K, K) antisymmetric, v (..., K, K) symmetric.

    ``v_ij = ‖U(φ_i − φ_j)‖²`` from the differences themselves, never as G_ii + G_jj − 2 G_ij.
    """
    delta = phi[..., :, None, :] - phi[..., None, :, :]
    return logit(delta, beta), variance(delta, factor)


def difference_variance(variance: Tensor, coefficients: Tensor) -> Tensor:
    """Variance of Σ a_i s_i, Σ a_i = 0, from the variances v_ij of the differences s_i − s_j: −½ aᵀVa.

    Pairs of a group share its rows, so v_ij = ‖y_i − y_j‖² with y = Uφ, and ‖Σ a_i y_i‖² needs the v alone: the
    covariance of all pairs is in them, and no product with U is left to do. It holds for every v that is the variance
    of a difference (Schoenberg 1935), of samples too. ``variance`` (..., K, K) symmetric with 0 on its diagonal,
    ``coefficients`` (..., M, K) with rows summing to 0 → (..., M). Rounding of the v can leave less than nothing: what
    is below 0 is 0.
    """
    return (-0.5 * ((coefficients @ variance) * coefficients).sum(-1)).clamp_min(0.0)


def novelty(phi: Tensor, rows: Tensor, *, ridge: float, prior: float | None = 1.0) -> Tensor:
    """N = s φᵀP_r⁻¹φ · k₀ / k(x, x), P_r = s·k₀·I + Σ φφᵀ over the training ``rows`` (N, D): the row posterior.

    The share of the prior variance of a *row's* score that the training rows leave: 1 far from all of them, near 0 on
    one. ``phi`` (..., D) → (...). ``prior`` is k₀: κ² for random features, and k(x, x) with it; None for linear
    features, which have k(x, x) = ‖φ‖² and k₀ its mean over the training rows.
    """
    linear = prior is None
    scale = rows.square().sum(-1).mean() if prior is None else prior
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    factor = triangular_factor(ridge * scale * eye + rows.mT @ rows) * (ridge * scale) ** 0.5
    return variance(phi, factor) / (phi.square().sum(-1) if linear else scale)


def pair_novelty(n: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The mean of the two rows' novelty: ``n`` (R,), rows of the pairs (Q,) each → (Q,)."""
    return (n[first.to(n.device)] + n[second.to(n.device)]) / 2


def concat_preference(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Concat mode, both orders scored: p̃ = (p − pᵀ)/2 and u = (u + uᵀ)/2 over (..., K, K)."""
    return (p - p.mT) / 2, (u + u.mT) / 2


def mean_of_orders(forward: Tensor, backward: Tensor, how: OrderMean = "logits") -> Tensor:
    """One logit of a pair from those of its two orders (i, j) and (j, i); it changes sign with them.

    ``logits``: (f − b)/2. ``probabilities``: σ⁻¹ of the mean of σ(f) and 1 − σ(b), as RLHFlow's pair model has it.
    """
    if how == "logits":
        return (forward - backward) / 2
    first, second = torch.stack([forward, -forward]), torch.stack([-backward, backward])
    log_sigmoid = torch.nn.functional.logsigmoid
    for_it, against = torch.logaddexp(log_sigmoid(first), log_sigmoid(second))
    return for_it - against


# -- 7. judge, 8. advantages -----------------------------------------------------------------------------------------


def verdict_logit(preference: float | Tensor, epsilon: float = 0.12) -> Tensor:
    """J = ±σ⁻¹(1−ε) for win/loss (preference ±1), 0 for a tie; ε = 0.12 gives ±1.99, the published ±2.

    A soft preference q in (−1, 1) interpolates the *probability*: J = σ⁻¹(½ + q(½ − ε)).
    """
    q = torch.as_tensor(preference, dtype=torch.float64)
    return torch.special.logit(0.5 + q * (0.5 - epsilon))


def _off_diagonal_sum(preferences: Tensor) -> Tensor:
    k = preferences.shape[-1]
    eye = torch.eye(k, dtype=torch.bool, device=preferences.device)
    return preferences.masked_fill(eye, 0.0).sum(-1)


def rloo_advantages(preferences: Tensor) -> Tensor:
    """A_i = 1/(K−1) Σ_{j≠i} p̃_ij. (..., K, K) → (..., K); K = 1 gives 0."""
    k = preferences.shape[-1]
    return _off_diagonal_sum(preferences) / max(k - 1, 1)


def rloo_rewards(preferences: Tensor, baseline: Literal["leave-one-out", "group-mean"] = "leave-one-out") -> Tensor:
    """The rewards from which a stock trainer recovers :func:`rloo_advantages` exactly.

    With S_i = Σ_j p̃_ij and p̃ antisymmetric, ΣS = 0. Leave-one-out of r = S/K: S_i/K + S_i/(K(K−1)) = S_i/(K−1).
    Group mean of r = S/(K−1): S_i/(K−1) − 0. (..., K, K) → (..., K).
    """
    k = preferences.shape[-1]
    total = _off_diagonal_sum(preferences)
    return total / k if baseline == "leave-one-out" else total / max(k - 1, 1)


def grpo_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i − mean r) / (std r + eps) over the last dimension (K), std unbiased; K = 1 gives 0."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not scale_by_std or rewards.shape[-1] == 1:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + eps)


# -- packed triangular storage ---------------------------------------------------------------------------------------


def pack_lower(matrix: Tensor, tile: int = TILE) -> Tensor:
    """Lower-triangular (D, D) → its lower tiles (n(n+1)/2, tile, tile), n = ⌈D/tile⌉, zero-padded.

    Tile (i, j ≤ i) is at index i(i+1)/2 + j, row-major inside. What lies above the diagonal is not read.
    """
    d = matrix.shape[-1]
    n = math.ceil(d / tile)
    padded = matrix.new_zeros(n * tile, n * tile)
    padded[:d, :d] = matrix.tril()
    tiles = padded.reshape(n, tile, n, tile).transpose(1, 2)
    rows, cols = torch.tril_indices(n, n, device=matrix.device)
    return tiles[rows, cols].contiguous()


def unpack_lower(tiles: Tensor, size: int) -> Tensor:
    """The inverse of :func:`pack_lower`: (n(n+1)/2, tile, tile) → (D, D)."""
    tile = tiles.shape[-1]
    n = math.ceil(size / tile)
    rows, cols = torch.tril_indices(n, n, device=tiles.device)
    grid = tiles.new_zeros(n, n, tile, tile)
    grid[rows, cols] = tiles
    return grid.transpose(1, 2).reshape(n * tile, n * tile)[:size, :size].contiguous()
