"""The contract of a `SolverAdapter`, as tests: inherit, supply one fixture, and yours is checked like ours.

class TestMySolver(SolverContract):
    @pytest.fixture
    def solver(self):
        return MySolver()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import PlanError
from redi.schedules import Grid
from redi.solvers.base import SolverAdapter, SolverState

SHAPE: Final = (2, 3, 4, 4)


def toy_model(sample: Float[Tensor, "b c h w"], timestep: Float[Tensor, ""] | Tensor) -> Float[Tensor, "b c h w"]:
    """A small smooth nonlinear model, the same on every machine: tanh of a linear map of x and t."""
    mix = torch.linspace(-1, 1, 9, dtype=sample.dtype).reshape(3, 3) + 0.5 * torch.eye(3, dtype=sample.dtype)
    moved = torch.einsum("ij,bjhw->bihw", mix, sample) + 0.3 * sample.roll(1, -1)
    return torch.tanh(0.4 * moved + torch.sin(timestep.to(sample.dtype) / 300))


def start(grid: Grid, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """A starting sample on `grid`."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * grid.initial_scale


def walk(
    solver: SolverAdapter, sample: Float[Tensor, "b c h w"], state: SolverState, stop: int
) -> tuple[list[Float[Tensor, "b c h w"]], list[SolverState]]:
    """Samples and states from `state.position` to `stop`, both ends included."""
    samples, states = [sample], [state]
    while states[-1].position < stop:
        grid, at = states[-1].grid, states[-1].position
        output = toy_model(grid.scale_input(samples[-1], at), grid.timesteps[at])
        x, after = solver.step(output, samples[-1], states[-1])
        samples.append(x)
        states.append(after)
    return samples, states


class SolverContract(ABC):
    """What every solver owes: steps that are functions of their arguments alone, and history fit to be stored."""

    steps = 5

    @pytest.fixture
    @abstractmethod
    def solver(self) -> SolverAdapter:
        """The solver under test."""

    @pytest.fixture
    def grid(self, solver: SolverAdapter) -> Grid:
        """Its fine schedule."""
        return solver.schedule(self.steps)

    def test_schedule_is_a_grid(self, grid: Grid) -> None:
        """Entries count up, boundaries lead from the first to the end, a and s are finite."""
        assert grid.steps == self.steps
        assert grid.entries == tuple(range(len(grid.timesteps) + 1))
        assert grid.is_fine
        assert len(grid.boundaries) == self.steps + 1
        assert grid.boundaries[0] == 0
        assert grid.boundaries[-1] == grid.fine
        legal = [e for e in grid.boundaries if e is not None]
        assert legal == sorted(set(legal))
        assert len(grid.signal) == len(grid.noise) == len(grid) + 1
        assert torch.isfinite(grid.signal).all()
        assert torch.isfinite(grid.noise).all()
        assert grid.noise[-1] <= grid.noise[0]

    def test_denoised_and_model_output_are_inverse(self, grid: Grid) -> None:
        """At every entry where both a and s carry something."""
        x, m = start(grid).double(), start(grid, 1).double() / grid.initial_scale
        for at in range(len(grid)):
            if min(grid.signal[at], grid.noise[at]) > 1e-3:
                back = grid.model_output(grid.denoised(m, x, at), x, at)
                torch.testing.assert_close(back, m, rtol=1e-7, atol=1e-7)

    def test_denoised_undoes_noising(self, grid: Grid) -> None:
        """X = a·x0 + s·n with a model that knows the noise gives back x0."""
        x0, n = start(grid, 2).double() / grid.initial_scale, start(grid, 3).double() / grid.initial_scale
        for at in range(len(grid)):
            a, s = grid.signal[at], grid.noise[at]
            output = {
                "epsilon": n,
                "v_prediction": (a * n - s * x0) / (a**2 + s**2) ** 0.5,
                "sample": x0,
                "flow_prediction": n - x0,
            }[grid.prediction]
            if a > 1e-3:
                torch.testing.assert_close(grid.denoised(output, a * x0 + s * n, at), x0, rtol=1e-7, atol=1e-7)

    def test_replay_is_exact(self, solver: SolverAdapter, grid: Grid) -> None:
        """From any entry's state the run repeats bit for bit, whatever other runs were made in between."""
        samples, states = walk(solver, start(grid), solver.init(grid), len(grid))
        others, other_states = walk(solver, start(grid, 7), solver.init(grid), len(grid))
        for at in range(len(grid)):
            again, _ = walk(solver, samples[at], states[at], len(grid))
            assert all(torch.equal(x, y) for x, y in zip(again, samples[at:], strict=True))
        # two runs in turns, a step each
        x, state, y, other = samples[0], states[0], others[0], other_states[0]
        for at in range(len(grid)):
            (_, x), (_, state) = walk(solver, x, state, at + 1)
            (_, y), (_, other) = walk(solver, y, other, at + 1)
            assert torch.equal(x, samples[at + 1])
            assert torch.equal(y, others[at + 1])

    def test_step_changes_nothing_it_is_given(self, solver: SolverAdapter, grid: Grid) -> None:
        """Neither sample, nor model output, nor state."""
        samples, states = walk(solver, start(grid), solver.init(grid), len(grid))
        for at in range(len(grid)):
            sample, state = samples[at].clone(), states[at]
            output = toy_model(grid.scale_input(sample, at), grid.timesteps[at])
            before = output.clone(), {name: leaf.clone() for name, leaf in state.leaves().items()}, repr(state.history)
            solver.step(output, sample, state)
            assert state.position == at
            assert torch.equal(sample, samples[at])
            assert torch.equal(output, before[0])
            assert state.leaves().keys() == before[1].keys()
            assert all(torch.equal(leaf, before[1][name]) for name, leaf in state.leaves().items())
            assert repr(state.history) == before[2]

    def test_leaves_have_the_sample_s_shape(self, solver: SolverAdapter, grid: Grid) -> None:
        """So that they combine with the weights the sample combines with."""
        for state in walk(solver, start(grid), solver.init(grid), len(grid))[1]:
            assert all(leaf.shape == SHAPE for leaf in state.leaves().values())

    def test_position_and_leaves_are_the_whole_state(self, solver: SolverAdapter, grid: Grid) -> None:
        """`at(grid, position, leaves)` with leaves from a run goes on as that run, so leaves are all a row stores."""
        samples, states = walk(solver, start(grid), solver.init(grid), len(grid))
        for at, state in enumerate(states):
            again, _ = walk(solver, samples[at], solver.at(grid, at, state.leaves()), len(grid))
            assert torch.equal(again[-1], samples[-1])

    def test_restart_forgets(self, solver: SolverAdapter, grid: Grid) -> None:
        """At every boundary: same position, no tensors, and a finite run from there; at the start, the same run."""
        samples, states = walk(solver, start(grid), solver.init(grid), len(grid))
        for at in (e for e in grid.boundaries if e is not None):
            fresh = solver.restart(states[at])
            assert fresh.position == at
            assert not fresh.leaves()
            again, _ = walk(solver, samples[at], fresh, len(grid))
            assert torch.isfinite(again[-1]).all()
            assert at > 0 or torch.equal(again[-1], samples[-1])

    def test_subset_is_walked_or_refused(self, solver: SolverAdapter, grid: Grid) -> None:
        """A solver that suits coarse plans walks any subset from its first entry; another says so."""
        subset = grid.subset([0, 1, *range(3, len(grid), 2)])
        if not solver.suits_coarse:
            with pytest.raises(ValueError, match=r"."):
                solver.init(subset)
            return
        samples, _ = walk(solver, start(subset), solver.init(subset), len(subset))
        assert torch.isfinite(samples[-1]).all()
        assert len(samples) == len(subset) + 1

    def test_foreign_grid_is_refused(self, solver: SolverAdapter, grid: Grid) -> None:
        """A grid whose timesteps are not this solver's."""
        with pytest.raises(PlanError):
            solver.init(replace(grid, timesteps=grid.timesteps.flip(0)))
