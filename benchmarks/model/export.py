"""Put the trained networks, in half precision, and the prompt lists where the library ships them."""

import argparse
import json
import random
import shutil
from pathlib import Path

import autoencoder
import data
import diffusion
import torch
import training
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

ASSETS = Path(__file__).parents[2] / "redi" / "assets"
# Written by hand as Stable Diffusion's is: what it leaves out, each scheduler class takes from its own defaults.
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    **diffusion.SCHEDULE,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def assemble(out: Path) -> StableDiffusionPipeline:
    """The pipeline of the averaged weights in the training folder `out`, in float32."""
    vae = AutoencoderKL.from_pretrained(out / autoencoder.WHITENED)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = diffusion.Denoiser(tokenizer)
    model.load_state_dict(training.restore(out / diffusion.CHECKPOINT)["average"])
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.encoder.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval(),
        scheduler=PNDMScheduler(steps_offset=1),  # only holds the place of SCHEDULER
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_pipeline(pipeline: StableDiffusionPipeline, tokenizer: Path, folder: Path) -> None:
    pipeline.to(torch.float16).save_pretrained(folder)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    edit(folder / "model_index.json", scheduler=["diffusers", SCHEDULER["_class_name"]])
    # transformers opens a model in the precision its file names, diffusers in float32: agree on float32.
    edit(folder / "text_encoder" / "config.json", dtype="float32")
    weights = folder / "text_encoder" / "model.safetensors"
    named = {prefixed(name): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
    for file in ("unet", "vae"):
        edit(folder / file / "config.json", _name_or_path=None)
    edit(folder / "model_index.json", _name_or_path=None)


def prefixed(name: str) -> str:
    """The name a text encoder's tensor has in transformers 4; 5 reads it too."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in changes or v is not None}, indent=2) + "\n")


def write_prompts(folder: Path, pictures: data.Pictures, name: str) -> None:
    prompts = sorted(set(pictures.prompts()))
    random.Random(0).shuffle(prompts)
    (folder / f"prompts_{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder that holds emoji32.npz and licences/")
    p.add_argument("--out", type=Path, required=True, help="folder the training scripts wrote to")
    p.add_argument("--assets", type=Path, default=ASSETS)
    args = p.parse_args()
    folder: Path = args.assets / "emoji"
    write_pipeline(assemble(args.out), args.out / "tokenizer", folder)
    write_prompts(folder, data.load(args.data, "train"), "train")
    write_prompts(folder, data.load(args.data, "val"), "heldout")
    shutil.copytree(args.data / "licences", folder / "licences", dirs_exist_ok=True, copy_function=shutil.copyfile)
    if (args.out / "evaluator").exists():
        shutil.copytree(args.out / "evaluator", args.assets / "evaluator", dirs_exist_ok=True)
    size = sum(f.stat().st_size for f in args.assets.rglob("*") if f.is_file())
    print(f"{size / 1e6:.2f} MB in {args.assets}")


if __name__ == "__main__":
    main()
