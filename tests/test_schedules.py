"""Grids: the algebra of x = a·x0 + s·n for every prediction type and law, and subsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import InvalidInputError, PlanError
from redi.schedules import Grid

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def make_grid(signal, noise, prediction="epsilon", scales_input=False):
    n = len(signal) - 1
    return Grid(
        steps=n,
        entries=tuple(range(n + 1)),
        timesteps=torch.arange(n, 0, -1) * 10,
        signal=torch.tensor(signal, dtype=torch.float64),
        noise=torch.tensor(noise, dtype=torch.float64),
        prediction=prediction,
        scales_input=scales_input,
        initial_scale=1.0,
        boundaries=tuple(range(n + 1)),
    )


@st.composite
def points(draw):
    """One point of a grid under one of the three laws, and a prediction type that fits it."""
    s = draw(st.floats(0.01, 0.99))
    law = draw(st.sampled_from(["variance_preserving", "sigma", "flow"]))
    prediction = draw(st.sampled_from(PREDICTIONS if law == "flow" else PREDICTIONS[:3]))
    if law == "sigma":
        return 1.0, draw(st.floats(0.01, 100.0)), prediction
    if law == "flow":
        return 1 - s, s, prediction if prediction != "v_prediction" else "flow_prediction"
    return (1 - s * s) ** 0.5, s, prediction


@given(points(), st.integers(0, 2**31))
def test_denoised_recovers_x0_and_model_output_inverts_it(point, seed):
    a, s, prediction = point
    grid = make_grid([a, 1.0], [s, 0.0], prediction)
    g = torch.Generator().manual_seed(seed)
    x0, n = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    r = (a * a + s * s) ** 0.5
    told = {"epsilon": n, "v_prediction": (a * n - s * x0) / r, "sample": x0, "flow_prediction": n - x0}[prediction]
    x = a * x0 + s * n
    torch.testing.assert_close(grid.denoised(told, x, 0), x0, rtol=1e-9, atol=1e-9 * max(1, r / a))
    torch.testing.assert_close(grid.model_output(x0, x, 0), told, rtol=1e-9, atol=1e-9 * max(1, r / s))


@given(points())
def test_v_is_salimans_and_ho_on_the_unit_sample(point):
    """Progressive distillation, appendix D: with z = α x + σ ε, α² + σ² = 1: x̂ = α z − σ v."""
    a, s, _ = point
    grid = make_grid([a, 1.0], [s, 0.0], "v_prediction")
    r = (a * a + s * s) ** 0.5
    z, v = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    torch.testing.assert_close(grid.denoised(v, r * z, 0), (a / r) * z - (s / r) * v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    grid = make_grid([0.6, 1.0], [0.8, 0.0])
    x, m = torch.randn(2, 3).to(dtype), torch.randn(2, 3).to(dtype)
    found = grid.denoised(m, x, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.float() - 0.8 * m.float()) / 0.6)
    assert grid.denoised(m.double(), x.double(), 0).dtype == torch.float64


def test_scale_input_normalises_only_where_the_solver_does():
    x = torch.randn(2, 3)
    assert make_grid([1.0, 1.0], [7.0, 0.0]).scale_input(x, 0) is x
    scaled = make_grid([1.0, 1.0], [7.0, 0.0], scales_input=True).scale_input(x, 0)
    torch.testing.assert_close(scaled, x / 50**0.5)


@given(st.data())
def test_subset_of_a_subset_is_the_subset(data):
    n = data.draw(st.integers(2, 12))
    grid = make_grid(torch.rand(n + 1).tolist(), torch.rand(n + 1).tolist())
    outer = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    inner = sorted(data.draw(st.sets(st.sampled_from(outer), min_size=1)))
    direct, twice = grid.subset(inner), grid.subset(outer).subset(inner)
    assert direct.entries == twice.entries == (*inner, n)
    for name in ("timesteps", "signal", "noise"):
        assert torch.equal(getattr(direct, name), getattr(twice, name))
    assert torch.equal(direct.signal, grid.signal[[*inner, n]])
    assert torch.equal(direct.timesteps, grid.timesteps[inner])
    assert direct.boundaries == grid.boundaries
    assert direct.is_fine == (len(inner) == n)
    assert len(direct) == len(inner)
    assert direct.fine == n


@pytest.mark.parametrize("entries", [[], [1, 0], [0, 0], [0, 5], [0, 4], [-1, 0]])
def test_what_is_no_subset_is_refused(entries):
    with pytest.raises(PlanError, match="ascending subset"):
        make_grid([0.5] * 5, [0.5] * 5).subset(entries)


def test_integers_are_no_samples():
    grid = replace(make_grid([0.6, 1.0], [0.8, 0.0]))
    denoised = getattr(Grid.denoised, "__wrapped__", Grid.denoised)
    with pytest.raises((InvalidInputError, TypeError), match=r"."):
        denoised(grid, torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 0)
