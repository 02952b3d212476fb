"""The contract of a Combiner: supply the fixture `combiner`, say what it promises, inherit the tests."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from redi.combiners import Combiner, combine
from redi.testing.strategies import neighbourhoods

# The fixture is a frozen recipe, so sharing it between examples is sound.
_shared = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
)


class CombinerContract:
    """Every promise of `redi.combiners.Combiner`, as properties.

    Attributes:
        affine: its weights sum to one.
        nonnegative: no weight is below zero.
        beats_nearest: Σ w_i key_i is never farther from the query than the nearest key.
        ordered: its weights depend on the order of the keys, not on their values alone.
    """

    affine: ClassVar[bool] = False
    nonnegative: ClassVar[bool] = False
    beats_nearest: ClassVar[bool] = False
    ordered: ClassVar[bool] = False

    @pytest.fixture
    def combiner(self) -> Combiner:
        """The combiner under test."""
        raise NotImplementedError("supply the fixture `combiner`")

    @_shared
    @given(case=neighbourhoods())
    def test_weights_are_finite_and_in_the_right_precision(
        self, combiner: Combiner, case: tuple[Tensor, Tensor]
    ) -> None:
        """One finite weight per key, in float32 or the query's own precision if that is higher."""
        keys, query = case
        w = combiner.weights(keys, query)
        assert w.shape == keys.shape[:2]
        assert w.dtype == torch.float32
        assert w.isfinite().all()
        assert combiner.weights(keys, query.double()).dtype == torch.float64

    @_shared
    @given(
        magnitudes=st.lists(st.integers(-44, 38), min_size=3, max_size=3),
        signs=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=12, max_size=12),
    )
    def test_no_finite_input_gives_nan(self, combiner: Combiner, magnitudes: list[int], signs: list[float]) -> None:
        """Nor do magnitudes at the ends of float32, zeros and signs."""
        scale = torch.tensor([[10.0**m] for m in magnitudes])
        rows = torch.tensor(signs).reshape(3, 4) * scale
        w = combiner.weights(rows[None, :2], rows[2:])
        assert w.isfinite().all(), f"weights {w.tolist()} for {rows.tolist()}"

    @_shared
    @given(case=neighbourhoods())
    def test_samples_of_a_batch_do_not_meet(self, combiner: Combiner, case: tuple[Tensor, Tensor]) -> None:
        """A sample's weights are the same, bit for bit, whatever else is in its batch."""
        keys, query = case
        together = combiner.weights(keys, query)
        alone = torch.cat([combiner.weights(keys[i : i + 1], query[i : i + 1]) for i in range(len(query))])
        assert torch.equal(together, alone)

    @_shared
    @given(case=neighbourhoods(), scale=st.floats(1e-3, 1e3))
    def test_units_do_not_matter(self, combiner: Combiner, case: tuple[Tensor, Tensor], scale: float) -> None:
        """Scaling keys and query together changes nothing."""
        keys, query = (x.double() for x in case)
        _assert_same_mix(keys, combiner.weights(keys, query), combiner.weights(scale * keys, scale * query))

    @_shared
    @given(case=neighbourhoods(), seed=st.integers(0, 1000))
    def test_permuting_neighbours_permutes_weights(
        self, combiner: Combiner, case: tuple[Tensor, Tensor], seed: int
    ) -> None:
        """Rank-deficient keys included."""
        if self.ordered:
            pytest.skip("this combiner goes by the order of its neighbours")
        keys, query = (x.double() for x in case)
        order = torch.randperm(keys.shape[1], generator=torch.Generator().manual_seed(seed))
        permuted = combiner.weights(keys[:, order], query)
        _assert_same_mix(keys, combiner.weights(keys, query), permuted[:, order.argsort()])

    @_shared
    @given(case=neighbourhoods())
    def test_equal_keys_weigh_the_same(self, combiner: Combiner, case: tuple[Tensor, Tensor]) -> None:
        """Every key given twice weighs the same both times."""
        if self.ordered:
            pytest.skip("this combiner goes by the order of its neighbours")
        keys, query = case
        w = combiner.weights(torch.cat([keys, keys], 1), query)
        k = keys.shape[1]
        torch.testing.assert_close(w[:, :k], w[:, k:], rtol=1e-4, atol=1e-4 * float(w.abs().max()))

    @_shared
    @given(case=neighbourhoods())
    def test_what_it_promises_of_its_weights(self, combiner: Combiner, case: tuple[Tensor, Tensor]) -> None:
        """The class attributes hold."""
        keys, query = (x.double() for x in case)
        w = combiner.weights(keys, query)
        if self.affine:
            tolerance = 1e-12 * float(w.abs().max()) * w.shape[1]
            torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]), rtol=0, atol=tolerance)
        if self.nonnegative:
            assert (w >= 0).all()
        if self.beats_nearest:
            residual = (combine(w, keys) - query).norm(dim=-1)
            nearest = (keys[:, 0] - query).norm(dim=-1)
            # What a cutoff at the rounding of float64 keys may give up, and the rounding of the sum itself.
            slack = 1e-12 * keys.flatten(1).norm(dim=1) * (1 + w.abs().amax(1))
            assert (residual <= nearest * (1 + 1e-9) + slack).all()


def _assert_same_mix(keys: Tensor, w: Tensor, other: Tensor) -> None:
    """Equal weights, up to what nearly dependent keys leave undetermined: it must not show in Σ w_i key_i."""
    centred = keys - keys.mean(1, keepdim=True)
    condition = keys.flatten(1).norm(dim=1) / centred.flatten(1).norm(dim=1).clamp_min(1e-300)
    tolerance = 1e-11 * keys.flatten(1).norm(dim=1) * (1 + w.abs().amax(1)) * condition.clamp_max(1e4)
    assert ((combine(w, keys) - combine(other, keys)).norm(dim=-1) <= tolerance).all()
    singular = torch.linalg.svdvals(keys)
    if keys.shape[1] <= keys.shape[2] and bool((singular[:, -1] > 1e-6 * singular[:, 0]).all()):
        torch.testing.assert_close(w, other, rtol=1e-4, atol=1e-6 * float(1 + w.abs().max()))
