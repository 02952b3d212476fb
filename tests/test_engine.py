"""What must always hold of a leap, over every deterministic scheduler and in worlds where the answer is known."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redi.combiners import NNLS, Affine, Combiner, LeastSquares, Nearest, combine
from redi.engine import ReDiEngine
from redi.errors import InvalidInputError, PlanError
from redi.gate import Gate
from redi.plan import Plan
from redi.recall import Recall
from redi.solvers import DiffusersSolver
from redi.table import quantised
from redi.transports import Defect, Residual, Transport, Value
from tests.worlds import Curved, Linear, World, world

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COARSE = {
    "ddim": ("DDIMScheduler", {**VP, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "ddim-v": ("DDIMScheduler", {**VP, "prediction_type": "v_prediction", "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", VP),
    "euler-v": ("EulerDiscreteScheduler", {**VP, "prediction_type": "v_prediction"}),
    "lms": ("LMSDiscreteScheduler", VP),
    "dpm1": ("DPMSolverMultistepScheduler", {**VP, "solver_order": 1}),
    "dpm2": ("DPMSolverMultistepScheduler", VP),
    "dpm2-karras-v": (
        "DPMSolverMultistepScheduler",
        {**VP, "use_karras_sigmas": True, "prediction_type": "v_prediction"},
    ),
    "dpm3": ("DPMSolverMultistepScheduler", {**VP, "solver_order": 3}),
    "deis": ("DEISMultistepScheduler", VP),
    "unipc": ("UniPCMultistepScheduler", VP),
    "ipndm": ("IPNDMScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
JUMP_ONLY = {
    "pndm": ("PNDMScheduler", {**VP, "skip_prk_steps": True, "steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", VP),
    "singlestep": ("DPMSolverSinglestepScheduler", VP),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
EVERY = COARSE | JUMP_ONLY
STEPS = 20


def solver_of(name: str) -> DiffusersSolver:
    class_name, config = EVERY[name]
    return DiffusersSolver.from_config(class_name, config)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def jump_of(name: str, *, called: bool = False) -> Plan:
    return Plan.jump(6, 12, STEPS, called=called)  # legal for singlestep order 2 as well


def own_row(w: World, engine: ReDiEngine) -> float:
    """Relative error of every row's own query at H=1, in the batch it was recorded in."""
    worst = 0.0
    for noise_id in range(2):
        ids = torch.full((len(w.conditions),), noise_id)
        noise = w.noise(ids)
        x, report = engine.sample(w.model, noise, condition=w.conditions, noise_ids=ids)
        assert all(report.leapt)
        worst = max(worst, relative(x, w.fine(noise, w.conditions, STEPS)))
    return worst


@pytest.mark.parametrize("combiner", [Nearest(), Affine(), LeastSquares()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", COARSE)
def test_own_row_on_a_coarse_plan_gives_the_fine_run(tmp_path: Path, name: str, combiner: Combiner) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of(name), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, combiner=combiner, neighbors=1)
    assert own_row(w, engine) <= 1e-5


@pytest.mark.parametrize("transport", [Value(), Residual()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("name", EVERY)
def test_own_row_on_a_jump_gives_the_fine_run(tmp_path: Path, name: str, transport: Transport) -> None:
    plan = jump_of(name)
    w = world(tmp_path, solver_of(name), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, transport=transport, neighbors=1)
    assert own_row(w, engine) <= 1e-5


@pytest.mark.parametrize("name", COARSE)
def test_own_row_on_a_called_jump_gives_the_fine_run(tmp_path: Path, name: str) -> None:
    plan = jump_of(name, called=True)
    w = world(tmp_path, solver_of(name), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, transport=Defect(), neighbors=1)
    assert own_row(w, engine) <= 1e-5


def test_own_row_in_half_precision_is_as_near_as_half_precision_is(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), storage="float16")
    engine = ReDiEngine(w.kb, w.solver, plan, neighbors=1)
    # every leap lands on a stored sample rounded to 2^-11 of its magnitude; the model does not amplify it
    assert own_row(w, engine) <= 2**-10


def test_own_row_in_eight_bits_is_as_near_as_its_defects_are(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), storage="float16")
    exact, small = (ReDiEngine(w.kb, w.solver, plan, neighbors=1, eight_bits=e) for e in (False, True))
    ids = torch.arange(len(w.kb))[None]
    for leap in range(len(small.route.leaps)):
        a, b = exact.table.bracket(ids, leap), small.table.bracket(ids, leap)
        half_a_step = a.flatten(2).abs().amax(2)[..., None] / 254
        assert bool(((a - b).flatten(2).abs() <= 1.001 * half_a_step + 1e-3 * a.flatten(2).abs()).all())
    assert small.table.derived["bracket"].dtype == torch.int8
    assert own_row(w, exact) < own_row(w, small) <= 2**-8


@pytest.mark.parametrize("eight_bits", [False, True])
def test_corrections_combined_at_once_are_those_of_each_leap_bit_for_bit(tmp_path: Path, eight_bits: bool) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), storage="float16")
    engine = ReDiEngine(w.kb, w.solver, plan, retrieve_at=(0, 3), eight_bits=eight_bits)
    g = torch.Generator().manual_seed(0)
    for batch in (1, 5):
        ids = torch.stack([torch.randperm(len(w.kb), generator=g)[:3] for _ in range(batch)])
        weights = torch.rand(batch, 3, generator=g)
        recall = Recall(ids, weights, torch.zeros(batch, 3), torch.arange(batch) % 2 == 0)
        x = torch.randn(batch, *w.kb.bank.shape, generator=g)
        for leap in range(6):
            one_by_one = x.clone()
            bracket = engine.table.bracket(ids[recall.hit], leap)
            one_by_one[recall.hit] += combine(weights[recall.hit], bracket)
            assert torch.equal(engine.leap(x, recall, leap), one_by_one)
            assert set(recall.taught) == set(range(leap + 1, 3 if leap < 3 else 6))


def test_eight_bits_are_for_coarse_plans_of_rows_in_half_precision(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path / "exact", solver_of("dpm2"), plan, Curved())
    with pytest.raises(InvalidInputError, match="stored in float32 to be exact"):
        ReDiEngine(w.kb, w.solver, plan, eight_bits=True)
    jump = jump_of("dpm2")
    w = world(tmp_path / "jump", solver_of("dpm2"), jump, Curved(), storage="float16")
    table = ReDiEngine(w.kb, w.solver, jump, transport=Value(), eight_bits=True).table
    assert table.derived["bracket"].dtype == torch.float16


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4]))
def test_eight_bits_are_within_half_a_step(seed: int, size: float) -> None:
    brackets = size * torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(seed))
    brackets[1, 0] = 0
    numbers, scale = quantised(brackets)
    back = numbers.float() * scale[..., None, None]
    assert bool(((back - brackets).abs() <= 0.5001 * scale[..., None, None]).all())
    assert torch.equal(numbers.flatten(2).abs().amax(2) == 127, scale > 0)


def test_a_jump_without_its_history_is_not_the_fine_run(tmp_path: Path) -> None:
    plan = jump_of("pndm")
    w = world(tmp_path, solver_of("pndm"), plan, Curved())
    carried = own_row(w, ReDiEngine(w.kb, w.solver, plan, transport=Value(), neighbors=1))
    fresh = own_row(w, ReDiEngine(w.kb, w.solver, plan, transport=Value(), neighbors=1, history="fresh"))
    assert 100 * carried < fresh < 1e-2


@pytest.mark.parametrize("name", COARSE)
def test_a_linear_model_is_solved_exactly_on_a_coarse_plan(tmp_path: Path, name: str) -> None:
    plan = Plan.coarse(5, STEPS)
    w = world(tmp_path, solver_of(name), plan, Linear())
    assert in_the_span(w, ReDiEngine(w.kb, w.solver, plan, combiner=Affine(ridge=0.0), neighbors=8)) <= 2e-5


@pytest.mark.parametrize("transport", [Value(), Residual()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("name", EVERY)
def test_a_linear_model_is_solved_exactly_by_a_jump(tmp_path: Path, name: str, transport: Transport) -> None:
    plan = jump_of(name)
    w = world(tmp_path, solver_of(name), plan, Linear())
    engine = ReDiEngine(w.kb, w.solver, plan, transport=transport, combiner=Affine(ridge=0.0), neighbors=8)
    assert in_the_span(w, engine) <= 2e-5


def in_the_span(w: World, engine: ReDiEngine) -> float:
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(4, 8, generator=g)
    condition = (mix / mix.sum(1, keepdim=True).clamp(min=0.5)) @ w.conditions
    mix = torch.rand(4, 8, generator=g)
    condition = (mix / mix.sum(1, keepdim=True)) @ w.conditions
    ids = torch.tensor([0, 1, 1, 0])
    noise = w.noise(ids)
    x, _ = engine.sample(w.model, noise, condition=condition, noise_ids=ids)
    return relative(x, w.fine(noise, condition, STEPS))


@pytest.mark.parametrize("name", COARSE)
def test_zero_weights_are_the_plain_solver_bit_for_bit(tmp_path: Path, name: str) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of(name), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, combiner=Zeros())
    ids = torch.zeros(3, dtype=torch.int64)
    noise, c = w.noise(ids), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    x, _ = engine.sample(w.model, noise, condition=c, noise_ids=ids)
    strangers, report = engine.sample(w.model, noise, condition=c, noise_ids=torch.full((3,), -1))
    plain = plain_walk(w, engine, noise, c)
    assert not any(report.leapt)
    assert torch.equal(strangers, plain)
    assert torch.equal(x, plain)


@dataclass(frozen=True)
class Zeros(Combiner):
    """Trusts nobody."""

    def weights(self, keys: Tensor, query: Tensor) -> Tensor:
        return torch.zeros(keys.shape[:2])


def plain_walk(w: World, engine: ReDiEngine, noise: Tensor, c: Tensor) -> Tensor:
    grid, solver = engine.route.grid, engine.solver
    x, state = noise * grid.initial_scale, solver.init(grid)
    for i in range(len(grid)):
        x, state = solver.step(w.model(grid.scale_input(x, i), grid.timesteps[i], c), x, state)
    return x


@pytest.mark.parametrize(
    ("name", "plan", "transport", "calls"),
    [
        ("dpm2", "coarse:6/20", Defect(), 6),
        ("dpm2", "jump:5:8/20", Value(), 17),
        ("dpm2", "jump:5:8/20", Defect(), 18),
        ("dpm2", "jump:5:15/20", Residual(), 10),
        ("pndm", "jump:10:30/50", Value(), 31),
        ("pndm", "jump:10:20/50", Value(), 41),
        ("heun", "jump:6:12/20", Value(), 27),
        ("ddim", "at:0,3,9/20", Defect(), 3),
        ("dpm2", "jump:3:6+9:14/20", Value(), 12),
        ("dpm2", "jump:3:6+9:14/20", Defect(), 14),
    ],
)
def test_calls_made_are_those_stated(tmp_path: Path, name: str, plan: str, transport: Transport, calls: int) -> None:
    p = Plan.parse(plan)
    w = world(tmp_path, solver_of(name), p, Curved(), noises=1)
    engine = ReDiEngine(w.kb, w.solver, p, transport=transport, neighbors=2)
    w.model.calls = 0
    ids = torch.zeros(2, dtype=torch.int64)
    _, report = engine.sample(w.model, w.noise(ids), condition=w.conditions[:2], noise_ids=ids)
    assert w.model.calls == report.nfe == engine.route.nfe == calls


@pytest.mark.parametrize("transport", [Value(), Defect()], ids=lambda t: type(t).__name__)
def test_every_sample_of_a_mixed_batch_is_treated_as_if_alone(tmp_path: Path, transport: Transport) -> None:
    plan = jump_of("dpm2", called=transport.calls)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, transport=transport, neighbors=3)
    ids = torch.tensor([0, -1, 1, -1, 0])
    noise = w.noise(ids.clamp(min=0))
    c = torch.randn(5, 6, generator=torch.Generator().manual_seed(8))
    together, report = engine.sample(w.model, noise, condition=c, noise_ids=ids)
    assert report.leapt == (True, False, True, False, True)
    for i in range(5):
        alone, _ = engine.sample(w.model, noise[i : i + 1], condition=c[i : i + 1], noise_ids=ids[i : i + 1])
        assert relative(together[i : i + 1], alone) <= 1e-5
    assert relative(together[[1, 3]], w.fine(noise[[1, 3]], c[[1, 3]], STEPS)) <= 1e-5  # a miss is the full run


def test_the_gate_keeps_far_samples_out(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    ids = torch.tensor([0, 0])
    far = torch.cat([w.conditions[:1], 50 * torch.ones(1, 6)])
    engine = ReDiEngine(w.kb, w.solver, plan, gate=Gate(max_distance=1e-2))
    _, report = engine.sample(w.model, w.noise(ids), condition=far, noise_ids=ids)
    assert report.leapt == (True, False)


def test_noise_is_matched_against_the_bank(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("euler"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan)
    strange = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(99))
    noise = torch.cat([w.noise(torch.tensor([1])), strange])
    _, report = engine.sample(w.model, noise, condition=w.conditions[:2])
    assert report.noise_ids == (1, -1)
    assert report.leapt == (True, False)


def test_more_neighbours_than_rows_use_the_rows_there_are(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), rows=3)
    ids = torch.tensor([0])
    query = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    few, _ = ReDiEngine(w.kb, w.solver, plan, neighbors=3).sample(w.model, w.noise(ids), condition=query, noise_ids=ids)
    many, report = ReDiEngine(w.kb, w.solver, plan, neighbors=16).sample(
        w.model, w.noise(ids), condition=query, noise_ids=ids
    )
    assert torch.equal(few, many)
    assert len(report.neighbors[0]) == 3


@pytest.mark.parametrize("transport", [Value(), Defect()], ids=lambda t: type(t).__name__)
def test_two_jumps_in_one_run_give_the_fine_run(tmp_path: Path, transport: Transport) -> None:
    plan = Plan.parse("jump:3:6+9:14/20")
    w = world(tmp_path, solver_of("dpm3"), plan, Curved())
    for retrieve_at in ((0,), (0, 1)):
        engine = ReDiEngine(w.kb, w.solver, plan, transport=transport, neighbors=1, retrieve_at=retrieve_at)
        assert own_row(w, engine) <= 1e-5


def test_retrieving_at_every_step_gives_the_fine_run(tmp_path: Path) -> None:
    plan = Plan.coarse(5, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, neighbors=1, retrieve_at=range(5))
    assert own_row(w, engine) <= 1e-5


def test_retrieving_helps_on_unseen_conditions(tmp_path: Path) -> None:
    plan = Plan.coarse(5, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), rows=200, noises=1)
    ids = torch.zeros(20, dtype=torch.int64)
    c = torch.randn(20, 6, generator=torch.Generator().manual_seed(77))
    noise = w.noise(ids)
    fine = w.fine(noise, c, STEPS)
    engine = ReDiEngine(w.kb, w.solver, plan)
    redi, _ = engine.sample(w.model, noise, condition=c, noise_ids=ids)
    plain, _ = engine.sample(w.model, noise, condition=c, noise_ids=torch.full((20,), -1))
    assert relative(redi, fine) < 0.5 * relative(plain, fine)


def test_every_combiner_serves(tmp_path: Path) -> None:
    plan = jump_of("dpm2")
    w = world(tmp_path, solver_of("dpm2"), plan, Curved(), rows=12, noises=1)
    ids = torch.zeros(2, dtype=torch.int64)
    for combiner in (Nearest(), LeastSquares(), NNLS(), Affine()):
        engine = ReDiEngine(w.kb, w.solver, plan, transport=Value(), combiner=combiner, neighbors=4)
        x, _ = engine.sample(w.model, w.noise(ids), condition=w.conditions[:2] + 0.01, noise_ids=ids)
        assert torch.isfinite(x).all()


def test_rows_serve_another_solver_on_the_same_schedule(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, solver_of("deis"), plan, neighbors=1)  # its own defects, the same fine samples
    assert own_row(w, engine) <= 1e-5


def test_rows_do_not_serve_a_solver_that_sees_other_samples(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path / "a", solver_of("dpm2"), plan, Curved())
    with pytest.raises(PlanError, match="EulerDiscreteScheduler"):  # x there is x here divided by the signal
        ReDiEngine(w.kb, solver_of("euler"), plan)
    w = world(tmp_path / "b", solver_of("dpm2"), jump_of("dpm2"), Curved())
    with pytest.raises(PlanError, match="history"):
        ReDiEngine(w.kb, solver_of("deis"), jump_of("dpm2"), transport=Value())


def test_what_cannot_work_is_refused_with_what_to_do(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    with pytest.raises(PlanError, match="Defect"):
        ReDiEngine(w.kb, w.solver, plan, transport=Value())
    with pytest.raises(PlanError, match="saves no call"):
        ReDiEngine(w.kb, w.solver, Plan.jump(5, 6, STEPS))
    with pytest.raises(PlanError, match="jumps"):
        ReDiEngine(w.kb, solver_of("pndm"), plan)
    with pytest.raises(PlanError, match="key='sample'"):
        _ = ReDiEngine(w.kb, w.solver, jump_of("dpm2"), transport=Value(), key="denoised").table
    with pytest.raises(PlanError, match="shared noise"):
        _ = ReDiEngine(w.kb, w.solver, plan, key="sample").table
    with pytest.raises(InvalidInputError, match="neighbors"):
        ReDiEngine(w.kb, w.solver, plan, neighbors=0)
    with pytest.raises(Exception, match="rebuild it with --plan coarse:7/20"):
        _ = ReDiEngine(w.kb, w.solver, Plan.coarse(7, STEPS)).table
    engine = ReDiEngine(w.kb, w.solver, plan)
    with pytest.raises(InvalidInputError, match="shape"):
        engine.sample(lambda x, t: x[:, :1], w.noise(torch.tensor([0])))
    with pytest.raises(InvalidInputError, match=r"noise\[None\]"):
        engine.sample(w.model, w.noise(torch.tensor([0]))[0])
    with pytest.raises(PlanError, match="solved in 20"):
        ReDiEngine(w.kb, w.solver, Plan.of([0, 3], 7))  # entries that were recorded, of another schedule


def test_a_model_that_breaks_down_is_not_retrieved_for(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan)
    ids = torch.tensor([0, 1])

    def denoise(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out = w.model(x, t, c)
        out[0] = torch.nan
        return out

    x, report = engine.sample(denoise, w.noise(ids), condition=w.conditions[:2], noise_ids=ids)
    assert report.leapt == (False, True)
    assert torch.isfinite(x[1]).all()


def test_conditions_of_any_structure_are_split_with_their_batch(tmp_path: Path) -> None:
    plan = jump_of("dpm2")
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, transport=Value())
    ids = torch.tensor([0, -1, 1])
    noise = w.noise(torch.tensor([0, 0, 1]))

    def denoise(x: Tensor, t: Tensor, c: dict[str, list[Tensor]]) -> Tensor:
        return w.model(x, t, c["text"][0])

    c = w.conditions[:3]
    x, report = engine.sample(denoise, noise, condition={"text": [c]}, noise_ids=ids)
    assert report.leapt == (True, False, True)
    assert torch.equal(x, engine.sample(w.model, noise, condition=c, noise_ids=ids)[0])


def test_a_copied_engine_is_itself(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan)
    assert engine.table is copy.deepcopy(engine).table


def test_asking_for_far_more_neighbours_than_rows_costs_nothing(tmp_path: Path) -> None:
    plan = Plan.coarse(6, STEPS)
    w = world(tmp_path, solver_of("dpm2"), plan, Curved())
    engine = ReDiEngine(w.kb, w.solver, plan, neighbors=10**9)
    recall = engine.recall(torch.zeros(1, *w.kb.bank.shape), torch.tensor([0]), 0)
    assert recall.ids.shape == (1, 8)
