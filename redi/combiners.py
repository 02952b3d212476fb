"""How much each neighbour counts: weights for the query's nearest keys, and the one function that applies them.

Nothing here knows where the neighbours came from or what their values mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from redi.errors import InvalidInputError

_EPS64: Final = float(np.finfo(np.float64).eps)


class Combiner(ABC):
    """A rule that turns a query and its neighbours' keys into weights. A subclass owes `weights`.

    Keys come nearest first. Weights are finite whenever keys and query are. No rule may treat a zero distance as a
    case of its own: what is true at distance zero must be the limit of what is true nearby.
    """

    @abstractmethod
    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """How much of each neighbour's value the query receives, in the query's precision, at least float32."""


@final
@dataclass(frozen=True, slots=True)
class Nearest(Combiner):
    """All weight on the first neighbour."""

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """One for the first neighbour, zero for the others."""
        w = torch.zeros(keys.shape[:2], dtype=torch.float64, device=query.device)
        w[:, 0] = 1
        return _cast(w, query)


@final
@dataclass(frozen=True, slots=True)
class LeastSquares(Combiner):
    """w* = argmin ‖q − Σ w_i key_i‖, of least norm where several are best (Zhang et al. 2023, Algorithm 2).

    Args:
        rcond: directions of the keys with a singular value below `rcond` times their Frobenius norm count as absent,
            so that no more than that share of accuracy is given up. None: the rounding unit of the keys' dtype,
            because keys that differ by less cannot be told apart from keys that were rounded differently.
    """

    rcond: float | None = None

    def __post_init__(self) -> None:
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise InvalidInputError(f"rcond must be in [0, 1), given {self.rcond}")

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """The least-squares weights; they need not sum to one."""
        K, q = _float64(keys).mT, _float64(query)
        rcond = rounding(keys) if self.rcond is None else self.rcond
        return _cast(least_squares(K, q, rcond), query)


@final
@dataclass(frozen=True, slots=True)
class NNLS(Combiner):
    """w* = argmin ‖q − Σ w_i key_i‖ subject to w ≥ 0, shared evenly by equal keys."""

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """The non-negative least-squares weights; they need not sum to one."""
        K, q = _float64(keys).mT, _float64(query)
        return _cast(nonnegative_least_squares(K, q, rounding(keys)), query)


@final
@dataclass(frozen=True, slots=True)
class Affine(Combiner):
    """w* = argmin ‖q − Σ w_i key_i‖² + λ ‖w‖² subject to Σ w_i = 1.

    Weights that sum to one commute with a shift of all latents, and pass on whatever all neighbours share.

    Args:
        ridge: λ divided by the mean squared distance of the neighbours to their mean. 0 interpolates (of least norm
            where several are best); large values tend to the plain mean.
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not (self.ridge >= 0 and math.isfinite(self.ridge)):
            raise InvalidInputError(f"ridge must be a finite number ≥ 0, given {self.ridge}")

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """The ridge-affine weights; they sum to one."""
        K, q = _float64(keys).mT, _float64(query)
        return _cast(affine_least_squares(K, q, self.ridge, rounding(keys)), query)


@final
@dataclass(frozen=True, slots=True)
class Kriging(Combiner):
    """Ordinary kriging (Cressie 1993, §3.2): the best unbiased prediction of a Gaussian process known at the keys.

    Its covariance is exp(−r²/ℓ²), where ℓ² is the mean squared distance between two of the neighbours. Weights sum to
    one as those of `Affine` do, but fall with distance: a query near some of the keys takes after these, and a query
    far from all of them tend to a mean of the neighbours.

    Args:
        nugget: variance of what nearness does not explain, as a share of the process's. Small values interpolate, large
            ones tend to the plain mean.
    """

    nugget: float = 0.1

    def __post_init__(self) -> None:
        if not (self.nugget > 0 and math.isfinite(self.nugget)):
            raise InvalidInputError(f"nugget must be a finite number > 0, given {self.nugget}")

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """The kriging weights; they sum to one."""
        return _cast(ordinary_kriging(_off_mps(keys), _off_mps(query), self.nugget), query)


def combine(weights: Float[Tensor, "b k"], values: Float[Tensor, "b k *s"]) -> Float[Tensor, "b *s"]:
    """Σ_i w_i value_i, accumulated in float32 (float64 where either is); the only place where weights are applied.

    Args:
        weights: one per neighbour.
        values: samples, defects or history of the same neighbours, in any floating-point precision.

    Returns:
        float32 or float64. With one neighbour of weight 1 this is its row bit for bit.
    """
    dtype = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    w = weights.to(dtype).reshape(*weights.shape, *[1] * (values.ndim - 2))
    terms = values.to(dtype)
    terms = w * terms if terms is values else terms.mul_(w)  # what is our own needs no room for another
    return terms.sum(1) if terms.shape[1] > 1 else terms[:, 0]  # a sum begins with +0, which would lose −0


# The mathematics, in float64. K has the keys as columns, d × k with d ≫ k. Latents are far from the origin and differ
# in their fourth digit, so K is ill-conditioned (10⁴ … 10⁷). Forming KᵀK would square that past what float64 holds;
# an orthogonal reduction does not, and costs about as much.


def least_squares(K: Float64[Tensor, "b d k"], q: Float64[Tensor, "b d"], rcond: float) -> Float64[Tensor, "b k"]:
    """argmin_w ‖q − K w‖ of least norm, without directions of K below rcond ‖K‖_F."""
    (keys, k_unit), (query, q_unit) = _unit(K), _unit(q)
    R, r = reduced(keys, query)
    w = ridge_solution(R, r, torch.zeros_like(k_unit), rcond * _frobenius(R))
    return _finite(w * (q_unit / k_unit)[:, None])


def affine_least_squares(
    K: Float64[Tensor, "b d k"], q: Float64[Tensor, "b d"], ridge: float, rcond: float
) -> Float64[Tensor, "b k"]:
    """argmin_w ‖q − K w‖² + λ ‖w‖² s.t. 1ᵀw = 1, with λ = ridge ‖K − K̄‖²_F / k.

    With w = 1/k + u and 1ᵀu = 0 this is min ‖(q − K̄) − (K − K̄) u‖² + λ ‖u‖², whose solution lies in the row space of
    K − K̄ and so sums to zero by itself. The cutoff stays rcond ‖K‖_F: it is the keys that were rounded, not their
    differences.
    """
    k = K.shape[-1]
    keys, query = _same_unit(K, q)
    mean = keys.mean(-1)
    (A, a_unit), (y, y_unit) = _unit(keys - mean[..., None]), _unit(query - mean)
    R, r = reduced(A, y)
    u = ridge_solution(R, r, ridge * _frobenius(R) ** 2 / k, rcond * _frobenius(keys) / a_unit)
    u = _finite(u * (y_unit / a_unit)[:, None])
    return 1 / k + (u - u.mean(-1, keepdim=True))  # rounding left a sum of about 1e-16 · max|u|


def ordinary_kriging(keys: Float[Tensor, "b k d"], q: Float[Tensor, "b d"], nugget: float) -> Float64[Tensor, "b k"]:
    """argmin_w wᵀ C w − 2 wᵀ c s.t. 1ᵀw = 1, with C = exp(−‖K_i − K_j‖²/ℓ²) + nugget I and c = exp(−‖q − K_i‖²/ℓ²).

    All eigenvalues of C lie between nugget and k + nugget, so it may be inverted as it is.
    """
    k = keys.shape[1]
    between = _squared_distances(torch.cat([keys, q[:, None]], 1))
    scale = between[:, :k, :k].sum((-2, -1), keepdim=True) / max(1, k * (k - 1))
    covariance = torch.exp(between / -torch.where(scale > 0, scale, 1))
    C, c = covariance[:, :k, :k], covariance[:, :k, k:]
    C.diagonal(dim1=-2, dim2=-1).add_(nugget)
    w, one = torch.cholesky_solve(torch.cat([c, torch.ones_like(c)], -1), torch.linalg.cholesky(C)).unbind(-1)
    w = w + one * ((1 - w.sum(-1)) / one.sum(-1))[:, None]
    return 1 / k + (w - w.mean(-1, keepdim=True))  # they sum to one already, up to rounding


def _squared_distances(points: Float[Tensor, "b k d"]) -> Float64[Tensor, "b k k"]:
    """‖x_i − x_j‖² in float64, in a unit of each sample's own.

    They are seen from the first point, among its neighbours: there the products cancel no digits that the points have.
    """
    if points.dtype == torch.float64:
        points, _ = _unit(points)  # squares cannot overflow, as those of shorter floats never do
    seen = points.double()
    seen.sub_(seen[:, :1].clone())
    gram = seen @ seen.mT
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return torch.add(squares[:, :, None], squares[:, None]).sub_(gram, alpha=2).clamp_(min=0)


def nonnegative_least_squares(
    K: Float64[Tensor, "b d k"], q: Float64[Tensor, "b d"], rcond: float
) -> Float64[Tensor, "b k"]:
    """argmin_{w ≥ 0} ‖q − K w‖; keys closer to each other than rcond ‖K‖_F share their weight."""
    (keys, k_unit), (query, q_unit) = _unit(K), _unit(q)
    R, r = reduced(keys, query)
    cutoff = (rcond * _frobenius(R)).tolist()
    solved = [_shared_nnls(A, y, c) for A, y, c in zip(R.cpu().numpy(), r.cpu().numpy(), cutoff, strict=True)]
    w = torch.from_numpy(np.stack(solved)).to(K.device) if solved else K.new_zeros(0, K.shape[-1])
    return _finite(w * (q_unit / k_unit)[:, None])


def reduced(
    K: Float64[Tensor, "b d k"], q: Float64[Tensor, "b d"]
) -> tuple[Float64[Tensor, "b m k"], Float64[Tensor, "b m"]]:
    """The same least-squares problem in m = min(d, k + 1) dimensions: ‖q − K w‖ = ‖r − R w‖ for every w.

    R and r are the triangular factor of [K q]; Householder reflections move no singular value by more than rounding.
    """
    R = torch.linalg.qr(torch.cat([K, q[..., None]], -1), mode="r").R
    return R[..., :-1], R[..., -1]


def ridge_solution(
    A: Float64[Tensor, "b m k"], y: Float64[Tensor, "b m"], ridge: Float64[Tensor, " b"], cutoff: Float64[Tensor, " b"]
) -> Float64[Tensor, "b k"]:
    """argmin_w ‖y − A w‖² + ridge ‖w‖² of least norm, without directions of A at or below `cutoff`."""
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = sigma > cutoff[:, None]
    safe = torch.where(kept, sigma, 1)
    gain = torch.where(kept, 1 / (safe + ridge[:, None] / safe), 0)  # σ / (σ² + λ)
    return (Vh.mT @ (gain * (U.mT @ y[..., None])[..., 0])[..., None])[..., 0]


def nnls(A: Float64[ndarray, "m k"], y: Float64[ndarray, " m"]) -> Float64[ndarray, " k"]:
    """argmin_{x ≥ 0} ‖y − A x‖ by the active-set method (Lawson & Hanson 1974, chapter 23)."""
    k = A.shape[1]
    x, passive, rejected = np.zeros(k), np.zeros(k, bool), np.zeros(k, bool)
    # The gradient Aᵀ(y − A x) comes out of a cancellation, so each entry carries a rounding error of this size; one
    # that is smaller says nothing.
    noise = 10 * _EPS64 * max(A.shape) * np.linalg.norm(A, axis=0) * np.linalg.norm(y)
    for _ in range(10 * k):  # each round lowers the residual; the limit only guards against rounding that does not
        gradient = A.T @ (y - A @ x)
        free = ~passive & ~rejected & (gradient > noise)
        if not free.any():
            break
        j = int(np.argmax(np.where(free, gradient, -np.inf)))
        passive[j] = True
        s = _solve_on(A, y, passive)
        if s[j] <= 0:  # in exact arithmetic s[j] > 0; this column is in the span of the others up to rounding
            passive[j], rejected[j] = False, True
            continue
        while (blocking := passive & (s <= 0)).any():
            ratio = np.where(blocking, x / np.where(blocking, x - s, 1), np.inf)
            first = int(np.argmin(ratio))
            x = np.maximum(x + ratio[first] * (s - x), 0)
            x[first] = 0
            passive &= x > 0
            x[~passive] = 0
            s = _solve_on(A, y, passive)
        x = s
        rejected[:] = False
    return x


def rounding(keys: Float[Tensor, "b k d"]) -> float:
    """Relative size below which a direction of these keys may be rounding: of their storage, or of float64 algebra."""
    return max(torch.finfo(keys.dtype).eps, max(keys.shape[1:]) * _EPS64)


def _shared_nnls(A: Float64[ndarray, "m k"], y: Float64[ndarray, " m"], cutoff: float) -> Float64[ndarray, " k"]:
    """NNLS in which keys closer than `cutoff` count as one and share its weight evenly.

    The active set would otherwise take one of several equal keys, whichever comes first. Nothing else can make the
    weights explode: a cluster off the origin and w ≥ 0 bound Σ w_i.
    """
    apart = np.linalg.norm(A[:, :, None] - A[:, None, :], axis=0) > cutoff
    leader = np.argmin(apart, axis=0)  # the first key not apart from this one
    _, group, size = np.unique(leader, return_inverse=True, return_counts=True)
    means = np.zeros((A.shape[0], len(size)))
    np.add.at(means.T, group, A.T)
    means /= size
    return (nnls(means, y) / size)[group]


def _solve_on(A: Float64[ndarray, "m k"], y: Float64[ndarray, " m"], passive: ndarray) -> Float64[ndarray, " k"]:
    s = np.zeros(A.shape[1])
    if passive.any():
        s[passive] = np.linalg.lstsq(A[:, passive], y, rcond=None)[0]
    return s


def _float64(x: Tensor) -> Tensor:
    return _off_mps(x).double()


def _off_mps(x: Tensor) -> Tensor:
    """Without a gradient, and where there is float64."""
    return (x.cpu() if x.device.type == "mps" else x).detach()


def _cast(w: Tensor, query: Tensor) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    largest = torch.finfo(dtype).max
    return w.clamp(-largest, largest).to(device=query.device, dtype=dtype)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample divided by its largest magnitude (1 if that is 0), and that magnitude: squares cannot overflow."""
    unit = _largest(x)
    return x / unit.reshape(-1, *[1] * (x.ndim - 1)), unit


def _largest(x: Tensor) -> Tensor:
    """Each sample's largest magnitude, 1 if that is 0."""
    axes = tuple(range(1, x.ndim))
    unit = torch.maximum(x.amax(axes), -x.amin(axes))  # without a copy of magnitudes
    return torch.where(unit > 0, unit, 1)


def _same_unit(K: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and query divided by the same number, as differences between them need."""
    both, _ = _unit(torch.cat([K, q[..., None]], -1))
    return both[..., :-1], both[..., -1]


def _frobenius(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dim=(-2, -1))


def _finite(w: Tensor) -> Tensor:
    return torch.nan_to_num(w)  # 1e308 / 1e-308 is the only way here: the largest number instead of inf
