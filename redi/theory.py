"""How wrong a leap can be: Lipschitz constants, the bounds they give before a leap is taken, and their calibration.

Pure functions in the letters of the paper (Zhang et al. 2023, §5) and of "Theory" in the documentation, which derives
them. Nothing here decides whether to leap: that is `redi.gate`.

A sample is seen as x̄ = x / a at the time λ = −log σ̄ with σ̄ = s / a, where the probability-flow ODE of every noise law
is dx̄/dλ = D(x̄) − x̄, D being the denoised prediction. Its exponents ∫L are those of any other clock; of the paper's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import nnls
from torch import Tensor

from redi.errors import InvalidInputError
from redi.schedules import Grid

Field = Callable[[Tensor], Tensor]
"""A map of samples (b, *s) to samples that takes each by itself."""

_TINY: Final = 1e-30


def clock(grid: Grid) -> Float64[Tensor, " p"]:
    """λ = log(a / s) at every grid point: −∞ without signal, ∞ without noise."""
    return torch.log(grid.signal / grid.noise)


def right_hand_side(denoise: Callable[[Tensor, Tensor], Tensor], grid: Grid, at: int) -> Field:
    """x̄ ↦ dx̄/dλ = D(a x̄, t) − x̄, the right-hand side of the probability-flow ODE (the paper's Eq. 12).

    Args:
        denoise: the model: `denoise(x, t)`, as `ReDiEngine.sample` calls it, with its condition bound.
        grid: of the solver.
        at: which grid point.
    """
    a = float(grid.signal[at])

    def f(x: Tensor) -> Tensor:
        return grid.denoised(denoise(grid.scale_input(a * x, at), grid.timesteps[at]), a * x, at) - x

    return f


def operator_norm(
    f: Field,
    x: Float[Tensor, "b *s"],
    *,
    generator: torch.Generator,
    tolerance: float = 1e-3,
    iterations: int = 100,
) -> Float64[Tensor, " b"]:
    """‖J‖₂ of f's Jacobian at each sample: the Lipschitz constant there.

    Power iteration on JᵀJ by Jacobian–vector products, with all its vectors kept (Lanczos), so that few are needed.
    What is found comes from below.

    Args:
        f: differentiable backwards, twice (attention that is not fused).
        x: where.
        generator: draws the first vector.
        tolerance: relative change of the estimate at which to stop.
        iterations: at most; so many vectors are kept.
    """
    push, pull = _linearized(f, x)
    return _largest(lambda v: pull(push(v)), x, generator, tolerance, iterations).clamp(min=0).sqrt()


def logarithmic_norm(
    f: Field,
    x: Float[Tensor, "b *s"],
    *,
    generator: torch.Generator,
    tolerance: float = 1e-3,
    iterations: int = 100,
) -> Float64[Tensor, " b"]:
    """μ₂ of f's Jacobian at each sample: the largest eigenvalue of (J + Jᵀ)/2, which may be negative.

    In place of L it makes Grönwall's bound sharper (Dahlquist 1958): two solutions part by no more than e^{∫μ}, and
    where the flow contracts the bound does. Arguments as for `operator_norm`.
    """
    push, pull = _linearized(f, x)
    return _largest(lambda v: (push(v) + pull(v)) / 2, x, generator, tolerance, iterations)


def value_bound(
    epsilon: Float[Tensor, " b"],
    L: Float64[Tensor, " p"],
    clock: Float64[Tensor, " p"],
    m: Float64[Tensor, " p"] | None = None,
) -> Float64[Tensor, " b"]:
    """e^{∫L} ε + ∫ e^{∫L} m: Theorem 5.3 by Grönwall, and what is added by conditions that differ.

    Args:
        epsilon: d(x̄_k, key) at the start of the leap.
        L: Lipschitz constants (or logarithmic norms) of the right-hand side, at the grid points from k to v.
        clock: λ there, ascending and finite.
        m: ‖D(x̄, c) − D(x̄, c′)‖ there, by how much the two conditions disagree on one sample; None is not at all, which
            is the theorem as published.

    Returns:
        A bound on d(x̄_v, val). Between grid points L and m are taken as the mean of both ends.
    """
    _require_clock(clock, L)
    e = epsilon.detach().double()
    for i, h in enumerate(clock.diff().tolist()):
        rate = float(L[i] + L[i + 1]) / 2
        push = 0.0 if m is None else float(m[i] + m[i + 1]) / 2
        e = math.exp(rate * h) * e + push * (math.expm1(rate * h) / rate if abs(rate) > _TINY else h)
    return e


def residual_bound(
    epsilon: Float[Tensor, " b"],
    L: Float64[Tensor, " p"],
    clock: Float64[Tensor, " p"],
    m: Float64[Tensor, " p"] | None = None,
) -> Float64[Tensor, " b"]:
    """(e^{∫L} − 1) ε + ∫ e^{∫L} m: how far x̄_v − x̄_k can differ between two solutions; nothing for no leap.

    L must be Lipschitz constants, not logarithmic norms. Arguments as for `value_bound`.
    """
    return value_bound(epsilon, L, clock, m) - epsilon.detach().double()


def first_order_defect(h: float, G: float) -> float:
    """G (h − 1 + e^{−h}) ≈ G h²/2: the Lipschitz constant of the defect of DDIM's step of length h in λ.

    The step keeps D as it is at its start, so what it misses is ∫₀ʰ e^{−(h−τ)} (D(τ) − D(0)) dτ.

    Args:
        h: length of the step in λ.
        G: Lipschitz constant of dD/dλ along solutions.
    """
    return G * (h + math.expm1(-h))


def defect_bound(
    C: Float64[Tensor, " l"], propagation: Float64[Tensor, " l"], epsilon: Float[Tensor, " b"]
) -> Float64[Tensor, " b"]:
    """Σ_j Λ_j C_j ε: the error of a plan whose every leap is corrected by retrieved defects.

    Args:
        C: Lipschitz constant of each leap's defect in what neighbours are found by.
        propagation: Λ_j, by how much an error made in leap j has grown at the end.
        epsilon: distance of each query to its neighbours, see `Interpolation`.
    """
    return (propagation * C).sum() * epsilon.detach().double()


@final
@dataclass(frozen=True)
class Interpolation:
    """What weights make of the distances between a query and its neighbours; one number for each query.

    For g of Lipschitz constant Λ and weights that sum to one, ‖g(q) − Σ w_i g(key_i)‖ ≤ Λ · spread, and no constant
    times the residual bounds it. If g' has Lipschitz constant Γ too, it is ≤ ‖g'(q)‖ · residual + Γ/2 · curvature.

    Args:
        residual: ‖q − Σ w_i key_i‖.
        spread: Σ |w_i| ‖q − key_i‖.
        curvature: Σ |w_i| ‖q − key_i‖².
        missing: |1 − Σ w_i|; where it is not zero, so much of ‖g(q)‖ is added.
    """

    residual: Float64[Tensor, " b"]
    spread: Float64[Tensor, " b"]
    curvature: Float64[Tensor, " b"]
    missing: Float64[Tensor, " b"]

    @classmethod
    def of(
        cls, weights: Float[Tensor, "b k"], keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]
    ) -> Interpolation:
        """Of these weights."""
        w, apart = weights.double(), query.double()[:, None] - keys.double()
        r = apart.norm(dim=2)
        gap = query.double() - (w[..., None] * keys.double()).sum(1)
        return cls(gap.norm(dim=1), (w.abs() * r).sum(1), (w.abs() * r**2).sum(1), (1 - w.sum(1)).abs())


@final
@dataclass(frozen=True)
class Differences:
    """By how much g differs between rows, next to how far their keys are apart.

    Args:
        keys: ‖key_i − key_j‖ of each pair.
        values: ‖g_i − g_j‖ of each pair.
        size: mean of ‖g_i‖² over the rows.
    """

    keys: Float64[Tensor, " p"]
    values: Float64[Tensor, " p"]
    size: float

    @classmethod
    def between(
        cls, keys: Float[Tensor, "n d"], values: Float[Tensor, "n *s"], pairs: Int64[Tensor, "p 2"]
    ) -> Differences:
        """Of these pairs of rows; g is the sample a leap arrives at (`Value`), or a bracket of `redi.transports`."""
        i, j = pairs.unbind(1)
        q, g = keys.double(), values.flatten(1).double()
        return cls((q[i] - q[j]).norm(dim=1), (g[i] - g[j]).norm(dim=1), float(g.square().sum(1).mean()))

    def lipschitz(self, quantile: float = 1.0) -> float:
        """A quantile of ‖g_i − g_j‖ / ‖key_i − key_j‖ over the pairs whose keys differ; 1 is the largest.

        A lower bound on the Lipschitz constant, however many rows there are.

        Raises:
            InvalidInputError: all keys are equal.
        """
        apart = self.keys > 0
        if not apart.any():
            raise InvalidInputError("a difference quotient needs two rows whose keys differ; all are equal")
        return float(torch.quantile(self.values[apart] / self.keys[apart], quantile))


def nearest_pairs(keys: Float[Tensor, "n d"], k: int) -> Int64[Tensor, "p 2"]:
    """Each row with its k nearest others (all others where they are fewer).

    Raises:
        InvalidInputError: fewer than two rows, or k < 1.
    """
    n = len(keys)
    if n < 2 or k < 1:
        raise InvalidInputError(f"pairs need at least 2 rows and k ≥ 1, given {n} rows and k={k}")
    k, points, parts = min(k, n - 1), keys.float(), list[Tensor]()
    for rows in torch.arange(n).split(256):
        # the direct form: products would cancel the digits in which near rows differ
        d = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        d[torch.arange(len(rows)), rows] = torch.inf
        parts.append(torch.stack([rows.repeat_interleave(k), d.topk(k, largest=False).indices.flatten()], 1))
    return torch.cat(parts)


@final
@dataclass(frozen=True)
class Variogram:
    """The bound in the mean: E‖g_i − g_j‖² = nugget + slope · ‖key_i − key_j‖² over pairs of rows.

    √slope is a Lipschitz constant in the mean. The nugget is what keys do not show: two conditions may agree in the key
    and part later. Where the law holds for query and rows alike, the mean squared error of any weights follows from it
    exactly (Matheron 1963), which no largest quotient gives: averaging over neighbours makes an error smaller.

    Args:
        nugget: in squared units of g.
        slope: in those per squared unit of the keys.
        size: mean of ‖g‖².
    """

    nugget: float
    slope: float
    size: float

    @classmethod
    def fit(cls, found: Differences) -> Variogram:
        """Non-negative least squares of ‖g_i − g_j‖² on ‖key_i − key_j‖²."""
        x, y = found.keys.square().numpy(), found.values.square().numpy()
        unit, top = max(float(x.mean()), _TINY), max(float(y.mean()), _TINY)
        (nugget, slope), _ = nnls(np.stack([np.ones_like(x), x / unit], 1), y / top)
        return cls(float(nugget) * top, float(slope) * top / unit, found.size)

    def expected(
        self, weights: Float[Tensor, "b k"], keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]
    ) -> Float64[Tensor, " b"]:
        """Root of E‖g(q) − Σ w_i g(key_i)‖².

        For weights that sum to one its square is nugget · (1 + Σ w_i²)/2 + slope · ‖q − Σ w_i key_i‖²; what they lack
        of one is charged with the size of g.
        """
        w, K, q = weights.double(), keys.double(), query.double()
        total = w.sum(1)
        r2 = (q[:, None] - K).square().sum(2)
        # Σ_i w_i r_i² − ½ Σ_ij w_i w_j r_ij², by ‖Σ_i w_i (q − key_i)‖² = total Σ_i w_i r_i² − ½ Σ_ij w_i w_j r_ij²
        gap = (total[:, None] * q - (w[..., None] * K).sum(1)).square().sum(1) + (1 - total) * (w * r2).sum(1)
        scatter = total - (total**2 - w.square().sum(1)) / 2
        squared = self.slope * gap + self.nugget * scatter + (1 - total) ** 2 * self.size
        return squared.clamp(min=0).sqrt()


@final
@dataclass(frozen=True)
class Calibrated:
    """A bound turned into what to expect: error ≈ factor · bound^power, rising, fitted on measured errors.

    Args:
        factor: of the expected error.
        power: ≥ 0.
        margin: what the expected error is multiplied by so that `level` of the samples stay within.
        level: share of samples.
    """

    factor: float
    power: float
    margin: float
    level: float

    @classmethod
    def fit(cls, bound: Float[Tensor, " n"], error: Float[Tensor, " n"], level: float = 0.9) -> Calibrated:
        """Least squares of log error on log bound; mean and margin as the samples have them.

        Args:
            bound: of each sample, > 0.
            error: measured on it, > 0.
            level: share of samples to stay within `upper`.

        Raises:
            InvalidInputError: fewer than two samples, values that are not positive, or a level outside (0, 1).
        """
        b, e = bound.detach().double(), error.detach().double()
        usable = bool(torch.isfinite(b).all() and torch.isfinite(e).all() and (b > 0).all() and (e > 0).all())
        if len(b) != len(e) or len(b) < 2 or not usable or not 0 < level < 1:
            raise InvalidInputError(
                f"calibration needs at least 2 positive, finite bounds with an error each and a level in (0, 1), given "
                f"{len(b)} bounds, {len(e)} errors, level {level}"
            )
        x, y = b.log(), e.log()
        spread = (x - x.mean()).square().sum()
        power = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / spread)) if float(spread) > 0 else 0.0
        shape = torch.exp(power * (x - x.mean()))
        factor = float(e.mean() / shape.mean()) * math.exp(-power * float(x.mean()))
        ratio = e / (factor * b**power)
        margin = float(torch.quantile(ratio, level, interpolation="higher"))
        return cls(factor, power, margin * (1 + 1e-12), level)  # so that rounding leaves out none of that share

    def expected(self, bound: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """The error to expect."""
        return self.factor * bound.detach().double() ** self.power

    def upper(self, bound: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """What `level` of the samples stay within."""
        return self.margin * self.expected(bound)

    def coverage(self, bound: Float[Tensor, " n"], error: Float[Tensor, " n"]) -> float:
        """Share of other samples that did stay within."""
        return float((error.detach().double() <= self.upper(bound)).double().mean())


def _linearized(f: Field, x: Tensor) -> tuple[Field, Field]:
    """Multiplication by the Jacobian J at x, and by Jᵀ, with one evaluation of f for all of them.

    J v is the transpose of the linear map u ↦ Jᵀ u, so f need only be differentiable backwards, twice.
    """
    transposed = torch.func.vjp(f, x)[1]

    def pull(u: Tensor) -> Tensor:
        return transposed(u)[0]

    plain = torch.func.vjp(pull, torch.zeros_like(x))[1]
    return lambda v: plain(v)[0], pull


def _largest(
    apply: Field, x: Tensor, generator: torch.Generator, tolerance: float, iterations: int
) -> Float64[Tensor, " b"]:
    """The largest eigenvalue of a symmetric operator, by the Lanczos process with all vectors kept orthogonal."""
    basis = [_unit(torch.randn(x.shape, generator=generator, dtype=torch.float64))]
    T = torch.zeros(len(x), iterations, iterations, dtype=torch.float64)
    value = torch.zeros(len(x), dtype=torch.float64)
    for i in range(iterations):
        w = apply(basis[i].to(x.dtype)).detach().double()
        # where the space is used up the vector is zero; any number the operator takes on a unit vector does no harm
        T[:, i, i] = torch.where(_dot(basis[i], basis[i]) > 0, _dot(basis[i], w), T[:, 0, 0])
        for v in (*basis, *basis):  # twice is enough (Parlett 1998, §6.9)
            w = w - _dot(v, w).reshape(-1, *[1] * (x.ndim - 1)) * v
        ritz = torch.linalg.eigvalsh(T[:, : i + 1, : i + 1])
        size, norm = ritz.abs().amax(1), _dot(w, w).sqrt()
        settled = i > 0 and bool(((ritz[:, -1] - value).abs() <= tolerance * size).all())
        value = ritz[:, -1]
        norm = torch.where(norm > torch.finfo(x.dtype).eps * size, norm, 0)
        if settled or i + 1 == iterations or not bool((norm > 0).any()):
            break
        T[:, i, i + 1] = T[:, i + 1, i] = norm
        basis.append(_unit(w) * (norm > 0).reshape(-1, *[1] * (x.ndim - 1)))
    return value


def _dot(v: Tensor, w: Tensor) -> Float64[Tensor, " b"]:
    return (v * w).flatten(1).sum(1)


def _unit(v: Tensor) -> Tensor:
    norm = v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
    return v / torch.where(norm > 0, norm, 1)


def _require_clock(clock: Tensor, L: Tensor) -> None:
    if not (bool(torch.isfinite(clock).all()) and bool((clock.diff() >= 0).all()) and bool(torch.isfinite(L).all())):
        raise InvalidInputError(
            f"a bound needs λ finite and ascending, and L finite, given λ = {clock.tolist()} and L = {L.tolist()}; at "
            "σ = 0 λ is infinite, and the last step to it is D itself"
        )
