"""Weights against independent solvers, and the properties every combiner promises."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.spatial
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from redi.combiners import NNLS, Affine, Combiner, Kriging, LeastSquares, Nearest, combine, nnls
from redi.errors import InvalidInputError
from redi.testing import CombinerContract, neighbourhoods


class TestNearest(CombinerContract):
    affine = True
    nonnegative = True
    ordered = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return Nearest()


class TestLeastSquares(CombinerContract):
    beats_nearest = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return LeastSquares()


class TestNNLS(CombinerContract):
    nonnegative = True
    beats_nearest = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return NNLS()


class TestAffine(CombinerContract):
    affine = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return Affine()


class TestKriging(CombinerContract):
    affine = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return Kriging()


class TestInterpolation(CombinerContract):
    affine = True
    beats_nearest = True

    @pytest.fixture
    def combiner(self) -> Combiner:
        return Affine(ridge=0.0)


def far_cluster(seed: int, b: int, k: int, d: int, spread: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Keys and query that share their first digits, as latents of one noise do."""
    g = torch.Generator().manual_seed(seed)
    origin = 14.6 * torch.randn(b, 1, d, generator=g)
    keys = origin + spread * torch.randn(b, k, d, generator=g)
    query = origin[:, 0] + spread * torch.randn(b, d, generator=g)
    return keys, query


# -- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "d"), [(1, 1), (4, 64), (16, 4096), (5, 5), (8, 3)])
def test_least_squares_is_the_pseudo_inverse(k: int, d: int) -> None:
    g = torch.Generator().manual_seed(k * d)
    keys, query = torch.randn(3, k, d, generator=g).double(), torch.randn(3, d, generator=g).double()
    w = LeastSquares().weights(keys, query)
    expected = np.stack([scipy.linalg.pinv(K.T.numpy()) @ q.numpy() for K, q in zip(keys, query, strict=True)])
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_least_squares_is_accurate_far_from_the_origin() -> None:
    keys, query = far_cluster(0, b=2, k=12, d=16_384)
    w = LeastSquares().weights(keys, query.double())
    for K, q, mine in zip(keys, query, w, strict=True):
        best, *_ = scipy.linalg.lstsq(K.double().numpy().T, q.double().numpy(), lapack_driver="gelsy")
        np.testing.assert_allclose(mine.numpy(), best, rtol=1e-7, atol=1e-8)


def test_duplicates_share_their_weight() -> None:
    keys, query = far_cluster(1, b=1, k=3, d=512)
    doubled = keys[:, [0, 1, 1, 2, 1]]
    for combiner in (LeastSquares(), NNLS(), Affine(), Affine(0.0)):
        w = combiner.weights(doubled, query)[0]
        torch.testing.assert_close(w[[1, 2]], w[[2, 4]], rtol=1e-5, atol=1e-6)
    single, many = (LeastSquares().weights(x, query)[0] for x in (keys, doubled))
    torch.testing.assert_close(torch.stack([many[0], many[[1, 2, 4]].sum(), many[3]]), single, rtol=1e-3, atol=1e-4)


def test_keys_that_differ_by_rounding_alone_do_not_blow_up() -> None:
    g = torch.Generator().manual_seed(5)
    origin = 14.6 * torch.randn(1, 1, 4096, generator=g)
    keys = origin * (1 + 3e-8 * torch.randn(1, 6, 4096, generator=g))
    query = (origin + 1e-2 * torch.randn(1, 1, 4096, generator=g))[:, 0]
    for combiner in (LeastSquares(), NNLS(), Affine(0.0), Affine()):
        w = combiner.weights(keys, query)
        torch.testing.assert_close(w, torch.full_like(w, 1 / 6), rtol=1e-3, atol=1e-3)


def test_a_wider_cutoff_keeps_fewer_directions() -> None:
    keys, query = far_cluster(2, b=1, k=6, d=256)
    sharp, blunt = LeastSquares().weights(keys, query), LeastSquares(rcond=0.5).weights(keys, query)
    torch.testing.assert_close(blunt, torch.full_like(blunt, 1 / 6), rtol=1e-2, atol=1e-2)
    assert sharp.norm() > blunt.norm()


# -- non-negative least squares -------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 40))
def test_nnls_equals_scipy(seed: int, k: int, m: int) -> None:
    g = np.random.default_rng(seed)
    A, y = g.normal(size=(m, k)), g.normal(size=m)
    mine, (theirs, residual) = nnls(A, y), scipy.optimize.nnls(A, y)
    assert (mine >= 0).all()
    assert np.linalg.norm(y - A @ mine) == pytest.approx(residual, rel=1e-9, abs=1e-9)
    if m >= k:
        np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from([1, 2, 7, 64, 512]))
def test_nnls_weights_meet_the_optimality_conditions(seed: int, k: int, d: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, query = torch.randn(1, k, d, generator=g).double(), torch.randn(1, d, generator=g).double()
    w, K, q = NNLS().weights(keys, query)[0], keys[0].T, query[0]
    gradient = K.T @ (q - K @ w)
    tolerance = 1e-9 * float(K.norm() * q.norm())
    assert (w >= 0).all()
    assert (gradient <= tolerance).all(), "a weight could still grow"
    assert (gradient[w > 1e-9].abs() <= tolerance).all(), "a positive weight is not at its best"


def test_nnls_is_accurate_far_from_the_origin() -> None:
    keys, query = far_cluster(3, b=2, k=16, d=4096)
    w = NNLS().weights(keys, query.double())
    for K, q, mine in zip(keys.double(), query.double(), w, strict=True):
        theirs, residual = scipy.optimize.nnls(K.T.numpy(), q.numpy())
        assert float((q - K.T @ mine).norm()) <= residual * (1 + 1e-9)
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-6)


# -- affine ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 16), st.sampled_from([1, 3, 16, 300]), st.sampled_from([1e-3, 0.1, 1.0]))
def test_affine_solves_its_optimality_system(seed: int, k: int, d: int, ridge: float) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, query = torch.randn(1, k, d, generator=g).double(), torch.randn(1, d, generator=g).double()
    w, K, q = Affine(ridge).weights(keys, query)[0], keys[0].T, query[0]
    spread = float((K - K.mean(1, keepdim=True)).square().sum() / k)
    system = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    system[:k, :k] = K.T @ K + ridge * spread * torch.eye(k)
    system[:k, k] = system[k, :k] = 1
    right = torch.cat([K.T @ q, torch.ones(1, dtype=torch.float64)])
    assume(torch.linalg.cond(system) < 1e8)
    torch.testing.assert_close(w, torch.linalg.solve(system, right)[:k], rtol=1e-6, atol=1e-7)


@given(neighbourhoods())
def test_an_endless_ridge_gives_the_mean(case: tuple[Tensor, Tensor]) -> None:
    keys, query = case
    w = Affine(1e30).weights(keys, query)
    torch.testing.assert_close(w, torch.full_like(w, 1 / keys.shape[1]))


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_a_query_in_the_affine_span_is_reproduced(k: int) -> None:
    keys, _ = far_cluster(4, b=3, k=k, d=2048)
    true = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).double()
    true /= true.sum(1, keepdim=True)
    query = combine(true, keys)
    w = Affine(0.0).weights(keys, query)
    torch.testing.assert_close(combine(w, keys), query, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(w, true, rtol=1e-6, atol=1e-6)


def test_a_key_asked_for_gets_all_the_weight() -> None:
    keys, _ = far_cluster(6, b=1, k=8, d=1024)
    for combiner in (LeastSquares(), NNLS(), Affine(0.0)):
        for i in range(8):
            w = combiner.weights(keys, keys[:, i])[0]
            torch.testing.assert_close(w, torch.eye(8)[i], rtol=0, atol=1e-5)


def test_affine_weights_commute_with_a_shift() -> None:
    keys, query = far_cluster(7, b=2, k=5, d=128, spread=1.0)
    keys, query, shift = keys.double(), query.double(), 100 * torch.randn(128).double()
    for combiner in (Affine(), Affine(0.0)):
        shifted = combiner.weights(keys + shift, query + shift)
        torch.testing.assert_close(shifted, combiner.weights(keys, query), rtol=1e-7, atol=1e-7)


# -- kriging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nugget", [0.01, 0.1, 1.0])
def test_kriging_is_regression_by_generalized_least_squares_and_its_residual(nugget: float) -> None:
    """Another way to the same number: the mean by generalized least squares, then the covariance with its residual."""
    g = torch.Generator().manual_seed(3)
    keys, query = torch.randn(1, 12, 5, generator=g).double(), torch.randn(1, 5, generator=g).double()
    y = torch.randn(12, generator=g).double().numpy()
    points, asked = keys[0].numpy(), query.numpy()
    between = scipy.spatial.distance.pdist(points, "sqeuclidean")
    length = between.mean()
    C = np.exp(-scipy.spatial.distance.squareform(between) / length) + nugget * np.eye(12)
    c = np.exp(-scipy.spatial.distance.cdist(asked, points, "sqeuclidean")[0] / length)
    inverse = np.linalg.inv(C)
    mean = (inverse @ y).sum() / inverse.sum()
    expected = mean + c @ inverse @ (y - mean)
    assert float(Kriging(nugget).weights(keys, query)[0].numpy() @ y) == pytest.approx(expected, rel=1e-9)


def test_kriging_gives_a_far_query_the_same_weights_from_everywhere() -> None:
    keys, query = far_cluster(seed=1, b=1, k=8, d=16, spread=1.0)
    away = [Kriging().weights(keys, query + 100 * direction) for direction in torch.eye(16)[:4]]
    for w in away[1:]:
        torch.testing.assert_close(w, away[0])


def test_kriging_is_accurate_far_from_the_origin() -> None:
    keys, query = far_cluster(seed=2, b=3, k=16, d=512, spread=1e-3)
    origin = keys.double().mean((0, 1))
    near = Kriging().weights((keys.double() - origin) * 1e3, (query.double() - origin) * 1e3)
    torch.testing.assert_close(Kriging().weights(keys.double(), query.double()), near, rtol=1e-6, atol=1e-9)


def test_a_small_nugget_gives_a_key_asked_for_nearly_all_the_weight() -> None:
    keys, _ = far_cluster(seed=4, b=2, k=6, d=32, spread=1.0)
    w = Kriging(nugget=1e-9).weights(keys.double(), keys[:, 2].double())
    torch.testing.assert_close(w, torch.eye(6).double()[[2, 2]], atol=1e-6, rtol=0)


# -- applying -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combiner", [Nearest(), Affine(), Affine(0.0), Kriging()])
def test_one_neighbour_is_handed_back_bit_for_bit(combiner: Combiner) -> None:
    keys, query = far_cluster(8, b=2, k=1, d=64)
    values = torch.randn(2, 1, 3, 5)
    values[0, 0, 0, 0] = -0.0
    result = combine(combiner.weights(keys, query), values)
    assert torch.equal(result.view(torch.int32), values[:, 0].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_combine_accumulates_in_float32_at_least(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weights, values = torch.randn(2, 9, generator=g), torch.randn(2, 9, 4, 4, generator=g).to(dtype)
    result = combine(weights, values)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.einsum("bk,bkij->bij", weights.double(), values.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_scalars_combine_too() -> None:
    assert combine(torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 2.0]])).item() == 1.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_values_stay_as_they_were(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    combine(torch.full((2, 3), 0.5), values)
    torch.testing.assert_close(values, before, rtol=0, atol=0)


def test_refusals() -> None:
    nan = float("nan")
    wrong = (
        lambda: Affine(-1.0),
        lambda: Affine(nan),
        lambda: LeastSquares(2.0),
        lambda: Kriging(0.0),
        lambda: Kriging(nan),
    )
    for make in wrong:
        with pytest.raises(InvalidInputError, match="given"):
            make()
