"""Random-weight Stable Diffusion pipelines, small enough for tests, whole enough to be saved and loaded by diffusers.

`tiny_pipeline()` has 4×8×8 latents, `tiny_sd15()` the 4×64×64 latents and 77 tokens of Stable Diffusion v1.5.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_BASE: Final = "abcdefghijklmnopqrstuvwxyz0123456789,.'-:!?&()"
_WORDS: Final = ("red", "green", "blue", "apple", "face", "heart", "style", "cat", "dog", "star", "noto")
_SCHEDULE: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def tiny_tokenizer(length: int = 12) -> CLIPTokenizer:
    """A byte-pair tokenizer of letters and a dozen whole words, in CLIP's own file format."""
    merges, pieces = list[tuple[str, str]](), [*_BASE, *(c + "</w>" for c in _BASE)]
    for word in _WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols = ["".join(pair), *symbols[2:]]
            if symbols[0] not in pieces:
                pieces.append(symbols[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        rules.write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=length)


def tiny_pipeline(
    channels: int = 4, latent: int = 8, *, tokens: int = 12, seed: int = 0, gain: float = 3.0
) -> StableDiffusionPipeline:
    """A seeded pipeline of random weights: latents of (channels, latent, latent), pictures twice that size.

    Args:
        channels: of the latents.
        latent: height and width of the latents.
        tokens: length of a prompt.
        seed: of every weight.
        gain: factor on the text conditioning, so that different prompts give clearly different pictures.
    """
    return _pipeline(channels, latent, tokens, seed, gain, factor=2)


def tiny_sd15(*, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion v1.5 in shape (4×64×64 latents, 512 px, 77 tokens) with very small networks."""
    return _pipeline(4, 64, 77, seed, 3.0, factor=8)


def tiny_text_encoder(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextModel:
    """A CLIP text encoder of width 16 for a tokenizer's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_vae(channels: int, latent: int, factor: int, **settings: Any) -> AutoencoderKL:
    """An autoencoder whose pictures are `factor` times as wide as its latents."""
    blocks = factor.bit_length()
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=latent * factor,
        mid_block_add_attention=False,
        **settings,
    )


def _pipeline(channels: int, latent: int, tokens: int, seed: int, gain: float, factor: int) -> StableDiffusionPipeline:
    tokenizer = tiny_tokenizer(tokens)
    with seeded(seed):
        text = tiny_text_encoder(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=latent,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        vae = tiny_vae(channels, latent, factor)
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                weight.data.mul_(gain)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def saved(kind: str = "tiny") -> Path:
    """A folder that `StableDiffusionPipeline.from_pretrained` loads; one per process, removed with it."""
    makers: dict[str, Any] = {"tiny": tiny_pipeline, "sd15": tiny_sd15}
    folder = tempfile.mkdtemp(prefix=f"redi-{kind}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        makers[kind]().save_pretrained(path)
    return path


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights are drawn from torch's global generator; leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
