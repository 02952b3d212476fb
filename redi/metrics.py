"""How near one set of samples is to another: Fréchet distance between sets, latent error and agreement pair by pair.

No network is needed here; scores that need one come with the bundled evaluator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import conv2d

from redi.errors import InvalidInputError

_WINDOW: Final = 11  # Wang et al. 2004: an 11 × 11 Gaussian of standard deviation 1.5
_SIGMA: Final = 1.5
_C1: Final = 0.01**2
_C2: Final = 0.03**2


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], *, directions: int | None = None) -> float:
    """Squared Fréchet distance between the Gaussians with the means and covariances of two sets.

    |μ_a − μ_b|² + tr C_a + tr C_b − 2 tr (C_a C_b)^½ (Dowson & Landau 1982), exact for fewer vectors than dimensions:
    with centred data A, B the last trace is the sum of singular values of A Bᵀ / √((n−1)(m−1)), so no covariance is
    formed and no root of an indefinite matrix is taken.

    Args:
        a: one vector per row.
        b: the reference, one vector per row.
        directions: compare only along the reference's first principal directions, so many; they are fitted on `b`
            alone. None compares in all d dimensions.

    Returns:
        The distance, in squared units of the vectors; ≥ 0.

    Raises:
        InvalidInputError: fewer than two vectors, values that are not finite, or more directions than b has.
    """
    if len(a) < 2 or len(b) < 2:
        raise InvalidInputError(f"a covariance needs at least 2 vectors, given {len(a)} and {len(b)}")
    x, y = a.detach().double().cpu(), b.detach().double().cpu()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise InvalidInputError("a Fréchet distance needs finite vectors, given NaN or infinite ones")
    if directions is not None:
        basis = principal_directions(y, directions)
        x, y = x @ basis, y @ basis
    mean = (x.mean(0) - y.mean(0)).square().sum()
    left, right = _root_of_covariance(x), _root_of_covariance(y)
    cross = torch.linalg.svdvals(left @ right.T).sum()
    distance = mean + left.square().sum() + right.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # two equal sets differ by rounding, which may be negative


def principal_directions(reference: Float64[Tensor, "m d"], count: int) -> Float64[Tensor, "d count"]:
    """The first principal directions of a set, orthonormal, in its columns.

    Raises:
        InvalidInputError: the set has no so many.
    """
    most = min(len(reference) - 1, reference.shape[1])
    if not 1 <= count <= most:
        raise InvalidInputError(
            f"{len(reference)} vectors of {reference.shape[1]} dimensions have 1 … {most} principal directions, "
            f"asked for {count}"
        )
    return torch.linalg.svd(reference - reference.mean(0), full_matrices=False).Vh[:count].T


def _root_of_covariance(x: Float64[Tensor, "n d"]) -> Float64[Tensor, "r d"]:
    """R with RᵀR = covariance of x and at most d rows."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R


def latent_error(a: Float[Tensor, "n *s"], b: Float[Tensor, "n *s"]) -> float:
    """Mean over pictures of the L2 distance between their latents: the mean of `latent_errors`.

    Args:
        a: one sample per picture.
        b: the reference, in the same order.

    Raises:
        InvalidInputError: no pictures, or not as many of one as of the other.
    """
    return float(latent_errors(a, b).mean())


def latent_errors(a: Float[Tensor, "n *s"], b: Float[Tensor, "n *s"]) -> Float64[Tensor, " n"]:
    """The L2 distance between each picture's latents, ‖a_i − b_i‖; arguments and errors as for `latent_error`."""
    _require_pairs(a, b)
    return (a.detach().double() - b.detach().double()).flatten(1).norm(dim=1)


@final
@dataclass(frozen=True)
class Agreement:
    """How alike pictures are, averaged over them.

    Args:
        psnr: peak signal-to-noise ratio in dB, of the mean squared error over all pictures; ∞ for equal ones.
        ssim: structural similarity, 1 for equal pictures.
    """

    psnr: float
    ssim: float


def agreement(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Agreement:
    """PSNR and SSIM (Wang et al. 2004, Gaussian window, no padding, mean over channels) of pictures in [0, 1].

    Args:
        a: pictures, at least 11 × 11 pixels.
        b: the reference, in the same order.

    Raises:
        InvalidInputError: no pictures, other shapes, or pictures smaller than the window.
    """
    _require_pairs(a, b)
    if min(a.shape[-2:]) < _WINDOW:
        raise InvalidInputError(f"SSIM needs pictures of at least {_WINDOW} pixels a side, given {tuple(a.shape[-2:])}")
    x, y = a.detach().double(), b.detach().double()
    error = float((x - y).square().mean())
    psnr = float("inf") if error == 0 else -10 * float(torch.log10(torch.tensor(error, dtype=torch.float64)))
    mx, my = _blur(x), _blur(y)
    vx, vy, vxy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    similarity = (2 * mx * my + _C1) * (2 * vxy + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return Agreement(psnr, float(similarity.mean()))


def _blur(x: Float64[Tensor, "n c h w"]) -> Float64[Tensor, "n c h2 w2"]:
    offset = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = conv2d(conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.squeeze(1).unflatten(0, x.shape[:2])


def _require_pairs(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or len(a) == 0:
        raise InvalidInputError(
            f"expected one sample for each of the reference's, given shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
