"""redi inside an unmodified StableDiffusionPipeline: what it changes, what it saves, and that it leaves no trace."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

import redi
from redi.builder import build
from redi.errors import (
    FingerprintMismatchError,
    InvalidInputError,
    KnowledgeBaseError,
    NoiseError,
    PlanError,
    UnsupportedSolverError,
)
from redi.jump import JumpRun
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan
from redi.solvers import DiffusersSolver
from redi.transports import Residual, Transport, Value
from tests.tiny import tiny_pipeline, tiny_sd15

PROMPTS = ["a red fox", "a blue car", "two green apples", "an old house"]
GUIDANCE = 3.0
SCHEDULERS = {
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


def pipeline() -> Any:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: Any, name: str) -> Any:
    cls, overrides = (
        SCHEDULERS.get(name)
        or {"pndm": (PNDMScheduler, {"skip_prk_steps": True}), "heun": (HeunDiscreteScheduler, {})}[name]
    )
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **overrides)
    return pipe


def knowledge_base(pipe: Any, folder: Path, plan: str, *, noises: int = 2, **settings: Any) -> KnowledgeBase:
    settings = {"guidance": GUIDANCE, "batch_size": len(PROMPTS), "storage": "float32"} | settings
    return build(pipe, PROMPTS, folder, plans=[Plan.parse(p) for p in plan.split("+")], noises=noises, **settings)


def latents(pipe: Any, prompts: list[str] | str = PROMPTS, **kwargs: Any) -> Tensor:
    settings = {"guidance_scale": GUIDANCE, "output_type": "latent"} | kwargs
    return pipe(prompts, **settings).images


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = pipe.unet.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_rows_on_a_coarse_plan_give_the_fine_picture(tmp_path: Path, name: str) -> None:
    pipe = with_scheduler(pipeline(), name)
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    noise = kb.bank.noise(torch.zeros(4, dtype=torch.int64))
    fine = latents(pipe, latents=noise, num_inference_steps=12)
    redi.enable(pipe, kb, neighbors=1)
    with counted(pipe) as calls:
        leapt = latents(pipe, latents=noise, num_inference_steps=5)
    assert calls == [5]
    assert relative(leapt, fine) <= 1e-5
    assert redi.report(pipe).nfe == 5
    assert redi.report(pipe).nfe_full == 12


@pytest.mark.parametrize("transport", [Value(), Residual()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(("name", "calls"), [("pndm", 9), ("dpm", 8), ("heun", 15), ("euler", 8)])
def test_own_rows_on_a_jump_give_the_fine_picture(tmp_path: Path, name: str, calls: int, transport: Transport) -> None:
    pipe = with_scheduler(pipeline(), name)
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    noise = kb.bank.noise(torch.ones(4, dtype=torch.int64))
    fine = latents(pipe, latents=noise, num_inference_steps=12)
    redi.enable(pipe, kb, neighbors=1, transport=transport)
    with counted(pipe) as made:
        leapt = latents(pipe, latents=noise)  # the plan's own number of steps is the default
    assert made == [calls]
    assert redi.report(pipe).nfe == calls
    assert relative(leapt, fine) <= 1e-5


def test_own_rows_on_a_called_jump_give_the_fine_picture(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    noise = kb.bank.noise(torch.zeros(4, dtype=torch.int64))
    fine = latents(pipe, latents=noise, num_inference_steps=12)
    redi.enable(pipe, kb, neighbors=1)
    with counted(pipe) as made:
        leapt = latents(pipe, latents=noise)
    assert made == [9]
    assert relative(leapt, fine) <= 1e-5


def test_the_pipeline_and_our_own_loop_agree(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    ids = torch.tensor([0, 1])
    noise = kb.bank.noise(ids)
    redi.enable(pipe, kb, neighbors=3)
    inside = latents(pipe, ["a red car", "an old fox"], latents=noise)
    redi.disable(pipe)
    embeds, negative = pipe.encode_prompt(["a red car", "an old fox"], "cpu", 1, True)

    def denoise(x: Tensor, t: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(c)).sample
        without, with_prompt = both.chunk(2)
        return without + GUIDANCE * (with_prompt - without)

    (engine,) = redi.ReDiEngine.serving(kb, "coarse:5/12", neighbors=3)
    outside, _ = engine.sample(denoise, noise, condition=(negative, embeds), noise_ids=ids)
    assert relative(inside, outside) <= 1e-6


def test_latents_from_elsewhere_get_the_plain_solver(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "unipc")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    strange = torch.randn(4, *kb.bank.shape, generator=torch.Generator().manual_seed(5))
    redi.enable(pipe, kb)
    out = latents(pipe, latents=strange)
    report = redi.report(pipe)
    assert not any(report.leapt)
    assert report.noise_ids == (-1,) * 4
    assert "not from the noise bank" in str(report)
    assert torch.isfinite(out).all()


def test_a_jump_that_misses_is_the_full_run(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "pndm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    mixed = kb.bank.noise(torch.zeros(4, dtype=torch.int64))
    mixed[2] = torch.randn(kb.bank.shape, generator=torch.Generator().manual_seed(5))
    fine = latents(pipe, latents=mixed, num_inference_steps=12)
    redi.enable(pipe, kb)
    with counted(pipe) as calls:
        out = latents(pipe, latents=mixed)
    assert calls == [13]  # PLMS calls one entry twice
    assert redi.report(pipe).leapt == (True, True, False, True)
    assert torch.equal(out[2], fine[2])


def test_disable_restores_the_pipeline_bit_for_bit(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12+jump:3:7/12")
    scheduler, cls, names, config = pipe.scheduler, type(pipe), set(vars(pipe)), dict(pipe.config)
    inner = copy.deepcopy(vars(pipe.scheduler))

    def run() -> Tensor:
        return latents(pipe, num_inference_steps=6, generator=torch.Generator().manual_seed(1))

    before = run()
    redi.enable(pipe, kb)
    assert not torch.equal(latents(pipe, num_inference_steps=5), before)
    redi.disable(pipe)
    assert pipe.scheduler is scheduler
    assert type(pipe) is cls
    assert set(vars(pipe)) - {"_num_timesteps"} == names - {"_num_timesteps"} | {
        n for n in vars(pipe) if n.startswith(("_guidance", "_clip", "_cross", "_interrupt"))
    }
    assert dict(pipe.config) == config
    assert set(vars(scheduler)) == set(inner)
    assert torch.equal(run(), before)
    redi.disable(pipe)  # nothing to do is no error


def test_a_hundred_times_on_and_off_leaks_nothing(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    seen = []
    for _ in range(100):
        redi.enable(pipe, kb)
        seen.append(weakref.ref(pipe.scheduler))
        redi.disable(pipe)
    gc.collect()
    assert not any(ref() for ref in seen)


def test_enabling_twice_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    with pytest.raises(InvalidInputError, match=r"redi\.disable"):
        redi.enable(pipe, kb)


def test_signatures_stay_what_pipelines_inspect(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "ddim")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    step, steps, call = (
        inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps, pipe.__call__)
    )
    redi.enable(pipe, kb)
    assert inspect.signature(pipe.scheduler.step) == step
    assert inspect.signature(pipe.scheduler.set_timesteps) == steps
    assert inspect.signature(pipe.__call__) == call
    assert isinstance(pipe, StableDiffusionPipeline)


def test_only_the_loop_is_steered(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    redi.enable(pipe, kb, transport=Value())
    seen: list[int] = []

    def look(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        times = list(pipe.scheduler.timesteps)
        assert len(times) == 12  # another library sees an ordinary, finite tensor
        seen.append(times.index(t))
        return tensors

    latents(pipe, callback_on_step_end=look)
    assert seen == [0, 1, 2, 7, 8, 9, 10, 11]


def test_seeds(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", noises=6)
    redi.enable(pipe, kb)

    def draw(generator: Any = None, **kwargs: Any) -> tuple[tuple[int, ...], Tensor]:
        out = latents(pipe, "a red fox", generator=generator, num_inference_steps=5, **kwargs)
        return redi.report(pipe).noise_ids, out

    def seeded(n: int) -> torch.Generator:
        return torch.Generator().manual_seed(n)

    assert torch.equal(draw(seeded(1))[1], draw(seeded(1))[1])
    assert torch.equal(draw()[1], draw()[1])
    assert len({draw(seeded(n))[0] for n in range(12)}) > 2
    ids, _ = draw(seeded(3), num_images_per_prompt=6)
    assert sorted(ids) == list(range(6))
    ids, _ = draw([seeded(n) for n in range(4)], num_images_per_prompt=4)
    assert len(set(ids)) == 4
    with pytest.raises(NoiseError, match="6"):
        draw(seeded(3), num_images_per_prompt=7)
    g = seeded(1)
    first = draw(g)
    second = draw(g)  # a generator that was drawn from goes on
    assert first[0] != second[0] or not torch.equal(first[1], second[1]) or len(set(kb.noise_ids.tolist())) == 1


def test_every_seed_has_its_own_picture_where_the_bank_is_diverse(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", noises=1, diversity=0.3)
    redi.enable(pipe, kb)
    outs = [
        latents(pipe, "a red fox", num_inference_steps=5, generator=torch.Generator().manual_seed(n)) for n in range(3)
    ]
    assert all(redi.report(pipe).leapt)
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    many = latents(pipe, "a red fox", num_inference_steps=5, num_images_per_prompt=3)
    assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale"),
        ({"num_inference_steps": 7}, "num_inference_steps"),
        ({"negative_prompt": ["ugly"] * 4}, "negative_prompt"),
        ({"eta": 0.5}, "eta"),
        ({"timesteps": [900, 500, 100]}, "timesteps"),
        ({"guidance_rescale": 0.5}, "guidance_rescale"),
    ],
)
def test_other_settings_are_refused_or_served_plainly(tmp_path: Path, call: dict[str, Any], field: str) -> None:
    pipe = with_scheduler(pipeline(), "ddim")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    with pytest.raises(FingerprintMismatchError, match=field) as refused:
        latents(pipe, **call)
    assert set(refused.value.differences) == {field}
    redi.disable(pipe)
    if field == "timesteps":
        return  # DDIM takes none
    redi.enable(pipe, kb, on_mismatch="plain")
    call = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(4)} | call
    served = latents(pipe, **call)
    assert field in str(redi.report(pipe))
    redi.disable(pipe)
    call["generator"] = torch.Generator().manual_seed(4)
    assert torch.equal(served, latents(pipe, **call))


def test_the_guidance_of_the_knowledge_base_is_the_default(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", guidance=2.0)
    redi.enable(pipe, kb)
    pipe("a red fox", output_type="latent")
    assert redi.report(pipe).nfe == 5
    assert pipe.guidance_scale == 2.0


def test_a_negative_prompt_of_the_knowledge_base_is_served(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", negative_prompt="ugly")
    noise = kb.bank.noise(torch.zeros(4, dtype=torch.int64))
    fine = latents(pipe, latents=noise, num_inference_steps=12, negative_prompt=["ugly"] * 4)
    redi.enable(pipe, kb, neighbors=1)
    assert relative(latents(pipe, latents=noise, negative_prompt=["ugly"] * 4), fine) <= 1e-5
    with pytest.raises(FingerprintMismatchError, match="negative_prompt"):
        latents(pipe, latents=noise)


def test_another_model_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.5)
    with pytest.raises(FingerprintMismatchError, match="weights"):
        redi.enable(pipe, kb)


def test_another_precision_or_training_schedule_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(FingerprintMismatchError, match="dtype"):
        redi.enable(pipe, kb)
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(FingerprintMismatchError, match="beta_end"):
        redi.enable(pipe, kb)


def test_stochastic_schedulers_are_refused_by_name(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedSolverError, match="EulerAncestralDiscreteScheduler"):
        knowledge_base(pipe, tmp_path, "coarse:5/12")


def test_several_plans_are_served_by_their_steps(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:4/12+coarse:6/12+jump:3:7/12")
    redi.enable(pipe, kb)
    for steps, nfe in ((4, 4), (6, 6), (12, 9)):
        latents(pipe, "a red fox", num_inference_steps=steps)
        assert redi.report(pipe).nfe == nfe
    with pytest.raises(FingerprintMismatchError, match=r"4 \(coarse:4/12\)"):
        latents(pipe, "a red fox", num_inference_steps=5)


@pytest.mark.parametrize("plan", ["coarse:5/12", "jump:3:7/12"])
def test_an_enabled_pipeline_saves_as_itself(tmp_path: Path, plan: str) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path / "kb", plan)
    redi.enable(pipe, kb)
    latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    redi.disable(pipe)
    g = torch.Generator().manual_seed
    assert torch.equal(
        latents(loaded, num_inference_steps=4, generator=g(1)), latents(pipe, num_inference_steps=4, generator=g(1))
    )


def test_a_scheduler_that_was_set_meanwhile_is_saved(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    redi.enable(pipe, knowledge_base(pipe, tmp_path / "kb", "coarse:5/12"))
    with_scheduler(pipe, "euler")
    pipe.save_pretrained(tmp_path / "saved")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(loaded.scheduler) is type(pipe.scheduler) is EulerDiscreteScheduler


def test_an_error_in_the_call_leaves_the_pipeline_usable(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("user code")

    before = latents(pipe, "a red fox")
    with pytest.raises(RuntimeError, match="user code"):
        latents(pipe, "a red fox", callback_on_step_end=fail)
    assert torch.equal(latents(pipe, "a red fox"), before)


@pytest.mark.parametrize("plan", ["coarse:5/12", "jump:3:7/12"])
def test_the_prompt_can_change_after_the_leap(tmp_path: Path, plan: str) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, plan)
    redi.enable(pipe, kb, transport=None if plan.startswith("coarse") else Value())
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    plain = latents(pipe, "a red fox")
    contents = len(seen)
    styled = latents(
        pipe,
        "a red fox",
        callback_on_step_end=redi.switch_prompt(pipe, "a red fox, noto style"),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    hook.remove()
    second = seen[contents:]
    leap_at = 1 if plan.startswith("coarse") else 3
    assert all(torch.equal(e, seen[0]) for e in second[:leap_at])
    assert all(not torch.equal(e, seen[0]) for e in second[leap_at:])
    assert not torch.equal(styled, plain)


def test_prompt_embeddings_as_key(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    redi.enable(pipe, kb, transport=Value(), key="prompt", neighbors=1)
    latents(pipe, PROMPTS)
    report = redi.report(pipe)
    assert [kb.prompts[ids[0]] for ids in report.neighbors] == PROMPTS
    assert max(d[0] for d in report.distances) <= 1e-3


def test_a_stable_diffusion_shaped_pipeline_builds_saves_loads_and_leaps(tmp_path: Path) -> None:
    pipe = tiny_sd15()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    kb = build(
        pipe,
        PROMPTS[:2],
        tmp_path / "kb",
        plans=[Plan.parse("coarse:4/10")],
        guidance=7.5,
        batch_size=2,
        storage="float32",
    )
    assert tuple(kb.bank.shape) == (4, 64, 64)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    noise = kb.bank.noise(torch.zeros(2, dtype=torch.int64))
    fine = again(PROMPTS[:2], latents=noise, num_inference_steps=10, guidance_scale=7.5, output_type="latent").images
    redi.enable(again, KnowledgeBase.open(tmp_path / "kb"), neighbors=1)
    leapt = again(PROMPTS[:2], latents=noise, num_inference_steps=4, output_type="latent").images
    assert relative(leapt, fine) <= 1e-5
    assert redi.report(again).nfe == 4


def test_pictures_come_out(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    image = pipe("a red fox", num_inference_steps=5).images[0]
    assert image.size == (kb.fingerprint.width, kb.fingerprint.height)
    text = str(redi.report(pipe))
    assert "5 per picture instead of 12" in text


@pytest.mark.parametrize("cls", [PNDMScheduler, LMSDiscreteScheduler, DEISMultistepScheduler])
def test_a_jump_in_half_precision_carries_its_history(tmp_path: Path, cls: Any) -> None:
    pipe = pipeline()
    pipe.scheduler = cls.from_config(
        pipe.scheduler.config, **({"skip_prk_steps": True} if cls is PNDMScheduler else {})
    )
    pipe = pipe.to(torch.bfloat16)
    kb = knowledge_base(pipe, tmp_path, "jump:4:8/12")
    noise = kb.bank.noise(torch.zeros(4, dtype=torch.int64)).to(torch.bfloat16)
    fine = latents(pipe, latents=noise, num_inference_steps=12)
    redi.enable(pipe, kb, neighbors=1, transport=Value())
    leapt = latents(pipe, latents=noise)
    assert leapt.dtype == torch.bfloat16
    assert relative(leapt.float(), fine.float()) <= 1e-2


@pytest.mark.parametrize("scheduler", ["unipc", "dpm"])
def test_a_plain_call_between_leaping_ones_is_plain(tmp_path: Path, scheduler: str) -> None:
    pipe = with_scheduler(pipeline(), scheduler)
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")

    def run(**settings: Any) -> Tensor:
        settings = {"output_type": "latent", "generator": torch.Generator().manual_seed(1)} | settings
        return pipe("a red fox", **settings).images

    others = [
        {"num_inference_steps": 7},
        {"guidance_scale": 5.0, "num_inference_steps": 5},
        {"negative_prompt": "ugly"},
    ]
    plain = [run(**other) for other in others]  # of the last, steps and guidance are the pipeline's to choose
    redi.enable(pipe, kb, on_mismatch="plain")
    leapt = run(num_inference_steps=5, guidance_scale=GUIDANCE)
    for other, expected in zip(others, plain, strict=True):
        assert torch.equal(run(**other), expected)
        assert torch.equal(run(num_inference_steps=5, guidance_scale=GUIDANCE), leapt)


def test_a_plain_call_that_fails_says_why(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(with_scheduler(pipe, "dpm"), tmp_path, "coarse:5/12")
    with_scheduler(pipe, "pndm")  # which has no timesteps yet
    redi.enable(pipe, kb, on_mismatch="plain")
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipe(None, num_inference_steps=4)


def test_a_scheduler_without_a_copy_is_named_where_one_is_needed(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    pipe.scheduler.lock = threading.Lock()
    with pytest.raises(InvalidInputError, match=r"cannot pickle '_thread.lock' object.*on_mismatch='error'"):
        redi.enable(pipe, kb, on_mismatch="plain")
    redi.enable(pipe, kb)


def test_an_interrupted_jump_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    redi.enable(pipe, kb, transport=Value())
    left = 50

    def interrupt(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True  # as diffusers documents it
        return tensors

    def bounded(entries: Iterator[int]) -> Iterator[int]:
        nonlocal left
        for entry in entries:
            left -= 1
            assert left > 0
            yield entry

    follow = JumpRun.follow
    monkeypatch.setattr(JumpRun, "follow", lambda run: bounded(follow(run)))
    latents(pipe, callback_on_step_end=interrupt)
    assert redi.report(pipe).nfe == 1


def test_a_copied_pipeline_is_enabled_and_apart(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    before = latents(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(latents(twin), before)
    redi.disable(twin)
    assert torch.equal(latents(pipe), before)


def test_a_scheduler_is_not_copied_out_of_an_enabled_pipeline(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    with pytest.raises(InvalidInputError, match=r"redi\.disable"):
        copy.deepcopy(pipe.scheduler)
    redi.disable(pipe)
    copy.deepcopy(pipe.scheduler)


def test_a_pipeline_that_copies_its_scheduler_is_refused_before_it_runs(tmp_path: Path) -> None:
    class Twice(StableDiffusionPipeline):  # as LTX-2 does, for picture and sound
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            copy.deepcopy(self.scheduler)
            return super().encode_prompt(*args, **kwargs)

    parts = pipeline().components
    pipe = Twice(**parts, requires_safety_checker=False)
    with counted(pipe) as calls, pytest.raises(InvalidInputError, match="copies its scheduler"):
        knowledge_base(pipe, tmp_path, "coarse:5/12")
    assert calls == [0]


def test_a_scheduler_set_while_enabled_is_refused_and_kept(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    pipe.scheduler = mine = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InvalidInputError, match=r"redi\.disable"):
        latents(pipe)
    redi.disable(pipe)
    assert pipe.scheduler is mine


def test_a_precision_changed_while_enabled_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    pipe.to(torch.bfloat16)
    with pytest.raises(FingerprintMismatchError, match="dtype"):
        latents(pipe)


def test_latents_of_another_shape_are_refused_or_served_plainly(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    wide = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    redi.enable(pipe, kb)
    with pytest.raises(FingerprintMismatchError, match="latents"):
        latents(pipe, latents=wide)
    redi.disable(pipe)
    redi.enable(pipe, kb, on_mismatch="plain")
    assert latents(pipe, latents=wide).shape == wide.shape


def test_no_size_is_the_size_of_the_knowledge_base(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", height=24, width=32)
    redi.enable(pipe, kb)
    assert latents(pipe, height=None, width=None).shape == (4, 4, 12, 16)


def test_a_prompt_given_twice_gets_two_pictures(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12", noises=3)
    redi.enable(pipe, kb)
    latents(pipe, ["a red fox", "an old house", "a red fox", "a red fox"])
    first, other, second, third = redi.report(pipe).noise_ids
    assert len({first, second, third}) == 3
    latents(pipe, "an old house")
    assert redi.report(pipe).noise_ids == (other,)


def test_the_solver_may_be_chosen_and_a_jump_has_that_of_its_rows(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    rows = DiffusersSolver.from_config(kb.fingerprint.scheduler, kb.fingerprint.scheduler_config)
    made = {}
    for name, solver in {"usual": None, "of the rows": rows}.items():
        redi.enable(pipe, kb, solver=solver, neighbors=3)
        made[name] = latents(pipe, ["a red car", "an old fox"], num_inference_steps=5)
        assert redi.report(pipe).solver == type(pipe.scheduler).__name__
        assert redi.report(pipe).solver == ("DEISMultistepScheduler" if solver is None else rows.name)
        redi.disable(pipe)
    assert not torch.equal(made["usual"], made["of the rows"])
    jump = knowledge_base(pipe, tmp_path / "jump", "jump:4:8/12")
    assert [e.solver.identity() for e in redi.ReDiEngine.serving(jump)] == [rows.identity()]


def test_every_plan_has_the_solver_that_suits_it(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    stock = pipe.scheduler
    kb = knowledge_base(pipe, tmp_path, "coarse:4/18+coarse:16/18+jump:4:8/18")
    alone = {}
    for engine in redi.ReDiEngine.serving(kb):
        redi.enable(pipe, kb, plan=engine.plan)
        alone[engine.plan.steps] = latents(pipe, num_inference_steps=engine.plan.steps)
        redi.disable(pipe)
    redi.enable(pipe, kb)
    solvers = {}
    for steps in (16, 4, 18, 16):
        assert torch.equal(latents(pipe, num_inference_steps=steps), alone[steps])
        said = redi.report(pipe)
        assert said.plan.partition(":")[0] == ("jump" if steps == 18 else "coarse")
        solvers[steps] = (said.solver, pipe.scheduler.config.solver_order)
    assert solvers[4] == ("DEISMultistepScheduler", 2)
    assert solvers[16] == ("DPMSolverMultistepScheduler", 3)
    assert solvers[18] == ("DPMSolverMultistepScheduler", stock.config.solver_order)
    copied = copy.deepcopy(pipe)
    assert torch.equal(latents(copied, num_inference_steps=4), alone[4])
    redi.disable(pipe)
    assert pipe.scheduler is stock


def test_of_plans_with_equal_steps_the_first_is_served(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12+jump:3:9/12")
    redi.enable(pipe, kb, transport=Value())
    latents(pipe)
    assert redi.report(pipe).plan == "jump:3:7/12"


def test_the_prompt_changes_after_a_missed_leap_too(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path, "jump:3:7/12")
    redi.enable(pipe, kb, transport=Value())
    strange = torch.randn(4, *kb.bank.shape, generator=torch.Generator().manual_seed(5))
    plain = latents(pipe, latents=strange)
    styled = latents(
        pipe,
        latents=strange,
        callback_on_step_end=redi.switch_prompt(pipe, "noto style"),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert not any(redi.report(pipe).leapt)
    assert not torch.equal(styled, plain)


def test_a_compiled_network_is_the_same_network(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    pipe.unet = torch.compile(pipe.unet, backend="eager")  # compiled at its first call, which this test does without
    redi.enable(pipe, kb)


def test_enable_refuses_what_could_not_be_served(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:6/12")
    with pytest.raises(KnowledgeBaseError, match="rebuild it with --plan coarse:5/12"):
        redi.enable(pipe, kb, plan="coarse:5/12")
    with pytest.raises(PlanError, match="solved in 12"):
        redi.enable(pipe, kb, plan="coarse:3/6")
    redi.enable(pipe, kb)  # nothing was left behind


def test_a_failed_call_leaves_no_report(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = knowledge_base(pipe, tmp_path, "coarse:5/12")
    redi.enable(pipe, kb)
    latents(pipe)
    with pytest.raises(FingerprintMismatchError):
        latents(pipe, guidance_scale=9.0)
    with pytest.raises(InvalidInputError, match="no call has ended well"):
        redi.report(pipe)


def test_a_report_says_what_a_maintainer_asks_for(tmp_path: Path) -> None:
    pipe = with_scheduler(pipeline(), "dpm")
    kb = knowledge_base(pipe, tmp_path / "mine", "coarse:5/12")
    redi.enable(pipe, kb, neighbors=3, on_mismatch="plain")
    latents(pipe, ["a red car", "an old fox"], num_inference_steps=5)
    said = str(redi.report(pipe)).splitlines()
    assert [line[:12].rstrip() for line in said] == [
        *("redi", "pipeline", "rows", "of model", "served by", "plan", "model calls", "leapt", "noise ids"),
        *("picture 0", "picture 1", "distance", "cost", "time"),
    ]
    text = "\n".join(said)
    for wanted in (
        f"{redi.__version__} (",
        f"torch {torch.__version__}",
        "diffusers ",
        "StableDiffusionPipeline on cpu in float32",
        f"{tmp_path / 'mine'} (manifest {kb.manifest_hash[:12]})",
        f"weights {kb.fingerprint.weights[:12]}",
        "DPMSolverMultistepScheduler, guidance 3",
        "3 neighbours of denoised keys",
        "Kriging(nugget=0.1)",
        "DEISMultistepScheduler",
        "5 per picture instead of 12 (7 saved)",
        f"{12 * len(kb)} model calls to build the knowledge base, paid for after {-(-12 * len(kb) // 7)} pictures",
    ):
        assert wanted in text, wanted
    latents(pipe, num_inference_steps=7)
    plain = str(redi.report(pipe))
    assert "7 per picture, none saved" in plain
    assert "num_inference_steps differ" in plain
    assert kb.manifest_hash[:12] in plain
