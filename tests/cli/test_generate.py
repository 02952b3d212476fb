"""`redi generate`: pictures, their report, and that it is the pipeline that `redi.enable` serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import redi as package
from redi.knowledge_base import KnowledgeBase
from tests.cli.conftest import Redi
from tests.tiny import saved, tiny_pipeline


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def test_pictures_and_report(redi: Redi, kb: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "pictures"
    done = redi(
        "generate", kb, "red apple", "Grüner Stern/../x", "red apple", "--out", out, "--json", tmp_path / "g.json"
    )
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "g.json").read_text())
    assert json.loads((out / "report.json").read_text()) == said
    assert [Path(p["file"]).name for p in said["pictures"]] == [
        "000-red-apple.png",
        "001-grüner-stern-x.png",
        "002-red-apple.png",
    ]
    assert sorted(p.name for p in out.glob("*.png")) == sorted(Path(p["file"]).name for p in said["pictures"])
    base = KnowledgeBase.open(kb)
    for picture in said["pictures"]:
        assert (picture["nfe"], picture["nfe_full"], picture["saved"], picture["leapt"]) == (3, 8, 5, True)
        assert len(picture["neighbors"]) == 7  # all rows of one noise
        for near in picture["neighbors"]:
            assert near["prompt"] == base.prompts[near["row"]]
            assert int(base.noise_ids[near["row"]]) == picture["noise_id"]
        assert pixels(Path(picture["file"])).shape == (16, 16, 3)
    assert said["saved"] == 15
    assert said["seconds"]["total"] > 0
    assert "3 model calls instead of 8" in done.out


def test_a_picture_is_the_enabled_pipelines_and_does_not_depend_on_its_batch(
    redi: Redi, kb: Path, model: Path, tmp_path: Path
) -> None:
    arguments = ("generate", kb, "red apple", "green heart", "dog", "--seed", "5", "--steps", "4", "--combiner", "nnls")
    assert redi(*arguments, "--out", tmp_path / "a", "--neighbors", "3").code == 0
    assert redi(*arguments, "--out", tmp_path / "b", "--neighbors", "3", "--batch-size", "1").code == 0
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    package.enable(pipe, KnowledgeBase.open(kb), combiner=package.NNLS(), neighbors=3)
    for i, prompt in enumerate(("red apple", "green heart", "dog")):
        expected = pipe(prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
        for folder in ("a", "b"):
            (file,) = (tmp_path / folder).glob(f"{i:03d}-*.png")
            given = pixels(file)
            # batches of other sizes round differently in the last float digit, so by one in 255
            assert np.abs(given - np.asarray(expected).astype(int)).max() <= 1


def test_seeds_give_other_noise(redi: Redi, kb: Path, tmp_path: Path) -> None:
    found = set()
    for seed in range(6):
        redi("generate", kb, "cat", "--out", tmp_path / "x", "--seed", seed)
        found.add(json.loads((tmp_path / "x" / "report.json").read_text())["pictures"][0]["noise_id"])
    assert found == {0, 1}


def test_plans_are_picked_by_steps_or_by_name(redi: Redi, kb: Path, tmp_path: Path) -> None:
    for options, plan, nfe in (
        ((), "coarse:3/8", 3),
        (("--steps", "4"), "coarse:4/8", 4),
        (("--plan", "coarse:4/8"), "coarse:4/8", 4),
    ):
        done = redi("generate", kb, "cat", "--out", tmp_path / "x", "--json", "-", *options)
        assert done.code == 0, done.err
        assert (done.json["plan"], done.json["nfe"]) == (plan, nfe)


def test_a_mismatch_is_an_error_or_the_plain_solver(redi: Redi, kb: Path, tmp_path: Path) -> None:
    arguments = ("generate", kb, "cat", "--out", tmp_path / "x", "--guidance", "2", "--json", "-")
    done = redi(*arguments)
    assert done.code == 2
    assert "guidance_scale: knowledge base has 7.5, given 2.0" in done.err
    assert not (tmp_path / "x").exists()
    done = redi(*arguments, "--on-mismatch", "plain")
    assert done.code == 0, done.err
    assert (done.json["saved"], done.json["pictures"][0]["leapt"], done.json["plan"]) == (0, False, "plain")
    assert "guidance_scale" in done.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", "5"), "3 (coarse:3/8), 4 (coarse:4/8)"),
        (("--plan", "coarse:7/8"), "rebuild it with --plan coarse:7/8"),
        (("--plan", "coarse:3/8,coarse:4/8"), "one plan"),
        (("--transport", "value"), "Defect transport"),
        (("--model", "/no/such/model"), "no folder /no/such/model"),
    ],
)
def test_what_cannot_be_generated(redi: Redi, kb: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    done = redi("generate", kb, "cat", "--out", tmp_path / "x", *options)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_another_model_is_refused(redi: Redi, kb: Path, tmp_path: Path) -> None:
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    done = redi("generate", kb, "cat", "--out", tmp_path / "x", "--model", tmp_path / "other")
    assert done.code == 2
    assert "weights" in done.err


def test_a_model_that_moved_is_asked_for(redi: Redi, model: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "here")
    assert redi("build", tmp_path / "here", prompts, tmp_path / "kb", "--plan", "coarse:2/3", "--limit", "1").code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    done = redi("generate", tmp_path / "kb", "cat", "--out", tmp_path / "x")
    assert done.code == 2
    assert "--model" in done.err
    assert redi("generate", tmp_path / "kb", "cat", "--out", tmp_path / "x", "--model", tmp_path / "there").code == 0


def test_a_jump_with_the_papers_transport(redi: Redi, model: Path, prompts: Path, tmp_path: Path) -> None:
    kb, x = tmp_path / "kb", tmp_path / "x"
    assert redi("build", model, prompts, kb, "--solver", "pndm", "--plan", "jump:2:6/8", "--noises", "2").code == 0
    for transport in ("value", "residual"):
        done = redi("generate", kb, "cat", "--out", x, "--transport", transport, "--json", "-", "--combiner", "nearest")
        assert done.code == 0, done.err
        assert (done.json["nfe_full"], done.json["saved"]) == (9, 4)
    done = redi("generate", kb, "cat", "--out", x, "--transport", "defect")
    assert (done.code, "PNDMScheduler" in done.err) == (2, True)


def test_the_shape_of_stable_diffusion(redi: Redi, prompts: Path, tmp_path: Path) -> None:
    kb, out = tmp_path / "kb", tmp_path / "x"
    done = redi("build", saved("sd15"), prompts, kb, "--plan", "coarse:2/4", "--limit", "2", "--batch-size", "2")
    assert done.code == 0, done.err
    done = redi("generate", kb, "red apple, noto style", "--out", out, "--json", "-")
    assert done.code == 0, done.err
    assert (done.json["nfe"], done.json["nfe_full"], done.json["pictures"][0]["leapt"]) == (2, 4, True)
    assert pixels(Path(done.json["pictures"][0]["file"])).shape == (512, 512, 3)
