"""Measure the shipped model: the autoencoder, the evaluator, and pictures drawn finely, beside real ones."""

import argparse
import json
import os
import platform
from pathlib import Path

import autoencoder
import data
import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from redi import zoo
from redi.evaluator import Evaluator
from redi.metrics import frechet_distance

STEPS, GUIDANCE = 40, 3.0
ALIKE = {"fluent 3d", "fluent color"}
SHEET = (  # the last two are held out
    "grinning face", "red heart", "rocket", "sunflower", "octopus", "house", "crown", "red apple",
    "pizza", "hot beverage",
)  # fmt: skip


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """Pictures in [0, 1] of the prompts, in batches, each batch with its own seed."""
    parts: list[Tensor] = []
    for start in range(0, len(prompts), 50):
        generator = torch.Generator().manual_seed(seed + start)
        batch = prompts[start : start + 50]
        parts.append(
            pipeline(
                batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, output_type="pt"
            ).images
        )
    return torch.cat(parts)


def recall(evaluator: Evaluator, images: Tensor, captions: list[str], pool: list[str], seed: int) -> float:
    """Share of pictures whose own caption is among the 10 that fit best out of it and 99 others of `pool`."""
    rng = np.random.default_rng(seed)
    features, index = evaluator.text_features(pool), {c: i for i, c in enumerate(pool)}
    hits = 0
    for image, caption in zip(evaluator.image_features(images), captions, strict=True):
        own = index[caption]
        others = rng.permutation([i for i in range(len(pool)) if i != own])[:99]
        scores = features @ image
        hits += int((scores[torch.from_numpy(others)] >= scores[own]).sum()) < 10
    return hits / len(captions)


def style_accuracy(evaluator: Evaluator, images: Tensor, styles: list[str]) -> dict[str, float]:
    """Share of pictures whose style is recognised; also with two styles that differ by shading counted as one."""
    found = [evaluator.styles[i] for i in evaluator.style_logits(images).argmax(dim=1).tolist()]
    pairs = list(zip(found, styles, strict=True))
    return {
        "style_accuracy": float(np.mean([a == b for a, b in pairs])),
        "style_accuracy_3d_and_color_as_one": float(np.mean([a == b or {a, b} == ALIKE for a, b in pairs])),
    }


def nearly_alike(pictures: data.Pictures) -> float:
    """Share of captions drawn in both styles of `ALIKE` whose two pictures differ by less than 5 % root mean square."""
    first, second = (
        {c: i for i, (c, s) in enumerate(zip(pictures.captions, pictures.styles, strict=True)) if s == style}
        for style in sorted(ALIKE)
    )
    both = [c for c in first if c in second]
    a, b = (pictures.images[[rows[c] for c in both]].float() / 255.0 for rows in (first, second))
    return float(((a - b).square().mean(dim=(1, 2, 3)).sqrt() < 0.05).float().mean())


def judge(
    evaluator: Evaluator, images: Tensor, rows: data.Pictures, against: Tensor, pool: list[str], seed: int
) -> dict[str, float]:
    return {
        **style_accuracy(evaluator, images, rows.styles),
        "recall_at_10_of_100": recall(evaluator, images, rows.captions, pool, seed),
        "score": float(evaluator.score(images, rows.prompts()).mean()),
        "frechet": frechet_distance(evaluator.features(images), against),
    }


def choose(pictures: data.Pictures, count: int, seed: int) -> data.Pictures:
    order = np.random.default_rng(seed).permutation(len(pictures))[:count]
    return data.Pictures(
        pictures.images[torch.from_numpy(order)],
        [pictures.captions[i] for i in order],
        [pictures.styles[i] for i in order],
    )


def sheet(images: Tensor, columns: int, scale: int) -> Image.Image:
    """Pictures side by side, row by row, each pixel drawn as scale x scale."""
    n, _, h, w = images.shape
    grid = images.reshape(n // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(n // columns * h, columns * w, 3) * 255.0).round().byte().numpy()
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder that holds emoji32.npz")
    p.add_argument("--out", type=Path, required=True, help="folder for quality.json and the sheets")
    p.add_argument("--count", type=int, default=400, help="pictures drawn of each split")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    pipeline, evaluator = zoo.load("emoji"), Evaluator.load()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    prompts = [data.prompt(c, s) for c in SHEET for s in evaluator.styles]
    sheet(draw(pipeline, prompts, args.seed), len(evaluator.styles), 2).save(args.out / "sheet.png", optimize=True)

    train, val = data.load(args.data, "train"), data.load(args.data, "val")
    real = train.images.float() / 255.0
    features = evaluator.features(real)
    known, unknown = sorted(set(train.captions)), sorted(set(val.captions))
    seen, unseen = choose(train, args.count, args.seed), choose(val, args.count, args.seed)
    subjects = {
        "real_train": (seen.images.float() / 255.0, seen, known),
        "autoencoded_train": ((autoencoder.given_back(pipeline.vae, seen.images) + 1.0) / 2.0, seen, known),
        "real_val": (unseen.images.float() / 255.0, unseen, unknown),
        "generated_train": (draw(pipeline, seen.prompts(), args.seed), seen, known),
        "generated_val": (draw(pipeline, unseen.prompts(), args.seed), unseen, unknown),
    }
    report = {
        "autoencoder_val_psnr_db": autoencoder.psnr(pipeline.vae, val.images),
        "evaluator_val": style_accuracy(evaluator, val.images.float() / 255.0, val.styles),
        "val_3d_and_color_nearly_alike": nearly_alike(val),
        **{
            name: judge(evaluator, images, rows, features, pool, args.seed)
            for name, (images, rows, pool) in subjects.items()
        },
        "settings": {"steps": STEPS, "guidance": GUIDANCE, "count": args.count, "seed": args.seed},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    (args.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
