"""The bundled model: it opens as any Stable Diffusion folder does, draws, and keeps its promises of size and split."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from redi import zoo
from redi.errors import InvalidInputError

MEGABYTE = 1_000_000
STYLES = 11


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return zoo.load("emoji")


def test_opens_with_plain_diffusers(pipeline: StableDiffusionPipeline) -> None:
    plain = StableDiffusionPipeline.from_pretrained(zoo.path("emoji"))
    for ours, theirs in ((pipeline.unet, plain.unet), (pipeline.text_encoder, plain.text_encoder)):
        ours_weights, their_weights = ours.state_dict(), theirs.state_dict()
        assert ours_weights.keys() == their_weights.keys()
        for name, weight in ours_weights.items():
            assert weight.dtype == their_weights[name].dtype == torch.float32
            assert torch.equal(weight, their_weights[name]), name


def test_loading_says_nothing() -> None:
    """In a process of its own: hints are printed on first import only."""
    code = "from redi import zoo; zoo.load('emoji')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_dtype_is_that_asked_for() -> None:
    pipeline = zoo.load("emoji", dtype=torch.bfloat16)
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {w.dtype for m in modules for w in m.parameters()} == {torch.bfloat16}


def test_draws_what_the_seed_says(pipeline: StableDiffusionPipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        return pipeline(
            zoo.prompts("emoji", "train")[:2],
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images

    images = draw(0)
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    assert images.std() > 0.05
    assert torch.equal(images, draw(0))
    assert not torch.equal(images, draw(1))


def test_schedule_is_stable_diffusions(pipeline: StableDiffusionPipeline) -> None:
    expected = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    found = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(found.alphas_cumprod, expected)
    assert found.config.prediction_type == "v_prediction"
    assert found.config.steps_offset == 1
    assert not found.config.clip_sample
    assert not found.config.set_alpha_to_one


def test_latents_are_white(pipeline: StableDiffusionPipeline) -> None:
    """Pictures drawn by the model itself must encode to latents of about unit size, with no scaling factor."""
    images = pipeline(
        zoo.prompts("emoji", "train")[:32],
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    latents = pipeline.vae.encode(2.0 * images - 1.0).latent_dist.mean
    assert pipeline.vae.config.scaling_factor == 1.0
    assert latents.mean().abs() < 0.3
    assert 0.7 < latents.std() < 1.3


def test_no_pickles_and_little_space() -> None:
    files = [f for f in zoo.path("emoji").parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 20 * MEGABYTE
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}
    assert len([f for f in files if f.suffix == ".safetensors"]) == 4


@pytest.mark.parametrize("text", ["grinning face , noto style", "a cat in a hat"])
def test_tokens_turn_back_into_text(pipeline: StableDiffusionPipeline, text: str) -> None:
    ids = pipeline.tokenizer(text)["input_ids"]
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["привет", "你好", "☃", "🙂", "zyzzyva", "naïve café", "\u0000\x7f"])
def test_every_character_has_tokens(pipeline: StableDiffusionPipeline, text: str) -> None:
    start, *inner, end = pipeline.tokenizer(text)["input_ids"]
    assert (start, end) == (pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id)
    assert inner
    assert pipeline.tokenizer.unk_token_id not in inner
    assert pipeline.tokenizer.decode(inner) == text


def test_long_prompts_are_cut(pipeline: StableDiffusionPipeline) -> None:
    ids = pipeline.tokenizer("dog " * 100, truncation=True)["input_ids"]
    assert len(ids) == pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


def test_prompts_fit_the_tokenizer(pipeline: StableDiffusionPipeline) -> None:
    longest = max(zoo.prompts("emoji", "train") + zoo.prompts("emoji", "heldout"), key=len)
    assert len(pipeline.tokenizer(longest)["input_ids"]) <= pipeline.tokenizer.model_max_length


def test_splits_share_no_caption() -> None:
    train, heldout = (zoo.prompts("emoji", split) for split in zoo.SPLITS)
    for prompts in (train, heldout):
        assert len(prompts) == len(set(prompts)) > 1000
        assert all(", " in p and p.endswith(" style") for p in prompts)
        assert prompts != sorted(prompts)
    captions = [{p.rpartition(", ")[0] for p in prompts} for prompts in (train, heldout)]
    styles = [{p.rpartition(", ")[2] for p in prompts} for prompts in (train, heldout)]
    assert captions[0].isdisjoint(captions[1])
    assert styles[0] == styles[1]
    assert len(styles[0]) == STYLES


def test_each_source_is_credited() -> None:
    card = (zoo.path("emoji") / "README.md").read_text(encoding="utf-8")
    for style in {p.rpartition(", ")[2].removesuffix(" style") for p in zoo.prompts("emoji", "heldout")}:
        assert style.removeprefix("fluent ") in card, style
    assert len(list((zoo.path("emoji") / "licences").iterdir())) == 10


def test_files_name_no_place_on_disk() -> None:
    for file in zoo.path("emoji").rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        json.loads(text)
        assert "_name_or_path" not in text
        assert "/root" not in text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="'emoji'"):
        zoo.load("imaginary")
    with pytest.raises(InvalidInputError, match="'train', 'heldout'"):
        zoo.prompts("emoji", "val")
