"""The adapter against diffusers itself: stock loops bit for bit, subsets by closed forms, restarts by their order."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from redi.errors import InvalidInputError, PlanError, UnsupportedSolverError
from redi.plan import Plan, Route
from redi.solvers import DiffusersSolver, SolverState, advance, install, require_grid, restore, snapshot, stepping
from redi.solvers.grids import schedule_of
from redi.solvers.specs import find_spec
from redi.testing.solver import SHAPE, start, toy_model, walk
from tests.solvers.configurations import CONFIGURATIONS, DISTINCT, every_configuration

pytestmark = pytest.mark.filterwarnings("ignore:`algorithm_type:FutureWarning")


def make(label):
    name, settings = CONFIGURATIONS[label]
    return getattr(diffusers, name)(**settings)


def stock_model(scheduler, x, t):
    """The model as a pipeline calls it; flow schedulers have no scaling."""
    return toy_model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)


def stock_loop(scheduler, x):
    """What every diffusers pipeline does after set_timesteps."""
    samples = [x]
    for t in scheduler.timesteps:
        output = stock_model(scheduler, x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        samples.append(x)
    return samples


@pytest.mark.parametrize(
    ("label", "steps"),
    # at 15 steps and more, lower_order_final ends otherwise
    [*((label, 7) for label in CONFIGURATIONS), *((label, 16) for label in DISTINCT)],
)
def test_walk_is_the_stock_loop_bit_for_bit(label, steps):
    stock = make(label)
    solver = DiffusersSolver.of(stock)
    grid = solver.schedule(steps)
    stock.set_timesteps(steps)
    assert torch.equal(grid.timesteps, stock.timesteps)
    mine, _ = walk(solver, start(grid), solver.init(grid), len(grid))
    theirs = stock_loop(stock, start(grid))
    assert torch.isfinite(theirs[-1]).all()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@every_configuration
def test_adapter_is_not_touched_by_its_scheduler_s_owner(label):
    stock = make(label)
    solver = DiffusersSolver.of(stock)
    before = solver.schedule(6)
    stock.set_timesteps(12)
    stock_loop(stock, start(before))
    after = solver.schedule(6)
    assert torch.equal(before.timesteps, after.timesteps)
    assert torch.equal(before.noise, after.noise)
    a, _ = walk(solver, start(before), solver.init(before), len(before))
    b, _ = walk(DiffusersSolver.of(stock), start(after), solver.init(after), len(after))
    assert torch.equal(a[-1], b[-1])
    assert solver == DiffusersSolver.of(stock)


@every_configuration
def test_configuration_survives_json(label):
    solver = DiffusersSolver.of(make(label))
    again = DiffusersSolver.from_config(solver.name, json.loads(json.dumps(solver.config, allow_nan=False)))
    assert again == solver
    assert not any(k.startswith("_") for k in solver.config)
    grid = solver.schedule(5)
    a, _ = walk(solver, start(grid), solver.init(grid), len(grid))
    b, _ = walk(again, start(grid), again.init(grid), len(grid))
    assert torch.equal(a[-1], b[-1])


def test_configuration_tells_solvers_apart():
    base = DiffusersSolver.from_config("DPMSolverMultistepScheduler", {})
    assert base != DiffusersSolver.from_config("DPMSolverMultistepScheduler", {"solver_order": 3})
    assert hash(base) == hash(DiffusersSolver.from_config("DPMSolverMultistepScheduler", {}))
    with pytest.raises(InvalidInputError, match="solver_ordr"):
        DiffusersSolver.from_config("DPMSolverMultistepScheduler", {"solver_ordr": 3})
    with pytest.raises(InvalidInputError, match="DDIMScheduler"):
        DiffusersSolver.from_config("DDIMScheduler", base.config)


def test_trained_betas_and_patched_settings_are_kept():
    betas = np.linspace(1e-4, 2e-2, 100)
    solver = DiffusersSolver.of(diffusers.DDIMScheduler(num_train_timesteps=100, trained_betas=betas))
    again = DiffusersSolver.from_config(solver.name, json.loads(json.dumps(solver.config)))
    assert again == solver
    assert torch.equal(again.schedule(5).noise, solver.schedule(5).noise)


# --- a(t), s(t) ---------------------------------------------------------------------------------------------------


@every_configuration
def test_noise_law_is_add_noise(label):
    scheduler = make(label)
    grid = schedule_of(scheduler, 9)
    scheduler.set_timesteps(9)
    x0, n = torch.randn(SHAPE), torch.randn(SHAPE)
    for at in range(len(grid)):
        t = scheduler.timesteps[at : at + 1]
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index, scheduler._begin_index = at, 0  # duplicates must not be looked up by timestep
        if hasattr(scheduler, "scale_noise"):
            noised = scheduler.scale_noise(x0, t, n)
        elif hasattr(scheduler, "add_noise"):
            noised = scheduler.add_noise(x0, n, t)
        else:  # IPNDM has none; Karras et al. 2022 call its schedule cosine: a² + s² = 1
            assert float(grid.signal[at] ** 2 + grid.noise[at] ** 2) == pytest.approx(1)
            continue
        mine = float(grid.signal[at]) * x0 + float(grid.noise[at]) * n
        torch.testing.assert_close(mine, noised, rtol=2e-5, atol=2e-5 * grid.initial_scale)


@pytest.mark.parametrize(
    "label",
    [
        label
        for label, (_, s) in CONFIGURATIONS.items()
        if not s.get("thresholding") and s.get("clip_sample") is not True
    ],
)
def test_denoised_is_the_scheduler_s_own_prediction(label):
    scheduler = make(label)
    grid, blank = schedule_of(scheduler, 6), DiffusersSolver.of(scheduler)
    install(scheduler, grid)
    compared = 0
    for at in range(len(grid)):
        x, m = torch.randn(SHAPE) * float((grid.signal[at] ** 2 + grid.noise[at] ** 2) ** 0.5), torch.randn(SHAPE)
        restore(scheduler, replace(blank.init(grid), position=at))
        if label.startswith(("dpm++", "single1", "single2", "single3-v", "unipc")) and "noise" not in label:
            own = scheduler.convert_model_output(m, sample=x)
        elif label.startswith("ddim") and "clip" not in label:
            own = scheduler.step(m, grid.timesteps[at], x).pred_original_sample
        elif label.startswith(("euler", "lms")):
            own = copy.deepcopy(scheduler).step(m, grid.timesteps[at], x).pred_original_sample
        else:
            continue
        compared += 1
        if grid.signal[at] > 1e-3:
            torch.testing.assert_close(grid.denoised(m, x, at), own, rtol=1e-4, atol=1e-4 * float(1 / grid.signal[at]))
    families = ("dpm++", "single1", "single2", "single3-v", "unipc", "ddim", "euler", "lms")
    assert compared == (len(grid) if label.startswith(families) and "noise" not in label and "clip" not in label else 0)


def test_prediction_types_are_read():
    labels = ("ddim", "ddim-v-trailing", "lms-x0-trailing", "flow-heun", "unipc2-flow", "ipndm")
    kinds = {label: schedule_of(make(label), 5).prediction for label in labels}
    assert kinds["ddim"] == "epsilon"
    assert kinds["ddim-v-trailing"] == "v_prediction"
    assert kinds["lms-x0-trailing"] == "sample"
    assert kinds["flow-heun"] == kinds["unipc2-flow"] == "flow_prediction"
    assert kinds["ipndm"] == "v_prediction"


def test_ipndm_s_output_is_v():
    grid = schedule_of(diffusers.IPNDMScheduler(), 8)
    x0, n = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    scheduler = diffusers.IPNDMScheduler()
    install(scheduler, grid)
    for at in range(1, len(grid)):
        a, s = grid.signal[at], grid.noise[at]
        restore(scheduler, SolverState(grid, at, {"ets": []}))
        # its first step is DDIM's: with the true v it stays on the line from noise to x0
        x = advance(scheduler, a * n - s * x0, a * x0 + s * n, grid, at)
        torch.testing.assert_close(x, grid.signal[at + 1] * x0 + grid.noise[at + 1] * n, rtol=1e-5, atol=1e-5)


# --- boundaries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "steps", "expected"),
    [
        ("dpm++2", 4, (0, 1, 2, 3, 4)),
        ("pndm", 4, (0, 2, 3, 4, 5)),
        ("pndm", 2, (0, 2, 3)),
        ("pndm", 1, (0, 1)),
        ("heun", 4, (0, 2, 4, 6, 7)),
        ("flow-heun", 1, (0, 1)),
        ("single2", 4, (0, None, 2, 3, 4)),
        ("single2", 5, (0, None, 2, None, 4, 5)),
        ("single3-v", 7, (0, None, None, 3, None, None, 6, 7)),
        ("single3-old", 6, (0, None, None, 3, None, None, 6)),
    ],
)
def test_boundaries(label, steps, expected):
    assert schedule_of(make(label), steps).boundaries == expected


@pytest.mark.parametrize("label", ["single2", "single3-v", "heun", "flow-heun", "ddim", "euler", "flow-euler"])
def test_one_step_solvers_remember_nothing_at_a_boundary(label):
    """So a restart there is the run itself."""
    solver = DiffusersSolver.of(make(label))
    grid = solver.schedule(9)
    samples, states = walk(solver, start(grid), solver.init(grid), len(grid))
    for at in (e for e in grid.boundaries if e is not None):
        assert not states[at].leaves()
        again, _ = walk(solver, samples[at], solver.restart(states[at]), len(grid))
        assert torch.equal(again[-1], samples[-1])


@pytest.mark.parametrize("label", ["pndm", "heun", "single2"])
def test_no_restart_inside_a_step(label):
    solver = DiffusersSolver.of(make(label))
    with pytest.raises(PlanError, match=r"entry 1, inside a step; nearest: \[0, 2\]"):
        solver.restart(replace(solver.init(solver.schedule(6)), position=1))


# --- subsets ------------------------------------------------------------------------------------------------------

SUITS = [label for label, (name, _) in CONFIGURATIONS.items() if find_spec(name).coarse]
ENTRIES = [0, 1, 4, 5, 9, 14, 17]


@pytest.mark.parametrize("label", [label for label in SUITS if not label.startswith("ddim")])
def test_subset_is_a_stock_scheduler_set_by_hand(label):
    stock = make(label)
    solver = DiffusersSolver.of(stock)
    grid = solver.schedule(20).subset(ENTRIES)
    stock.set_timesteps(20)
    for name in ("betas", "alphas") if label == "ipndm" else ("sigmas",):
        setattr(stock, name, getattr(stock, name)[[*ENTRIES, 20]])
    stock.timesteps = stock.timesteps[ENTRIES]
    if label.startswith("unipc"):
        stock.disable_corrector = list(range(len(ENTRIES)))
    mine, _ = walk(solver, start(grid), solver.init(grid), len(grid))
    # by hand, the index must be set: among equal timesteps diffusers would take the second
    stock._begin_index = 0
    theirs = stock_loop(stock, start(grid))
    assert torch.isfinite(theirs[-1]).all()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("label", ["ddim", "ddim-v-trailing"])
def test_ddim_on_a_subset_is_its_closed_form(label):
    """Song et al. 2021, Eq. 12 with σ = 0, in float64."""
    solver = DiffusersSolver.of(make(label))
    grid = solver.schedule(20).subset(ENTRIES)
    samples, _ = walk(solver, start(grid), solver.init(grid), len(grid))
    for at in range(len(grid)):
        x = samples[at].double()
        m = toy_model(samples[at], grid.timesteps[at]).double()
        a, s, a_next, s_next = (float(v[i]) for i in (at, at + 1) for v in (grid.signal, grid.noise))
        x0 = grid.denoised(m, x, at)
        eps = m if grid.prediction == "epsilon" else a * m + s * x
        torch.testing.assert_close(samples[at + 1].double(), a_next * x0 + s_next * eps, rtol=1e-4, atol=1e-5)
    assert float(grid.signal[-1]) == float(solver.schedule(20).signal[-1])


def test_ddim_s_whole_schedule_as_a_subset_is_the_fine_walk():
    """With this spacing DDIM's arithmetic predecessor is the next entry, so both ways of finding it must agree."""
    stock = make("ddim")
    solver = DiffusersSolver.of(stock)
    fine = solver.schedule(20)
    samples, _ = walk(solver, start(fine), solver.init(fine), 20)
    tail = fine.subset(range(3, 20))
    again, _ = walk(solver, samples[3], solver.init(tail), len(tail))
    assert torch.equal(again[-1], samples[-1])
    live = solver.scheduler()
    install(live, tail)
    alpha, x = live.final_alpha_cumprod, samples[3]
    for at in range(len(tail)):
        t = tail.timesteps[at]
        with stepping(live, tail, at) as options:
            x = live.step(toy_model(x, t), t, x, **options).prev_sample
        assert live.final_alpha_cumprod is alpha
        assert live.num_inference_steps == len(tail)
    assert torch.equal(x, samples[-1])


@pytest.mark.parametrize("label", SUITS)
def test_one_call_from_noise_to_picture(label):
    solver = DiffusersSolver.of(make(label))
    grid = solver.schedule(20).subset([0])
    samples, _ = walk(solver, start(grid), solver.init(grid), 1)
    assert torch.isfinite(samples[-1]).all() or label in ("ipndm", "ddim-v-trailing")


@pytest.mark.parametrize("label", [label for label in CONFIGURATIONS if label not in SUITS])
def test_others_refuse_subsets(label):
    solver = DiffusersSolver.of(make(label))
    with pytest.raises(UnsupportedSolverError, match="cannot walk a subset"):
        solver.init(solver.schedule(20).subset(ENTRIES))


def test_unipc_s_corrector_is_off_on_subsets_alone():
    live = make("unipc2")
    grid = schedule_of(live, 12)
    subset = grid.subset([0, 3, 6])
    install(live, subset)
    with stepping(live, subset, 1):
        assert live.disable_corrector == [0, 1, 2]
    assert live.disable_corrector == []  # so that a call on the scheduler's own schedule is its own again
    install(live, grid)
    with stepping(live, grid, 1):
        assert live.disable_corrector == []


# --- live schedulers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", DISTINCT)
def test_live_scheduler_is_interrupted_and_resumed(label):
    """Snapshot a stock loop anywhere, let the scheduler serve another run, restore, go on: the same picture."""
    live = make(label)
    grid = schedule_of(live, 6)
    live.set_timesteps(6)
    whole = stock_loop(live, start(grid))
    for at in (1, 3, 4):
        install(live, grid)
        x = start(grid)
        for t in live.timesteps[:at]:
            x = live.step(stock_model(live, x, t), t, x).prev_sample
        state = snapshot(live, grid, at)
        if not label.startswith("ddim"):
            assert snapshot(live, grid).position == at
        live.set_timesteps(6)
        stock_loop(live, start(grid, 5))
        install(live, grid)
        restore(live, state)
        for t in live.timesteps[at:]:
            x = live.step(stock_model(live, x, t), t, x).prev_sample
        assert torch.equal(x, whole[-1])


@every_configuration
def test_a_grid_is_installed_twice_as_it_is_once(label):
    """The second time nothing is computed; whatever happened to the scheduler meanwhile is forgotten all the same."""
    live, grid = make(label), schedule_of(make(label), 6)
    torch.manual_seed(0)
    install(live, grid)
    first = stock_loop(live, start(grid))
    live.set_timesteps(6)
    stock_loop(live, start(grid))
    install(live, grid)
    computed = make(label)
    install(computed, grid)
    assert set(vars(computed)) <= set(vars(live))
    assert torch.equal(live.timesteps, computed.timesteps)
    assert all(torch.equal(a, b) for a, b in zip(first, stock_loop(live, start(grid)), strict=True))
    live.register_to_config(another_setting=1)  # what it was computed from may have changed
    live.timesteps = None
    install(live, grid)
    assert torch.equal(live.timesteps, computed.timesteps)


def test_live_positions():
    live = make("ddim")
    grid = schedule_of(live, 6)
    install(live, grid)
    with pytest.raises(InvalidInputError, match="does not count its steps"):
        snapshot(live, grid)
    with pytest.raises(InvalidInputError, match="position must be"):
        snapshot(live, grid, 7)
    with pytest.raises(InvalidInputError, match="grid point"):
        advance(live, start(grid), start(grid), grid, 6)


def test_custom_timesteps_are_refused():
    live = make("dpm++2")
    grid = schedule_of(live, 5)
    live.set_timesteps(timesteps=[999, 700, 400, 200, 100])
    with pytest.raises(PlanError, match="custom timesteps"):
        require_grid(live, grid)
    live.set_timesteps(6)
    with pytest.raises(PlanError, match="5 timesteps"):
        restore(live, DiffusersSolver.of(live).init(grid))
    install(live, grid)
    require_grid(live, grid)
    with pytest.raises(PlanError, match="this very scheduler"):
        install(live, schedule_of(make("dpm++2-karras"), 5))


@pytest.mark.parametrize(
    ("label", "steps"), [("dpm++2", 0), ("dpm++2", 1001), ("ddim", 1000), ("heun", -1)]
)  # DDIM with an offset would begin at timestep 1000 of 0 … 999
def test_impossible_schedules_are_refused(label, steps):
    with pytest.raises(PlanError, match=r"steps"):
        schedule_of(make(label), steps)


def test_install_sets_what_a_pipeline_reads():
    live = make("dpm++2")
    grid = schedule_of(live, 8)
    install(live, grid.subset([0, 4]), "cpu")
    assert live.timesteps.tolist() == grid.timesteps[[0, 4]].tolist()
    assert live.num_inference_steps == 2


# --- restart ------------------------------------------------------------------------------------------------------


def probability_flow(grid, x, at):
    """A linear model: data N(0, ¼). Its probability flow scales every sample by the ratio of standard deviations."""
    a, s = grid.signal.double(), grid.noise.double()
    deviation = (0.25 * a**2 + s**2).sqrt()
    return x * (deviation / deviation[at]).reshape(-1, 1, 1, 1, 1)


def linear_model(grid, x, at):
    """The exact denoiser of data N(0, ¼): E[x0 | x] = ¼ a x / (¼ a² + s²)."""
    a, s = float(grid.signal[at]), float(grid.noise[at])
    return grid.model_output(x * (0.25 * a / (0.25 * a * a + s * s)), x, at)


def restart_error(solver, steps, share):
    """Relative error at the last entry of a run that starts afresh, on the exact solution, at a share of the steps."""
    grid = solver.schedule(steps)
    at = grid.boundaries[int(share * steps)]
    stop = grid.boundaries[int(0.9 * steps)]
    exact = probability_flow(grid, torch.ones(1, 1, 1, 1, dtype=torch.float64), at)
    x, state = exact[at].float(), solver.restart(replace(solver.init(grid), position=at))
    while state.position < stop:
        x, state = solver.step(linear_model(grid, x, state.position), x, state)
    return float(abs(x.double() - exact[stop]) / exact[stop])


@pytest.mark.parametrize(
    ("label", "order"),
    [("pndm", 2), ("dpm++2", 2), ("dpm++3", 2), ("deis2", 2), ("unipc2", 2), ("lms", 2), ("ipndm", 2), ("euler", 1)],
)
def test_a_restart_converges_with_the_right_order(label, order):
    """A first step of order one costs an error of second order in the step, whatever the order after it.

    A restart that takes a wrong step (PLMS's second call, LMS coefficients for derivatives that are not there) stays
    one noise level off: first order at best.
    """
    solver = DiffusersSolver.of(make(label))
    errors = [restart_error(solver, steps, 0.7) for steps in (20, 40, 80)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < (2e-3 if order == 2 else 3e-2), (errors, rates)
    assert min(rates) > order - 0.5, (errors, rates)


def test_pndm_restarts_with_orders_one_two_three_four():
    """Adams–Bashforth by hand on successive timesteps; its Heun-like second call never happens."""
    solver = DiffusersSolver.of(make("pndm"))
    grid = solver.schedule(20)
    outputs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    adams = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    x, state = start(grid), solver.restart(replace(solver.init(grid), position=9))
    for i, output in enumerate(outputs):
        mean = sum(c * outputs[i - j].double() for j, c in enumerate(adams[min(i, 3)]))
        at = 9 + i
        a, s, a_next, s_next = (float(v[k]) for k in (at, at + 1) for v in (grid.signal, grid.noise))
        expected = a_next * (x.double() - s * mean) / a + s_next * mean  # DDIM's step with the mean noise
        x, state = solver.step(output, x, state)
        assert state.position == at + 1
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)


def test_lms_restarts_with_the_order_it_has_derivatives_for():
    solver = DiffusersSolver.of(make("lms"))
    grid = solver.schedule(20)
    x, state = start(grid), solver.restart(replace(solver.init(grid), position=9))
    m = torch.randn(SHAPE)
    after, _ = solver.step(m, x, state)
    torch.testing.assert_close(after, x + m * float(grid.noise[10] - grid.noise[9]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", ["pndm", "lms"])
def test_live_scheduler_restarts_as_the_adapter_does(label):
    live = make(label)
    solver = DiffusersSolver.of(live)
    grid = solver.schedule(12)
    fresh = solver.restart(replace(solver.init(grid), position=5))
    mine, _ = walk(solver, start(grid), fresh, len(grid))
    install(live, grid)
    restore(live, fresh)
    x = start(grid)
    for at in range(5, len(grid)):
        with stepping(live, grid, at) as options:
            t = grid.timesteps[at]
            x = live.step(toy_model(grid.scale_input(x, at), t), t, x, **options).prev_sample
    assert torch.equal(x, mine[-1])


# --- routes on real schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "plan", "nfe"),
    [
        ("pndm", "jump:10:20/50", 41),
        ("pndm", "jump:10:30/50", 31),
        ("pndm", "jump:10:40/50", 21),
        ("pndm", "jump:3:10/50", 44),
        ("dpm++2", "jump:5:8/20", 17),
        ("dpm++2", "jump:5:10/20", 15),
        ("dpm++2", "jump:5:13/20", 12),
        ("dpm++2", "jump:5:15/20", 10),
        ("heun", "jump:5:8/20", 33),
        ("single2", "jump:4:8/20", 16),
        ("unipc2", "coarse:8/40", 8),
        ("ddim", "at:0,5,20/40", 3),
    ],
)
def test_nfe_of_a_route_is_the_calls_it_makes(label, plan, nfe):
    route = Route.lay(Plan.parse(plan), schedule_of(make(label), Plan.parse(plan).fine))
    assert route.nfe == nfe
    assert route.nfe == sum(s.called for s in route.segments)
    assert [s.start for s in route.segments[1:]] == [s.stop for s in route.segments[:-1]]
    assert route.segments[-1].stop == route.grid.fine


def test_a_leap_cannot_begin_inside_a_singlestep_step():
    with pytest.raises(PlanError, match="nearest legal steps: 4, 6"):
        Route.lay(Plan.jump(5, 8, 20), schedule_of(make("single2"), 20))


# --- coarse steps of another solver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", CONFIGURATIONS)
@pytest.mark.parametrize(("steps", "calls"), [(12, 4), (40, 8), (40, 20)])
def test_whoever_takes_the_coarse_steps_passes_the_same_samples(label, steps, calls):
    solver = DiffusersSolver.of(make(label))
    other = solver.for_coarse_steps(steps, calls, guidance=1.0)
    assert solver.schedule(steps).meets(other.schedule(steps))
    assert other.schedule(steps).prediction == solver.schedule(steps).prediction
    whose = "DEISMultistepScheduler" if calls < 12 else "DPMSolverMultistepScheduler"
    assert other is solver or (solver.name, other.name) == ("DPMSolverMultistepScheduler", whose)


@pytest.mark.parametrize("spaced", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
def test_deis_takes_the_long_steps_of_dpmsolver_and_its_third_order_the_shorter_ones_of_weak_guidance(spaced):
    solver = DiffusersSolver.of(diffusers.DPMSolverMultistepScheduler(**spaced))
    few, guided = ((n, 3.0) for n in (3, 8, 12)), ((8, 6.0), (16, 4.5), (16, 7.5), (24, 7.5))
    assert {solver.for_coarse_steps(48, *given).name for given in (*few, *guided)} == {"DEISMultistepScheduler"}
    for calls, guidance in ((12, 1.5), (16, 3.0), (24, 3.0), (24, 4.5), (24, 6.0)):
        other = solver.for_coarse_steps(48, calls, guidance)
        assert (other.name, other.config["solver_order"]) == ("DPMSolverMultistepScheduler", 3)
        assert dict(other.config) | {"solver_order": 2} == dict(solver.config)


def test_schedules_meet_only_at_equal_levels_and_times():
    plain, karras = (
        DiffusersSolver.of(diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=on)).schedule(9)
        for on in (False, True)
    )
    assert plain.meets(plain)
    assert not plain.meets(karras)
    assert not plain.meets(replace(plain, timesteps=plain.timesteps + 1))


# --- half precision, quiet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", DISTINCT)
def test_half_precision_replays_too(label):
    solver = DiffusersSolver.of(make(label))
    grid = solver.schedule(5)
    x, state, trail = start(grid).bfloat16(), solver.init(grid), []
    while state.position < len(grid):
        m = toy_model(grid.scale_input(x, state.position).float(), grid.timesteps[state.position]).bfloat16()
        trail.append((x, state, m))
        x, state = solver.step(m, x, state)
    for x_, state_, m_ in trail:
        again, _ = solver.step(m_, x_, state_)
        following = trail[state_.position + 1][0] if state_.position + 1 < len(trail) else x
        assert torch.equal(again, following)


def test_singlestep_does_not_warn_of_settings_it_changes(caplog):
    caplog.set_level(logging.WARNING)
    solver = DiffusersSolver.of(make("single2"))
    solver.schedule(7)
    assert not caplog.records
