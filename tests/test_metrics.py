"""Metrics against closed forms, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import InvalidInputError
from redi.metrics import agreement, frechet_distance, latent_error, principal_directions


def draw(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    return scale * torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing + shift


def by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(ca @ cb)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root.real))


@given(st.integers(20, 60), st.integers(20, 60), st.integers(2, 12), st.integers(0, 10**6), st.floats(0.2, 5))
def test_frechet_agrees_with_scipy_sqrtm(n: int, m: int, d: int, seed: int, scale: float) -> None:
    a, b = draw(n, d, seed), draw(m, d, seed + 1, scale, 0.5)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-7, abs=1e-9)


def test_frechet_of_known_gaussians() -> None:
    # exact moments: whitened points, so that sample mean and covariance are what the formula is given
    d, n = 5, 40
    x = draw(n, d, 0)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    s, t = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1]).double(), torch.tensor([2.0, 2.0, 1.0, 0.0, 0.3]).double()
    mean = torch.arange(d).double()
    expected = float(((s - t) ** 2).sum() + mean.square().sum())
    assert frechet_distance(x * s + mean, x * t) == pytest.approx(expected, rel=1e-10)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 10**6))
def test_frechet_with_fewer_vectors_than_dimensions(n: int, m: int, seed: int) -> None:
    d = 24
    a, b = draw(n, d, seed), draw(m, d, seed + 1)
    # the covariances have low rank: compare with eigenvalues of the explicit product in float64
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    eigenvalues = torch.linalg.eigvals(ca @ cb).real.clamp(min=0)
    # of the d eigenvalues all but min(n, m) − 1 are rounding, whose roots would add up
    kept = eigenvalues.sort(descending=True).values[: min(n, m) - 1].sqrt().sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * kept)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@given(st.integers(2, 40), st.integers(2, 20), st.integers(0, 10**6))
def test_frechet_of_a_set_to_itself_is_zero_and_symmetric(n: int, d: int, seed: int) -> None:
    a, b = draw(n, d, seed), draw(n + 3, d, seed + 1, 2.0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-12)


def test_frechet_sees_a_shift_exactly() -> None:
    a = draw(30, 7, 3)
    shift = torch.linspace(-1, 1, 7).double()
    assert frechet_distance(a + shift, a) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_frechet_survives_half_precision_latents_and_large_offsets() -> None:
    a, b = draw(50, 6, 1).half() + 1000, draw(50, 6, 2).half() + 1000
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-6, abs=1e-7)


def test_directions_are_those_of_the_reference() -> None:
    d = 10
    spread = torch.tensor([5.0, 3.0, 1.0] + [0.01] * (d - 3)).double()
    rotation = torch.linalg.qr(draw(d, d, 5)).Q
    reference = draw(400, d, 6) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draw(400, d, 6).T))).T
    reference = (reference * spread) @ rotation
    other = reference + 7 * rotation[-1]  # moved along a direction in which the reference hardly varies
    assert frechet_distance(other, reference) == pytest.approx(49, rel=1e-6)
    assert frechet_distance(other, reference, directions=3) == pytest.approx(0, abs=0.1)
    basis = principal_directions(reference, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    covariance = torch.cov(reference.T)
    top = torch.linalg.eigvalsh(covariance).flip(0)[:3]
    torch.testing.assert_close((basis.T @ covariance @ basis).diagonal(), top)


def test_all_directions_equal_the_whole_distance() -> None:
    a, b = draw(40, 6, 8), draw(30, 6, 9)
    assert frechet_distance(a, b, directions=6) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("count", [0, 5, 100])
def test_more_directions_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(InvalidInputError, match="1 … 4 principal directions"):
        frechet_distance(draw(9, 8, 0), draw(5, 8, 1), directions=count)


def test_frechet_refuses_what_has_no_covariance() -> None:
    with pytest.raises(InvalidInputError, match="at least 2"):
        frechet_distance(draw(1, 3, 0), draw(5, 3, 1))
    bad = draw(5, 3, 0)
    bad[2, 1] = float("nan")
    with pytest.raises(InvalidInputError, match="finite"):
        frechet_distance(bad, draw(5, 3, 1))


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_latent_error_is_the_mean_of_the_norms(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, 2, 3, 4, generator=g), torch.randn(n, 2, 3, 4, generator=g)
    expected = np.mean([np.linalg.norm((x - y).double().numpy()) for x, y in zip(a, b, strict=True)])
    assert latent_error(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_latent_error_refuses_no_pictures() -> None:
    with pytest.raises(InvalidInputError, match="one sample for each"):
        latent_error(torch.zeros(0, 3), torch.zeros(0, 3))


def ssim_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    def blur(z: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(z, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_agreement_against_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 20, 24, generator=g)
    b = (a + 0.1 * torch.randn(2, 3, 20, 24, generator=g)).clamp(0, 1)
    found = agreement(a, b)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    assert found.psnr == pytest.approx(10 * np.log10(1 / ((x - y) ** 2).mean()), rel=1e-9)
    planes = [ssim_by_scipy(x[i, c], y[i, c]) for i in range(2) for c in range(3)]
    assert found.ssim == pytest.approx(np.mean(planes), rel=1e-6)


def test_agreement_of_equal_pictures() -> None:
    a = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = agreement(a, a)
    assert found.psnr == float("inf")
    assert found.ssim == pytest.approx(1)


def test_agreement_refuses_pictures_smaller_than_the_window() -> None:
    with pytest.raises(InvalidInputError, match="11 pixels"):
        agreement(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
