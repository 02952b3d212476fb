"""Samples whose nearest row is too far: what they get, and that the rest of their batch does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import redi
from redi.errors import InvalidInputError, MissError, PlanError
from tests.tiny import tiny_pipeline

PROMPTS = ["a red fox", "a blue car", "two green apples"]
FAR = "an old house"
STEPS = {"coarse:3/8": 3, "jump:2:5/8": 8}


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> redi.KnowledgeBase:
    folder: Path = tmp_path_factory.mktemp("kb")
    plans = [redi.Plan.parse(p) for p in STEPS]
    return redi.build(tiny_pipeline(), PROMPTS, folder, plans=plans, guidance=3.0, storage="float32")


def enabled(kb: redi.KnowledgeBase, plan: str, **settings: Any) -> Any:
    pipe = tiny_pipeline()
    transport = redi.Value() if plan.startswith("jump") else None
    redi.enable(pipe, kb, **{"plan": plan, "transport": transport, "neighbors": 2, "gate": redi.Gate(1e-3)} | settings)
    return pipe


def run(pipe: Any, prompts: list[str], steps: int) -> Tensor:
    return pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, output_type="latent").images


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) <= 1e-5


@pytest.mark.parametrize("plan", STEPS)
def test_nearest_leaps_from_the_nearest_row_alone(kb: redi.KnowledgeBase, plan: str) -> None:
    pipe = enabled(kb, plan, on_miss="nearest")
    served = run(pipe, [FAR, PROMPTS[0]], STEPS[plan])
    report = redi.report(pipe)
    assert report.leapt == (True, True)
    alone = enabled(kb, plan, neighbors=1, gate=None)
    assert close(served[:1], run(alone, [FAR], STEPS[plan]))
    assert report.nfe == redi.report(alone).nfe


@pytest.mark.parametrize("plan", STEPS)
def test_error_names_the_pictures_that_missed(kb: redi.KnowledgeBase, plan: str) -> None:
    pipe = enabled(kb, plan, on_miss="error")
    run(pipe, PROMPTS, STEPS[plan])
    with pytest.raises(MissError, match=r"picture 1 \(") as missed:
        run(pipe, [PROMPTS[0], FAR], STEPS[plan])
    assert list(missed.value.distances) == [1]
    with pytest.raises(InvalidInputError, match="no call has ended well"):
        redi.report(pipe)


def test_what_a_plan_cannot_do_is_refused_when_enabling(kb: redi.KnowledgeBase) -> None:
    with pytest.raises(PlanError, match="'plain'"):
        enabled(kb, "coarse:3/8", on_miss="full")
    with pytest.raises(PlanError, match="'full'"):
        enabled(kb, "jump:2:5/8", on_miss="plain")


def test_the_report_says_which_pictures_leapt(kb: redi.KnowledgeBase) -> None:
    pipe = enabled(kb, "coarse:3/8")
    run(pipe, [PROMPTS[0], FAR, PROMPTS[1], "a green car"], 3)
    assert redi.report(pipe).leapt == (True, False, True, False)
    assert "leapt       2 of 4 pictures (not 1, 3)" in str(redi.report(pipe))


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("transport", [redi.Value(), redi.Residual(), redi.Defect()], ids=lambda t: type(t).__name__)
def test_a_mixed_batch_jumps_sample_by_sample(tmp_path: Path, scheduler: str, transport: redi.Transport) -> None:
    """Multistep solvers carry a history, which those that leapt bring along when they join the rest."""
    import diffusers

    if scheduler == "PNDMScheduler" and isinstance(transport, redi.Defect):
        pytest.skip("PNDM's step does not start from its sample")
    pipe = tiny_pipeline()
    settings = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    plans = [redi.Plan.parse("jump:2:5+6:9/12")]
    kb = redi.build(pipe, PROMPTS, tmp_path, plans=plans, guidance=3.0, storage="float32")
    redi.enable(pipe, kb, transport=transport, neighbors=1, gate=redi.Gate(1e-3), retrieve_at=(0, 1))
    mixed = run(pipe, [FAR, *PROMPTS[:2]], 12)
    report = redi.report(pipe)
    assert report.leapt == (False, True, True)
    assert report.nfe == report.nfe_full
    near, nfe = run(pipe, PROMPTS[:2], 12), redi.report(pipe).nfe
    assert nfe < report.nfe
    assert close(mixed[:1], run(pipe, [FAR], 12))
    assert close(mixed[1:], near)


def test_where_the_history_begins_anew_a_mixed_batch_runs_in_full(kb: redi.KnowledgeBase) -> None:
    pipe = enabled(kb, "jump:2:5/8", history="fresh")
    mixed = run(pipe, [PROMPTS[0], FAR], 8)
    assert redi.report(pipe).leapt == (False, False)
    redi.disable(pipe)
    ids = torch.zeros(2, dtype=torch.int64)
    fine = pipe(
        [PROMPTS[0], FAR],
        num_inference_steps=8,
        guidance_scale=3.0,
        latents=kb.bank.noise(ids),
        output_type="latent",
    ).images
    assert torch.equal(mixed, fine)
