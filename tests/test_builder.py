"""Building a knowledge base from a pipeline: what is recorded, when a run stops, and that a build goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor

import redi
from redi.builder import Progress, build
from redi.errors import FingerprintMismatchError, InvalidInputError
from redi.plan import Plan
from redi.recorder import trajectory
from redi.solvers import DiffusersSolver
from redi.types import Record
from tests.tiny import tiny_pipeline

PROMPTS = ["a red fox", "a blue car", "two green apples"]


def pipeline() -> Any:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, folder: Path, plans: str = "coarse:4/10", **settings: Any) -> redi.KnowledgeBase:
    settings = {"prompts": PROMPTS, "guidance": 2.0, "batch_size": 3, "storage": "float32"} | settings
    return build(pipe, folder=folder, plans=[Plan.parse(p) for p in plans.split("+")], **settings)


def test_rows_are_the_pipelines_own_trajectory(tmp_path: Path) -> None:
    pipe = pipeline()
    kb = run(pipe, tmp_path)
    rows = kb.gather(torch.arange(3))
    walked: list[Tensor] = [kb.bank.noise(torch.zeros(3, dtype=torch.int64))]

    def keep(_pipe: Any, _i: int, _t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        walked.append(tensors["latents"].clone())
        return {}

    pipe(
        list(rows.prompts),
        latents=walked[0],
        num_inference_steps=10,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=keep,
    )
    assert sorted(rows.samples) == [0, 2, 5, 8, 10]
    for entry, x in rows.samples.items():
        assert torch.equal(x, walked[entry])
    assert sorted(rows.denoised) == [0, 2, 5, 8]


def test_a_run_stops_after_the_last_entry_needed(tmp_path: Path) -> None:
    pipe = pipeline()
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    kb = run(pipe, tmp_path, "jump:3:6/10")
    assert len(calls) <= 7  # six steps, and PLMS's second call of the first
    assert max(kb.record.samples) <= 7


def test_one_build_serves_the_union_of_its_plans(tmp_path: Path) -> None:
    kb = run(pipeline(), tmp_path, "coarse:4/10+coarse:5/10")
    assert kb.record.samples == {0, 2, 4, 5, 6, 8, 10}
    assert kb.config.plans == ("coarse:4/10", "coarse:5/10")


def test_a_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pipe = pipeline()

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(progress: Progress) -> None:
        if progress.done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run(pipe, tmp_path, noises=3, batch_size=2, progress=stop)
    seen: list[Progress] = []
    kb = run(pipe, tmp_path, noises=3, batch_size=2, progress=seen.append)
    assert seen[-1].done == seen[-1].total == 9
    assert [p.done for p in seen] == [4, 6, 8, 9]
    assert len(kb) == 9
    assert sorted(zip(kb.prompts, kb.noise_ids.tolist(), strict=True)) == sorted(
        (p, n) for p in PROMPTS for n in range(3)
    )
    assert run(pipe, tmp_path, noises=3).manifest_hash == kb.manifest_hash  # nothing left to do


def test_new_prompts_extend_a_knowledge_base(tmp_path: Path) -> None:
    pipe = pipeline()
    run(pipe, tmp_path)
    kb = run(pipe, tmp_path, prompts=[*PROMPTS, "an old house"])
    assert len(kb) == 4


def test_more_noises_extend_a_knowledge_base(tmp_path: Path) -> None:
    pipe = pipeline()
    before = run(pipe, tmp_path / "grown")
    seen: list[Progress] = []
    grown = run(pipe, tmp_path / "grown", noises=3, progress=seen.append)
    assert (seen[0].done, seen[-1].done, len(grown)) == (3, 9, 9)
    assert grown.manifest.shards[: len(before.manifest.shards)] == before.manifest.shards
    assert grown.bank.size == 3
    at_once = run(pipe, tmp_path / "at once", noises=3)
    a, b = (
        {(p, n): x for p, n, x in zip(kb.prompts, kb.noise_ids.tolist(), last, strict=True)}
        for kb in (grown, at_once)
        for last in [kb.gather(torch.arange(9)).samples[kb.record.last]]
    )
    assert a.keys() == b.keys()
    for key, x in a.items():
        torch.testing.assert_close(x, b[key], rtol=1e-3, atol=1e-3)  # float16, and kernels that differ by batch size


def test_other_settings_do_not_extend_it(tmp_path: Path) -> None:
    pipe = pipeline()
    run(pipe, tmp_path)
    with pytest.raises(FingerprintMismatchError, match="guidance"):
        run(pipe, tmp_path, guidance=5.0)


def test_rows_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    one = run(pipeline(), tmp_path / "one", batch_size=1, noises=2)
    all_ = run(pipeline(), tmp_path / "all", batch_size=6, noises=2)
    a, b = one.gather(torch.arange(6)), all_.gather(torch.arange(6))
    assert a.prompts == b.prompts
    for entry, x in a.samples.items():
        torch.testing.assert_close(x, b.samples[entry], rtol=1e-4, atol=1e-5)  # float32 kernels differ by batch size


def test_trajectories_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    pipe = pipeline()
    forward = pipe.unet.forward

    def broken(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(sample, *args, **kwargs)
        out[0][1] = torch.nan
        return out

    pipe.unet.forward = broken
    seen: list[Progress] = []
    kb = run(pipe, tmp_path, guidance=1.0, progress=seen.append)
    assert [(r.prompt, r.noise_id) for r in seen[-1].refused] == [(PROMPTS[1], 0)]
    assert "not finite" in seen[-1].refused[0].reason
    assert list(kb.prompts) == [PROMPTS[0], PROMPTS[2]]


def test_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = pipeline()
    scheduler, cls = pipe.scheduler, type(pipe)
    run(pipe, tmp_path)
    assert pipe.scheduler is scheduler
    assert type(pipe) is cls
    assert "prepare_latents" not in vars(pipe)


def test_nothing_to_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="prompt"):
        run(pipeline(), tmp_path, prompts=[])
    with pytest.raises(InvalidInputError, match="fine steps"):
        run(pipeline(), tmp_path, "coarse:4/10+coarse:4/12")
    with pytest.raises(InvalidInputError, match="list of prompts"):
        run(pipeline(), tmp_path, prompts="a red fox")
    with pytest.raises(InvalidInputError, match="batch_size"):
        run(pipeline(), tmp_path, batch_size=-1)
    with pytest.raises(InvalidInputError, match="multiples of 8"):
        run(pipeline(), tmp_path, height=20)
    with pytest.raises(InvalidInputError, match=r"redi\.record"):
        run(StableDiffusionImg2ImgPipeline(**pipeline().components, requires_safety_checker=False), tmp_path / "kb")
    assert not (tmp_path / "kb").exists()


def test_our_own_loop_records_what_it_walks() -> None:
    solver = DiffusersSolver.from_config("EulerDiscreteScheduler", {})
    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    calls = 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x)

    record = Record(frozenset({0, 3}), frozenset({1}))
    x, rows = trajectory(
        denoise, noise, solver, 8, record, noise_ids=torch.zeros(2, dtype=torch.int64), prompts=["a", "b"]
    )
    assert calls == 3
    assert torch.equal(rows.samples[3], x)
    assert torch.equal(rows.samples[0], noise * solver.schedule(8).initial_scale)
