"""LPIPS (Zhang et al. 2018), a learned distance between two pictures, where its network is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from redi.errors import InvalidInputError, MissingExtraError

_ALEXNET: Final = "alexnet-owt-7be5be79.pth"  # as torchvision names it


@final
class Lpips:
    """The distance on AlexNet's features that the paper recommends; 0 for equal pictures.

    Raises:
        MissingExtraError: torchmetrics or torchvision is not installed.
        InvalidInputError: AlexNet's weights are not where torch keeps what it downloads.
    """

    def __init__(self) -> None:
        try:
            import torchvision as _  # pyright: ignore[reportMissingImports] # noqa: F401
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ImportError:
            raise MissingExtraError("torchvision", "perceptual") from None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
        if not weights.is_file():
            raise InvalidInputError(f"LPIPS needs AlexNet's weights at {weights}; put torchvision's {_ALEXNET} there")
        self.network: Any = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).net

    @torch.no_grad()
    def __call__(self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float32[Tensor, " b"]:
        """A distance for each pair of pictures in [0, 1], on the CPU."""
        self.network.to(a.device)
        return self.network(a.float(), b.float(), normalize=True).reshape(len(a)).float().cpu()
