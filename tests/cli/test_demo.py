"""The demo in miniature: its race on a tiny pipeline, its sheet, and the whole command on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from PIL import Image

from redi.cli.sheet import Row, draw
from redi.demo import race
from redi.errors import InvalidInputError
from redi.knowledge_base import KnowledgeBase
from redi.metrics import frechet_distance, latent_error
from redi.plan import Plan
from tests.cli.conftest import Redi

QUERIES = [f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog", "heart", "apple")]


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    found = StableDiffusionPipeline.from_pretrained(model)
    found.set_progress_bar_config(disable=True)
    return found


def plain(pipe: Any, prompts: list[str], steps: int, noise: torch.Tensor) -> torch.Tensor:
    return pipe(
        prompts,
        latents=noise.repeat(len(prompts), 1, 1, 1),
        num_inference_steps=steps,
        guidance_scale=7.5,
        output_type="latent",
    ).images


def test_the_race_is_what_the_pipelines_themselves_make(pipe: Any, kb: Path) -> None:
    base, config = KnowledgeBase.open(kb), dict(pipe.scheduler.config)
    before = pipe.scheduler
    dpm, unipc = (c.from_config(pipe.scheduler.config) for c in (DPMSolverMultistepScheduler, UniPCMultistepScheduler))
    calls: list[tuple[int, int]] = []
    found = race(
        pipe,
        base,
        QUERIES,
        {"DPM": dpm, "UniPC": unipc},
        fine=dpm,
        plan=Plan.coarse(4, 8),
        batch_size=6,
        progress=lambda *now: calls.append(now),
    )
    assert calls == [(i, 8) for i in range(1, 9)]  # four ways, two batches
    assert pipe.scheduler is before
    assert dict(pipe.scheduler.config) == config
    assert (found.fine.nfe, found.redi.nfe, [c.nfe for c in found.plain]) == (8, 4, [4, 4])
    assert (found.batches, found.batch_size, found.directions) == (2, 6, 6)
    assert len(found.neighbors) == len(QUERIES)
    noise = base.bank.noise(torch.tensor([0]))
    pipe.scheduler = dpm
    fine = plain(pipe, QUERIES, 8, noise)
    pipe.scheduler = unipc
    coarse = plain(pipe, QUERIES, 4, noise)
    pipe.scheduler = before
    by_name = {c.name: c for c in found.plain}
    torch.testing.assert_close(found.fine.latents, fine, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by_name["UniPC"].latents, coarse, rtol=1e-3, atol=1e-3)
    error = latent_error(coarse, fine)
    assert by_name["UniPC"].latent_error == pytest.approx(error, rel=1e-3)
    assert sum(by_name["UniPC"].errors) / len(QUERIES) == pytest.approx(error, rel=1e-3)
    distance = frechet_distance(coarse.flatten(1), fine.flatten(1), directions=6)
    assert by_name["UniPC"].frechet == pytest.approx(distance, rel=1e-2)
    assert [c.frechet for c in found.plain] == sorted(c.frechet for c in found.plain)
    assert (found.fine.frechet, found.fine.latent_error) == (pytest.approx(0, abs=1e-6), 0)


@pytest.mark.parametrize("count", [2, 7])
def test_the_race_wants_whole_batches(pipe: Any, kb: Path, count: int) -> None:
    with pytest.raises(InvalidInputError, match="whole batches of 6"):
        race(
            pipe,
            KnowledgeBase.open(kb),
            QUERIES[:count],
            {},
            fine=DDIMScheduler(),
            plan=Plan.coarse(4, 8),
            batch_size=6,
        )


def test_the_sheet_shows_every_pixel_where_it_belongs() -> None:
    pictures = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    rows = [
        Row("Fine é ×", ["a line"], pictures),
        Row("redi", ["one", "two"], 1 - pictures, ["x", "y", "z"], marked=True),
    ]
    sheet = draw("Title", "sub", ["a long caption of many words", "b", "unbreakable" * 9], rows, "foot", side=32)
    whole = np.asarray(sheet)
    for row in rows:
        for picture in row.pictures:
            big = np.kron((picture * 255).round().permute(1, 2, 0).numpy(), np.ones((4, 4, 1))).astype(np.uint8)
            corners = np.argwhere((whole == big[0, 0]).all(-1))
            found = [(y, x) for y, x in corners if np.array_equal(whole[y : y + 32, x : x + 24], big)]
            assert len(found) == 1


def test_the_whole_demo(redi: Redi, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    options = ("--out", out, "--rows", "64", "--prompts", "16", "--steps", "6", "--fine", "24")
    done = redi("demo", *options, "--json", tmp_path / "d.json")
    assert done.code == 0, done.err
    said = json.loads((out / "report.json").read_text())
    assert json.loads((tmp_path / "d.json").read_text()) == said
    assert (said["rows"], said["prompts"], said["nfe_full"], said["nfe_redi"], said["nfe_plain"]) == (64, 16, 24, 6, 6)
    assert said["plan"] == str(Plan.placed(6, 24, guidance=3.0, halved=True))
    assert said["speedup"] == pytest.approx(said["seconds_full"] / said["seconds_redi"])
    assert len(said["plain_solvers"]) >= 3
    best = min(said["plain_solvers"], key=lambda s: s["frechet"])
    assert (said["plain_solver"], said["frechet_plain"]) == (best["solver"], best["frechet"])
    # so few rows need not beat the best solver, but they must help the one they correct
    same = next(s for s in said["plain_solvers"] if s["solver"] == "DPM-Solver++ 2M")
    assert said["latent_error_redi"] < same["latent_error"]
    assert said["frechet_redi"] < same["frechet"]
    with Image.open(out / "comparison.png") as sheet:
        assert sheet.width > 600
    shards = {p: p.stat().st_mtime_ns for p in (out / "kb" / "shards").iterdir()}
    assert redi("demo", *options).code == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "kb" / "shards").iterdir()} == shards  # nothing is solved twice
    done = redi("demo", *options, "--seed", "1")
    assert (done.code, "--out" in done.err, len(done.err.splitlines())) == (2, True, 1)


def test_more_than_the_lists_have(redi: Redi, tmp_path: Path) -> None:
    done = redi("demo", "--out", tmp_path / "x", "--rows", "1000000")
    assert (done.code, "13820 train" in done.err or "train and" in done.err) == (2, True)
