"""The gate opens at its distance, and calibration lets the promised share of the knowledge base through."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from redi.backends import Exact
from redi.errors import InvalidInputError
from redi.gate import Gate, leave_one_out
from redi.testing import clustered_latents


def test_it_opens_at_its_distance_and_not_beyond() -> None:
    distances = torch.tensor([[1.0, 9.0], [2.0, 2.0], [2.0001, 3.0], [math.nan, math.nan], [math.inf, math.inf]])
    assert Gate(2.0).opens(distances).tolist() == [True, True, False, False, False]
    assert Gate().opens(distances).tolist() == [True, True, True, False, True]
    assert Gate(0.0).opens(torch.tensor([[0.0], [1e-30]])).tolist() == [True, False]


@given(clustered_latents(min_rows=2, max_dimension=64))
def test_leave_one_out_equals_brute_force(keys: ndarray) -> None:
    exact = keys.astype(np.float64)
    between = np.sqrt(np.square(exact[:, None] - exact[None]).sum(-1))
    np.fill_diagonal(between, np.inf)
    found = leave_one_out(Exact().build(keys), keys)
    np.testing.assert_allclose(found, between.min(axis=1), rtol=1e-6)


@given(clustered_latents(min_rows=2, max_dimension=64), st.floats(0.01, 1))
def test_calibration_lets_the_promised_share_through(keys: ndarray, quantile: float) -> None:
    index = Exact().build(keys)
    gate = Gate.calibrated(index, keys, quantile)
    own = torch.from_numpy(leave_one_out(index, keys))[:, None]
    assert gate.opens(own).float().mean() >= quantile - 1 / len(keys)
    if quantile == 1:
        assert gate.opens(own).all()
    tighter = Gate.calibrated(index, keys, quantile / 2)
    assert tighter.max_distance <= gate.max_distance


def test_many_keys_are_sampled_evenly() -> None:
    keys = np.arange(1000, dtype=np.float32)[:, None] ** 2
    found = leave_one_out(Exact().build(keys), keys, limit=3)
    np.testing.assert_allclose(found, [1, 999, 1997], rtol=1e-6)


def test_keys_may_be_half_precision() -> None:
    keys = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float16)
    assert 0 < Gate.calibrated(Exact().build(keys), keys).max_distance < 10


def test_refusals() -> None:
    keys = np.eye(3, dtype=np.float32)
    index = Exact().build(keys)
    for wrong in (-1.0, math.nan):
        with pytest.raises(InvalidInputError, match="max_distance"):
            Gate(wrong)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(InvalidInputError, match="quantile"):
            Gate.calibrated(index, keys, wrong)
    with pytest.raises(InvalidInputError, match="1 keys given"):
        Gate.calibrated(Exact().build(keys[:1]), keys[:1])
    with pytest.raises(InvalidInputError, match="2 keys given, 3 in the index"):
        leave_one_out(index, keys[:2])
