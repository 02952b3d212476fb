"""Strings of the command line become exactly the classes they name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, IPNDMScheduler

from redi.backends import Exact
from redi.cli import names
from redi.combiners import NNLS, Affine, Kriging, LeastSquares, Nearest
from redi.errors import InvalidInputError, PlanError, ReDiError, UnsupportedSolverError
from redi.plan import Plan
from redi.solvers import DiffusersSolver
from redi.transports import Defect, Residual, Value

DIFFUSION = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLOWING = ("flow-euler", "flow-heun", "dpmsolver++", "dpmsolver++3", "deis", "unipc")


@pytest.mark.parametrize("name", [n for n in names.SOLVERS if not n.startswith("flow") and n != "ipndm"])
def test_every_diffusion_solver_keeps_the_schedule_the_model_was_trained_on(name: str) -> None:
    solver = names.solver(name, DIFFUSION)
    assert solver.name == names.SOLVERS[name][0]
    for setting in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert solver.config[setting] == DIFFUSION.config[setting]
    assert solver.schedule(10).steps == 10
    again = DiffusersSolver.from_config(solver.name, solver.config)
    assert again == solver
    assert again.schedule(10).timesteps.equal(solver.schedule(10).timesteps)


@pytest.mark.parametrize(("name", "order"), [("dpmsolver++", 2), ("dpmsolver++3", 3), ("dpmsolver-singlestep", 2)])
def test_orders(name: str, order: int) -> None:
    assert names.solver(name, DIFFUSION).config["solver_order"] == order


@pytest.mark.parametrize("name", FLOWING)
def test_solvers_of_flow_models_predict_flow(name: str) -> None:
    grid = names.solver(name, FLOW).schedule(10)
    assert grid.prediction == "flow_prediction"
    assert (grid.signal + grid.noise).allclose((grid.signal + grid.noise).new_ones(()), atol=1e-5)


@pytest.mark.parametrize("name", ["dpmsolver++", "dpmsolver++3", "deis", "unipc", "euler", "heun", "lms"])
def test_karras_noise_levels(name: str) -> None:
    """σ_i^(1/7) runs evenly from the model's largest noise level to its smallest (Karras et al. 2022, eq. 5)."""
    grid = names.solver(f"{name}-karras", DIFFUSION).schedule(10)
    sigmas = torch.unique((grid.noise / grid.signal)[: grid.fine]).double()
    steps = sigmas.pow(1 / 7).diff()
    assert torch.allclose(steps, steps.mean(), rtol=1e-3)
    own = names.solver(name, DIFFUSION).schedule(1000)
    assert (grid.noise / grid.signal)[0] == pytest.approx(float((own.noise / own.signal).max()), rel=1e-2)


@pytest.mark.parametrize(("name", "trained"), [("ddim", DIFFUSION), ("pndm", DIFFUSION), ("unipc", FLOW)])
def test_solvers_without_karras_noise_levels_say_so(name: str, trained: Any) -> None:
    with pytest.raises(UnsupportedSolverError, match=f"{name} cannot walk Karras"):
        names.solver(f"{name}-karras", trained)


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun", "ipndm"])
def test_solvers_of_other_models_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedSolverError, match=name):
        names.solver(name, DIFFUSION)


@pytest.mark.parametrize("name", sorted(set(names.SOLVERS) - set(FLOWING)))
def test_diffusion_solvers_are_refused_for_flow_models(name: str) -> None:
    with pytest.raises(UnsupportedSolverError, match=name):
        names.solver(name, FLOW)


def test_ipndm_for_its_own_models() -> None:
    assert names.solver("ipndm", IPNDMScheduler()).name == "IPNDMScheduler"


def test_unknown_solver_lists_the_known() -> None:
    with pytest.raises(InvalidInputError, match=r"'magic'.*ddim, pndm, dpmsolver"):
        names.solver("magic", DIFFUSION)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nearest", Nearest()),
        ("least-squares", LeastSquares()),
        ("nnls", NNLS()),
        ("affine", Affine()),
        ("affine:0.5", Affine(ridge=0.5)),
        ("affine:0", Affine(ridge=0.0)),
        ("kriging", Kriging()),
        ("kriging:0.5", Kriging(nugget=0.5)),
    ],
)
def test_combiners(text: str, expected: object) -> None:
    assert names.combiner(text) == expected


@pytest.mark.parametrize("text", ["", "affine:x", "affine:-1", "affine:nan", "kriging:0", "nearest:1", "mean"])
def test_combiners_that_are_none(text: str) -> None:
    with pytest.raises(ReDiError):
        names.combiner(text)


def test_transports() -> None:
    assert [names.transport(n) for n in names.TRANSPORTS] == [Value(), Residual(), Defect()]
    with pytest.raises(InvalidInputError, match="value, residual, defect"):
        names.transport("beam")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coarse:8/40", [Plan.coarse(8, 40)]),
        ("coarse:8/40,coarse:5/40", [Plan.coarse(8, 40), Plan.coarse(5, 40)]),
        ("at:0,5,20/40", [Plan.of([0, 5, 20], 40)]),
        ("at:0,5,20/40, jump:5:8/40,coarse:8/40", [Plan.of([0, 5, 20], 40), Plan.jump(5, 8, 40), Plan.coarse(8, 40)]),
        ("coarse:8/40,coarse:8/40", [Plan.coarse(8, 40)]),
    ],
)
def test_plans_are_told_apart_by_their_commas(text: str, expected: list[Plan]) -> None:
    assert names.plans(text) == expected


def test_few_calls_are_placed_for_the_guidance_on_karras_levels() -> None:
    text, karras, even = "few:6/48,coarse:8/48", "dpmsolver++-karras", "dpmsolver++"
    for name, guidance, first in (
        (karras, 3.0, Plan.placed(6, 48, guidance=3.0)),
        (karras, 7.5, Plan.placed(6, 48, guidance=6.0)),
        (even, 7.5, Plan.coarse(6, 48)),
    ):
        found = names.plans(text, names.placing(names.solver(name, DIFFUSION), guidance))
        assert found == [first, Plan.coarse(8, 48)]
    assert names.plans("few:8/40", names.placing(names.fine_solver(FLOW), 4.0)) == [Plan.coarse(8, 40)]


def test_few_calls_that_cannot_be_placed_say_how_or_where() -> None:
    with pytest.raises(PlanError, match=r"few:8/40 is placed when .* redi info"):
        names.plans("few:8/40")
    with pytest.raises(PlanError, match="'few:CALLS/FINE'"):
        names.plans("few:8", names.placing(names.solver("dpmsolver++", DIFFUSION), 7.5))


def test_few_calls_with_half_ones_are_a_step_more() -> None:
    for name in ("dpmsolver++-karras", "dpmsolver++"):
        place = names.placing(names.solver(name, DIFFUSION), 3.0)
        for calls in (3, 4, 8, 13):
            (plan,) = names.plans(f"few:{calls}h/48", place)
            assert plan.steps == calls + 1
            assert [s.halved for s in plan.segments] == [True, True, *[False] * (calls - 1)]
        with pytest.raises(PlanError, match="3 calls"):
            names.plans("few:2h/48", place)
    assert place(8, 48, True) == Plan.coarse(9, 48).halving()


@pytest.mark.parametrize("text", ["", "coarse:8", "coarse:8/40,", "leap:1/2", "jump:8:5/20", "few:8/40"])
def test_plans_that_are_none(text: str) -> None:
    with pytest.raises(PlanError):
        names.plans(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact", Exact()),
        ("exact:chunk_bytes=4096", Exact(chunk_bytes=4096)),
        ("exact:4096", Exact(4096)),
        ("exact:4096:device=cpu", Exact(4096)),
    ],
)
def test_a_retriever_is_named_with_its_settings(text: str, expected: Exact) -> None:
    assert names.retriever(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("annoy", "exact, faiss, hnsw, scann"),
        ("exact:threads=4", "no 'threads'; it has chunk_bytes"),
        ("exact:chunk_bytes=much", "chunk_bytes must be int, given 'much'"),
        ("exact:chunk_bytes=0", "at least 1"),
        ("", "there is no retriever ''"),
    ],
)
def test_a_retriever_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        names.retriever(text)


def test_a_shift_by_the_pictures_size_is_left_to_the_pipeline() -> None:
    trained = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for name in ("flow-euler", "unipc", "dpmsolver++"):
        assert names.solver(name, trained).config["use_dynamic_shifting"] is True


def test_rows_are_solved_on_karras_noise_levels_where_the_model_has_such() -> None:
    fine = names.fine_solver(DDIMScheduler())
    assert (fine.name, fine.config["use_karras_sigmas"]) == ("DPMSolverMultistepScheduler", True)
    flow = names.fine_solver(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (flow.name, flow.config["use_flow_sigmas"]) == ("DPMSolverMultistepScheduler", True)
    assert names.fine_solver(DDIMScheduler(), "unipc").name == "UniPCMultistepScheduler"
