"""The fine solver: rows depend on their prompt and noise alone, and on no batch that the memory did not suffice for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor

from redi.errors import InvalidInputError, PlanError
from redi.plan import Plan
from redi.recipe import FineSolver, Recipe
from redi.solvers import DiffusersSolver
from redi.types import Rows
from tests.tiny import tiny_pipeline

ITEMS = [("a red fox", 0), ("a red fox", 1), ("a blue car", 1), ("a red fox", 2), ("two green apples", 0)]


def recipe(pipe: Any, **settings: Any) -> Recipe:
    given = {"plans": [Plan.coarse(2, 4)], "guidance": 2.0, "noises": 3, "storage": "float32"} | settings
    return Recipe.of(pipe, **given)


def joined(parts: list[Rows]) -> tuple[list[tuple[str, int]], Tensor, Tensor]:
    keys = [key for rows in parts for key in zip(rows.prompts, rows.noise_ids.tolist(), strict=True)]
    return keys, torch.cat([r.samples[4] for r in parts]), torch.cat([r.embeddings for r in parts])


def test_the_work_is_every_prompt_from_every_noise_and_each_prompts_noises_come_together() -> None:
    items = recipe(tiny_pipeline()).items(["a", "b", "a"])
    assert items == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]


def test_half_a_surrogate_pair_is_found_before_any_work() -> None:
    with pytest.raises(InvalidInputError, match=r"prompt 2 of 3 is no valid Unicode .*'bad .*ud800'"):
        recipe(tiny_pipeline()).items(["fine", "bad \ud800", "fine", "🦊"])


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({"guidance": 3.0}, Plan.placed(8, 40, guidance=3.0, halved=True)),
        ({"guidance": 7.5}, Plan.placed(8, 40, guidance=7.5)),
        ({"guidance": 1.0}, Plan.placed(8, 40, guidance=1.0)),
        ({"guidance": 3.0, "diversity": 0.1}, Plan.placed(8, 40, guidance=3.0)),
        ({"guidance": 3.0, "settings": {"guidance_rescale": 0.5}}, Plan.placed(8, 40, guidance=3.0)),
        ({"guidance": 3.0, "solver": DiffusersSolver.of(DDIMScheduler())}, Plan.coarse(8, 40)),
    ],
    ids=["weak", "strong", "none", "diverse", "rescaled", "other levels"],
)
def test_who_names_no_plan_gets_eight_calls_where_they_are_best_made(settings: dict[str, Any], plan: Plan) -> None:
    solver = DiffusersSolver.of(DPMSolverMultistepScheduler(use_karras_sigmas=True))
    made = Recipe.of(tiny_pipeline(), **{"solver": solver} | settings)
    assert made.config.plans == (str(plan),)


def test_who_names_no_plan_must_bring_a_solver_that_can_be_corrected() -> None:
    for scheduler in (PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()):
        with pytest.raises(PlanError, match=r"given no plan; give it jumps, for instance jump:10:30/40"):
            Recipe.of(tiny_pipeline(), solver=DiffusersSolver.of(scheduler))


def test_a_pipeline_without_half_calls_gets_whole_ones_unless_half_ones_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, solver = tiny_pipeline(), DiffusersSolver.of(DPMSolverMultistepScheduler(use_karras_sigmas=True))
    pipe.unet.compile(backend="eager")
    assert Recipe.of(pipe, solver=solver, guidance=3.0).config.plans == (str(Plan.placed(8, 40, guidance=3.0)),)
    monkeypatch.setattr("redi.recipe.unheard", lambda _: "")
    monkeypatch.setattr("redi.recipe.doubles", lambda *_: False)
    assert Recipe.of(pipe, solver=solver, guidance=3.0).config.plans == (str(Plan.placed(8, 40, guidance=3.0)),)
    with pytest.raises(PlanError, match="one batch of twice the size"):
        Recipe.of(pipe, solver=solver, guidance=3.0, plans=[Plan.placed(8, 40, guidance=3.0, halved=True)])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda e: f"{type(e).__name__} {str(e)[:5]}",
)
def test_out_of_memory_halves_the_batch_and_goes_on(error: Exception) -> None:
    pipe, sizes = tiny_pipeline(), list[int]()
    whole = joined(FineSolver(pipe, recipe(pipe))(ITEMS))
    forward = pipe.unet.forward

    def little(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2 * 2:  # two pictures, each with and without its prompt
            raise error
        sizes.append(len(sample) // 2)
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = little
    solve = FineSolver(pipe, recipe(pipe))
    keys, samples, embeddings = joined(solve(ITEMS))
    assert solve.most == 2
    assert keys == ITEMS
    assert set(sizes) == {1, 2}
    for a, b in ((samples, whole[1]), (embeddings, whole[2])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 kernels differ by batch size
    before = len(sizes)
    assert [len(rows) for rows in solve(ITEMS[:3])] == [2, 1]  # the next batch does not try again what failed
    assert len(sizes) == before + 4 * 2


def test_what_a_single_picture_has_no_memory_for_and_other_errors_are_raised() -> None:
    pipe = tiny_pipeline()
    solve = FineSolver(pipe, recipe(pipe))

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.unet.forward = fails
    with pytest.raises(torch.OutOfMemoryError):
        solve(ITEMS)
    assert solve.most == 1
    pipe.unet.forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        FineSolver(pipe, recipe(pipe))(ITEMS)


def test_each_prompt_is_encoded_once_and_the_rows_are_the_same() -> None:
    pipe = tiny_pipeline()
    plain = [joined(FineSolver(pipe, recipe(pipe))([item])) for item in ITEMS]  # nothing repeats in a batch of one
    solve = FineSolver(pipe, recipe(pipe))
    encoded: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda _m, _i, out: encoded.append(len(out[0])))
    keys, samples, embeddings = joined(solve(ITEMS))
    assert encoded == [3, 3]  # three prompts of five rows, and as often the empty one
    more = joined(solve([("two green apples", 1), ("two green apples", 2)]))  # of the batch before
    assert encoded == [3, 3]
    assert keys == ITEMS
    assert more[0] == [("two green apples", 1), ("two green apples", 2)]
    torch.testing.assert_close(samples, torch.cat([p[1] for p in plain]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings, torch.cat([p[2] for p in plain]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(more[2], embeddings[4:].expand(2, -1))


def test_a_negative_prompt_belongs_to_what_was_encoded() -> None:
    pipe = tiny_pipeline()
    rows = {n: joined(FineSolver(pipe, recipe(pipe, negative_prompt=n))(ITEMS))[1] for n in ("", "blue")}
    assert not torch.allclose(rows[""], rows["blue"], atol=1e-3)
