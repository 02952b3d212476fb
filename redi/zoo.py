"""The bundled text-to-image model: small enough to ship, real enough to try everything on.

Its weights and prompt lists are in assets/; how they were made is in benchmarks/model.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from redi.errors import InvalidInputError

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

MODELS = ("emoji",)
SPLITS = ("train", "heldout")


def path(name: str) -> Path:
    """The folder of a bundled model, in the layout `StableDiffusionPipeline.from_pretrained` reads.

    Raises:
        InvalidInputError: no bundled model has this name.
    """
    if name not in MODELS:
        raise InvalidInputError(
            f"there is no bundled model {name!r}; there is: {', '.join(map(repr, MODELS))}. "
            "For a model of your own call diffusers' from_pretrained with its folder"
        )
    return Path(str(files("redi") / "assets" / name))


def load(name: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A bundled model as a plain diffusers pipeline on the CPU.

    Args:
        name: "emoji", which draws 32 × 32 emoji pictures in eleven styles.
        dtype: of the weights, which are stored in float16.

    Returns:
        The pipeline, without progress bar and in evaluation mode.

    Raises:
        InvalidInputError: no bundled model has this name.
    """
    folder = path(name)
    with _quiet():
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _quiet() -> Generator[None]:
    """Hold back progress bars and hints about packages this model does not need; errors still show."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [
        (library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in (diffusers, transformers)
    ]
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def prompts(name: str, split: str) -> list[str]:
    """Texts the model knows, `"<caption>, <style> style"`, in a fixed shuffled order without repeats.

    Args:
        name: a bundled model.
        split: "train" for captions it was trained on, "heldout" for captions it has never seen.

    Raises:
        InvalidInputError: no such model or split.
    """
    folder = path(name)
    if split not in SPLITS:
        raise InvalidInputError(f"there is no split {split!r}; there is: {', '.join(map(repr, SPLITS))}")
    return (folder / f"prompts_{split}.txt").read_text(encoding="utf-8").splitlines()
