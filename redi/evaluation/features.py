"""What a Fréchet distance is measured on: features of pictures, from whichever network is there, or the latents.

Nothing is downloaded: where weights are missing, the error says which, and where they are looked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from redi.errors import InvalidInputError, MissingExtraError
from redi.evaluator import Evaluator

_INCEPTION: Final = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it
_SIDE: Final = 32  # what the bundled evaluator was trained on
_DIRECTIONS: Final = 64


class Features(ABC):
    """From pictures, or the latents they were decoded from, to vectors."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What it is called, weights included where there are several."""

    @abstractmethod
    def __call__(self, pictures: Float[Tensor, "b 3 h w"], latents: Float[Tensor, "b *s"]) -> Float32[Tensor, "b d"]:
        """A vector for each picture, on the CPU.

        Args:
            pictures: in [0, 1], on any device.
            latents: what they were decoded from.
        """

    def directions(self, pictures: int) -> int | None:
        """In how many principal directions of the fine solve's vectors distances are measured; None for all."""
        return None


@final
class EvaluatorFeatures(Features):
    """The bundled evaluator's. It knows emoji of 32 × 32 pixels; other pictures are brought to that size."""

    def __init__(self) -> None:
        self.evaluator = Evaluator.load()

    @property
    def identity(self) -> str:
        """`evaluator`."""
        return "evaluator"

    def __call__(self, pictures: Float[Tensor, "b 3 h w"], latents: Float[Tensor, "b *s"]) -> Float32[Tensor, "b d"]:
        """128 numbers for each picture."""
        return self.evaluator.features(small(pictures)).float()


@final
class LatentFeatures(Features):
    """The latents themselves, in 64 principal directions (fewer where there are fewer than 256 pictures)."""

    @property
    def identity(self) -> str:
        """`latents`."""
        return "latents"

    def __call__(self, pictures: Float[Tensor, "b 3 h w"], latents: Float[Tensor, "b *s"]) -> Float32[Tensor, "b d"]:
        """The latents, flattened."""
        return latents.detach().flatten(1).float().cpu()

    def directions(self, pictures: int) -> int | None:
        """A quarter of the pictures, and at most 64."""
        return min(_DIRECTIONS, max(1, pictures // 4))


@final
class Inception(Features):
    """The 2048 pooled features of Inception v3 that Fréchet distances between photographs are published in.

    Args:
        weights: torch-fidelity's checkpoint; None looks where torch keeps what it downloads.

    Raises:
        MissingExtraError: torchmetrics or torch-fidelity is not installed.
        InvalidInputError: there are no weights.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        self.weights = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
        try:
            import torch_fidelity as _  # pyright: ignore[reportMissingImports] # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError:
            raise MissingExtraError("torch-fidelity", "perceptual") from None
        if not self.weights.is_file():
            raise InvalidInputError(
                f"Inception's weights are not at {self.weights}; put torch-fidelity's {_INCEPTION} there, or name "
                "another file: inception:FILE"
            )
        self.network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(self.weights))

    @property
    def identity(self) -> str:
        """`inception`, and the file of the weights."""
        return f"inception:{self.weights.name}"

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "b 3 h w"], latents: Float[Tensor, "b *s"]) -> Float32[Tensor, "b d"]:
        """2048 numbers for each picture, which is rounded to eight bits first, as is the custom."""
        self.network.to(pictures.device)
        out = self.network((pictures.float() * 255).round().clamp(0, 255).to(torch.uint8))
        return out.reshape(len(pictures), -1).float().cpu()


def small(pictures: Float[Tensor, "b 3 h w"]) -> Float32[Tensor, "b 3 32 32"]:
    """Pictures of the evaluator's size, on the CPU."""
    x = pictures.float().cpu()
    if x.shape[-2:] == (_SIDE, _SIDE):
        return x
    return torch.nn.functional.interpolate(x, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
