"""The emoji data set as tensors, and the one place that says how a caption becomes a prompt.

Nothing here is shipped: the training scripts take the folder of the data as `--data`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val")


def prompt(caption: str, style: str | None) -> str:
    """The text a picture is described by: `"<caption>, <style> style"`, or the caption alone."""
    return caption if style is None else f"{caption}, {style} style"


@dataclass(frozen=True)
class Pictures:
    """Rows of one split; row i of every field belongs to the same picture."""

    images: Tensor  # (n, 3, 32, 32) uint8
    captions: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def prompts(self) -> list[str]:
        """Caption and style of every row as one text."""
        return [prompt(c, s) for c, s in zip(self.captions, self.styles, strict=True)]


def load(folder: Path, split: str) -> Pictures:
    """The `split` ("train" or "val") of `folder/emoji32.npz`; captions of the two are disjoint."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    with np.load(folder / "emoji32.npz") as archive:
        rows = archive["split"] == split
        images = torch.from_numpy(archive["images"][rows]).permute(0, 3, 1, 2).contiguous()
        captions = [str(c) for c in archive["caption"][rows]]
        styles = [str(s) for s in archive["style"][rows]]
    return Pictures(images, captions, styles)


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Float pictures in [-1, 1], each flipped at random and moved by up to `shift` white pixels."""
    b, _, height, width = images.shape
    flip = torch.rand(b, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = torch.nn.functional.pad(images, (shift,) * 4, value=255)
    top, left = torch.randint(0, 2 * shift + 1, (2, b), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    moved = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return signed(moved.permute(0, 3, 1, 2))


def signed(images: Tensor) -> Tensor:
    """uint8 pictures to float32 in [-1, 1], the range a Stable Diffusion autoencoder works in."""
    return images.float().div_(127.5).sub_(1.0)
