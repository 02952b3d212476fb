"""How well a picture fits its prompt: the cosine in a space that pictures and texts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from redi.errors import InvalidInputError
from redi.evaluation.features import small
from redi.evaluator import Evaluator

_CLIP: Final = "openai/clip-vit-base-patch16"  # the one that CLIP scores are mostly published with


class Score(ABC):
    """From pictures and their prompts to numbers; higher is a better fit."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What it is called, weights included where there are several."""

    @abstractmethod
    def __call__(self, pictures: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        """A cosine in [-1, 1] for each picture in [0, 1] and its prompt, on the CPU."""


@final
class EvaluatorScore(Score):
    """The bundled evaluator's. It knows emoji and their captions."""

    def __init__(self) -> None:
        self.evaluator = Evaluator.load()

    @property
    def identity(self) -> str:
        """`evaluator`."""
        return "evaluator"

    def __call__(self, pictures: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        """Cosine of each picture and its prompt."""
        return self.evaluator.score(small(pictures), prompts).float()


@final
class Clip(Score):
    """CLIP's. Nothing is downloaded.

    Args:
        model: a folder that `CLIPModel.save_pretrained` and its processor wrote, or the name of a model that is in the
            Hub's cache on this machine; None is OpenAI's ViT-B/16.

    Raises:
        InvalidInputError: it is neither, or cannot be loaded.
    """

    def __init__(self, model: str | Path | None = None) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.name = str(model or _CLIP)
        try:
            self.network: Any = CLIPModel.from_pretrained(self.name, local_files_only=True).eval()
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(self.name, local_files_only=True)
            self.processor: Any = CLIPImageProcessor.from_pretrained(self.name, local_files_only=True)
        except (OSError, ValueError) as e:
            raise InvalidInputError(
                f"CLIP's weights {self.name} are not on this machine ({str(e).splitlines()[0]}); name a folder of "
                "them: clip:FOLDER"
            ) from e

    @property
    def identity(self) -> str:
        """`clip`, and which."""
        return f"clip:{self.name}"

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        """Cosine of each picture and its prompt, which is cut where it is longer than CLIP reads."""
        self.network.to(pictures.device)
        eight_bits = (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().permute(0, 2, 3, 1)
        seen = self.processor(images=[p.numpy() for p in eight_bits], return_tensors="pt")
        read = self.tokenizer([*prompts], padding=True, truncation=True, return_tensors="pt")
        out = self.network(**{name: x.to(pictures.device) for name, x in {**seen, **read}.items()})
        return torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu()
