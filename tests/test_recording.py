"""Rows from calls that are made anyway: what they hold, what they are called, and which calls are refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import redi
from redi.errors import FingerprintMismatchError, InvalidInputError, PlanError, UnsupportedSolverError
from tests.pipelines.models import make
from tests.tiny import tiny_pipeline

PROMPTS = ["a red fox", "a blue car"]


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def run(pipe: Any, prompts: list[str] | str = PROMPTS, steps: int = 8, **more: Any) -> Tensor:
    given = {"guidance_scale": 3.0, "output_type": "latent", "generator": seeded()} | more
    return pipe(prompts, num_inference_steps=steps, **given).images


def picture(n: int, seed: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=seeded(seed))


def test_rows_of_a_call_are_those_of_a_build(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with redi.record(pipe, tmp_path / "mine", plans=["coarse:3/8"], storage="float32") as recording:
        run(pipe)
    built = redi.build(
        pipe, PROMPTS, tmp_path / "built", plans=[redi.Plan.coarse(3, 8)], guidance=3.0, storage="float32"
    )
    mine = redi.KnowledgeBase.open(tmp_path / "mine")
    assert recording.rows == 2
    assert mine.config.to_json() == built.config.to_json()
    ours, theirs = mine.gather(torch.arange(2)), built.gather(torch.arange(2))
    assert list(ours.prompts) == list(theirs.prompts) == PROMPTS
    for entry, x in theirs.samples.items():
        assert torch.allclose(ours.samples[entry], x, atol=1e-5)
    assert torch.allclose(ours.embeddings, theirs.embeddings)


def drawing(patch: pytest.MonkeyPatch, module: str, noise: Tensor) -> None:
    """Let a pipeline draw this noise, after its generators have drawn theirs."""
    module = f"diffusers.pipelines.stable_diffusion.{module}"
    original = importlib.import_module(module).randn_tensor
    patch.setattr(f"{module}.randn_tensor", lambda *a, **k: (original(*a, **k), noise.clone())[1])


def test_the_pipeline_does_what_it_always_does_but_for_its_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, given = make("StableDiffusionImg2Img"), {"image": picture(2), "strength": 0.5}
    with redi.record(pipe, tmp_path, plans=["coarse:2/4"], storage="float32"):
        recorded = run(pipe, **given)
    noise = redi.KnowledgeBase.open(tmp_path).bank.noise(torch.zeros(2, dtype=torch.int64))
    drawing(monkeypatch, "pipeline_stable_diffusion_img2img", noise)
    assert torch.equal(run(pipe, **given), recorded)


@pytest.mark.parametrize(("strength", "plan"), [(1.0, "coarse:3/8"), (0.5, "coarse:2/4")])
def test_inpainting_blends_with_the_noise_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float, plan: str
) -> None:
    pipe, mask = make("StableDiffusionInpaint"), torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    given = {"image": picture(2), "mask_image": mask, "strength": strength, "height": 16, "width": 16}
    with redi.record(pipe, tmp_path, plans=[plan], storage="float32"):
        recorded = run(pipe, **given)
    noise = redi.KnowledgeBase.open(tmp_path).bank.noise(torch.zeros(2, dtype=torch.int64))
    drawing(monkeypatch, "pipeline_stable_diffusion_inpaint", noise)
    assert torch.equal(run(pipe, **given), recorded)


def test_a_recording_goes_on_and_takes_no_row_twice(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"], noises=2) as first:
        run(pipe)
        run(pipe)
    with redi.record(pipe, tmp_path) as second:  # its plans and its bank are known by now
        run(pipe, "a red fox")
        run(pipe, "two green apples")
        run(pipe, "two green apples", num_images_per_prompt=2)
    kb = redi.KnowledgeBase.open(tmp_path)
    assert (first.rows, second.rows, len(kb)) == (2, 2, 4)
    assert kb.bank.size == 2
    with pytest.raises(FingerprintMismatchError, match="plans"), redi.record(pipe, kb, plans=["coarse:4/8"]):
        pass


def test_pictures_are_part_of_a_rows_name(tmp_path: Path) -> None:
    pipe = make("StableDiffusionImg2Img")
    with redi.record(pipe, tmp_path, plans=["coarse:2/4"]) as recording:
        run(pipe, ["a red fox"], image=picture(1), strength=0.5)
        run(pipe, ["a red fox"], image=picture(1, seed=5), strength=0.5)
        run(pipe, ["a red fox"], image=picture(1), strength=0.5)  # the same again
        run(pipe, PROMPTS, image=torch.cat([picture(1), picture(1, seed=6)]), strength=0.5)  # and again, with another
    kb = redi.KnowledgeBase.open(tmp_path)
    assert recording.rows == len(kb) == 3
    assert len(set(kb.prompts)) == 3
    assert all(name.startswith(("a red fox [", "a blue car [")) for name in kb.prompts)


def test_embeddings_without_a_prompt_have_a_name_too(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]) as recording:
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_inference_steps=8,
            guidance_scale=3.0,
            output_type="latent",
        )
    assert recording.rows == 2
    assert len(set(redi.KnowledgeBase.open(tmp_path).prompts)) == 2


def test_latents_that_are_not_the_banks_give_no_row(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]) as recording:
        mixed = redi.NoiseBank(0, 1, (4, 8, 8)).noise(torch.zeros(2, dtype=torch.int64))
        mixed[1] = torch.randn(4, 8, 8, generator=seeded(9))
        run(pipe, latents=mixed)
    assert (recording.rows, recording.strangers) == (1, 1)


def test_an_interrupted_or_failed_call_gives_no_row(tmp_path: Path) -> None:
    pipe = tiny_pipeline()

    def interrupt(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("user code")

    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]) as recording:
        run(pipe, callback_on_step_end=interrupt)
        with pytest.raises(RuntimeError, match="user code"):
            run(pipe, callback_on_step_end=fail)
        assert recording.rows == 0
        run(pipe)
    assert recording.rows == 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"steps": 9}, PlanError, "fine steps are 9"),
        ({"eta": 0.5}, InvalidInputError, "eta"),
        ({"negative_prompt": ["ugly", "old"]}, InvalidInputError, "several negative prompts"),
        ({"timesteps": [900, 500, 100]}, InvalidInputError, "timesteps"),
    ],
)
def test_calls_that_could_not_be_served_are_refused_before_they_run(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    pipe, calls = tiny_pipeline(), list[int]()
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]), pytest.raises(error, match=words):
        run(pipe, **given)
    assert not calls


def test_calls_of_other_settings_are_refused(tmp_path: Path) -> None:
    pipe = make("StableDiffusionControlNet")
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]):
        run(pipe, image=picture(2))
        with pytest.raises(FingerprintMismatchError, match="guidance"):
            run(pipe, image=picture(2), guidance_scale=2.0)
        with pytest.raises(FingerprintMismatchError, match="controlnet_conditioning_scale"):
            run(pipe, image=picture(2), controlnet_conditioning_scale=0.5)
        with pytest.raises(InvalidInputError, match="control_guidance_end"):
            run(pipe, image=picture(2), control_guidance_end=0.5)


def test_another_control_network_is_another_model(tmp_path: Path) -> None:
    pipe = make("StableDiffusionControlNet")
    with redi.record(pipe, tmp_path, plans=["coarse:3/8"]):
        run(pipe, image=picture(2))
    with torch.no_grad():
        next(pipe.controlnet.parameters()).mul_(1.5)
    with pytest.raises(FingerprintMismatchError, match="weights"):
        redi.enable(pipe, redi.KnowledgeBase.open(tmp_path))


def test_what_cannot_be_recorded_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(InvalidInputError, match="plans="), redi.record(pipe, tmp_path):
        pass
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()
    with pytest.raises(UnsupportedSolverError, match="Ancestral"), redi.record(pipe, tmp_path, plans=["coarse:3/8"]):
        pass
    assert not (tmp_path / "config.json").exists()


def test_strength_decides_how_many_steps_a_served_call_has(tmp_path: Path) -> None:
    pipe = make("StableDiffusionImg2Img")
    given = {"image": picture(2), "strength": 0.5}
    with redi.record(pipe, tmp_path, plans=["coarse:2/4", "coarse:3/4"]):
        run(pipe, **given)
    redi.enable(pipe, redi.KnowledgeBase.open(tmp_path))
    for steps, nfe in ((4, 2), (6, 3)):
        run(pipe, steps=steps, **given)
        assert redi.report(pipe).nfe == nfe
    with pytest.raises(FingerprintMismatchError, match="num_inference_steps"):
        run(pipe, steps=2, **given)
    with pytest.raises(FingerprintMismatchError, match="strength"):
        run(pipe, steps=4, image=picture(2), strength=0.6)
    redi.disable(pipe)
