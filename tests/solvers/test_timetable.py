"""Schedules that a pipeline has a say in: noise levels, a shift, a later beginning."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

from redi.errors import PlanError, UnsupportedSolverError
from redi.plan import Plan, Route
from redi.recorder import trajectory
from redi.schedules import PLAIN, Timetable
from redi.solvers import DiffusersSolver
from redi.types import Record

LEVELS = tuple(np.linspace(1, 1 / 12, 12).tolist())


def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def test_the_schedule_is_the_one_a_pipeline_would_set() -> None:
    scheduler = flow()
    solver = DiffusersSolver.of(scheduler, Timetable(LEVELS, 0.83))
    again = DiffusersSolver.from_config(solver.name, json.loads(json.dumps(dict(solver.config))))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=0.83)
    assert again == solver
    for one in (solver, again):
        assert torch.equal(one.schedule(12).timesteps, scheduler.timesteps)
        assert torch.equal(one.schedule(12).noise, scheduler.sigmas.double())


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_shift_is_said_to_other_flow_solvers_too(kind: str) -> None:
    settings = {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, kind)(**settings)
    solver = DiffusersSolver.of(scheduler, Timetable(mu=0.5))
    scheduler.set_timesteps(9, mu=0.5)
    assert torch.equal(solver.schedule(9).timesteps, scheduler.timesteps)


def test_without_a_shift_said_a_shifting_scheduler_is_refused() -> None:
    with pytest.raises(UnsupportedSolverError, match="use_dynamic_shifting"):
        DiffusersSolver.of(flow())


def test_other_steps_than_there_are_noise_levels_are_refused() -> None:
    with pytest.raises(PlanError, match="12 noise levels"):
        DiffusersSolver.of(flow(), Timetable(LEVELS, 0.83)).schedule(11)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_later_beginning_walks_the_rest_of_the_schedule(kind: str) -> None:
    scheduler = getattr(diffusers, kind)()
    whole, rest = DiffusersSolver.of(scheduler), DiffusersSolver.of(scheduler, Timetable(begin=5))
    g, h = whole.schedule(12), rest.schedule(7)
    assert torch.equal(h.timesteps, g.timesteps[5:])
    assert torch.equal(h.signal, g.signal[5:])
    assert torch.equal(h.noise, g.noise[5:])
    route = Route.lay(Plan.coarse(3, 7), h)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    tail, ours = [0, 2, 5], []
    for solver, grid in ((rest, route.grid), (whole, g.subset([5 + e for e in tail]))):
        state, y = solver.init(grid), x
        for _ in range(3):
            y, state = solver.step(0.1 * y, y, state)
        ours.append(y)
    assert route.grid.entries == (*tail, 7)
    assert torch.equal(*ours)  # a coarse walk of the rest is that of the whole schedule, begun later


def test_a_schedule_begins_at_no_half_step_and_not_behind_its_end() -> None:
    with pytest.raises(PlanError, match="cannot begin"):
        DiffusersSolver.of(diffusers.HeunDiscreteScheduler(), Timetable(begin=3)).schedule(9)
    with pytest.raises(PlanError, match="cannot begin"):
        DiffusersSolver.of(diffusers.DDIMScheduler()).schedule(12).tail(12)


def test_a_fine_run_of_the_rest_is_recorded_like_any_other() -> None:
    solver = DiffusersSolver.of(diffusers.DDIMScheduler(clip_sample=False), Timetable(begin=4))
    grid = solver.schedule(6)
    record = Record(samples=frozenset({0, 3, grid.fine}))
    noise, ids = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(1, dtype=torch.int64)
    x, rows = trajectory(lambda x, t: 0.2 * x, noise, solver, 6, record, noise_ids=ids, prompts=["a"])
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    y = noise
    for t in scheduler.timesteps[4:]:
        y = scheduler.step(0.2 * y, t, y).prev_sample
    assert torch.allclose(x, y, atol=1e-6)
    assert torch.equal(rows.samples[grid.fine], x)


def test_nothing_said_is_written_as_nothing() -> None:
    assert PLAIN.to_json() == {}
    assert "timetable" not in DiffusersSolver.of(diffusers.DDIMScheduler()).config
