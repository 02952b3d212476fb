"""Judges pictures of the bundled emoji model: features, drawing style, and how well a picture fits its prompt.

Trained on real pictures and captions only; it has never seen a generated one. Training lives in benchmarks/model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from redi.errors import InvalidInputError

_SIZE = 32  # pixels a side, what the tower was trained on
_BATCH = 256  # bounds memory; rows do not influence each other, so it changes no value


@final
class _Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), halved in size and widened first if asked."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 3, stride, 1) if stride > 1 else nn.Identity()
        self.norm1, self.conv1 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        x = self.enter(x)
        inner = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(inner)))


@final
class Network(nn.Module):
    """A convolutional image tower, a bag-of-tokens text tower, and a linear style head.

    Args:
        vocabulary: number of tokens.
        styles: number of drawing styles.
        joint: dimension of the space that pictures and texts share.
    """

    def __init__(self, vocabulary: int, styles: int, width: int = 128, joint: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1)
        self.body = nn.Sequential(
            _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 64, 1), _Residual(64, width, 2)
        )
        self.norm = nn.GroupNorm(8, width)
        self.style = nn.Linear(width, styles)
        self.picture = nn.Linear(width, joint)
        self.embedding = nn.Embedding(vocabulary, joint)
        self.text = nn.Sequential(nn.Linear(joint, 2 * joint), nn.SiLU(), nn.Linear(2 * joint, joint))
        self.scale = nn.Parameter(torch.tensor(2.6))  # log of the inverse temperature, 1/0.07, used in training only

    def image_features(self, images: Float[Tensor, "b 3 32 32"]) -> Float[Tensor, "b d"]:
        """Pooled features of pictures in [0, 1]."""
        return functional.silu(self.norm(self.body(self.stem(2.0 * images - 1.0)))).mean(dim=(2, 3))

    def text_features(self, ids: Int[Tensor, "b length"], real: Float[Tensor, "b length"]) -> Float[Tensor, "b joint"]:
        """Unit vectors of texts given as token ids; `real` is 1 where a token is and 0 where padding is."""
        total = (self.embedding(ids) * real[..., None]).sum(dim=1)
        bag = total / real.sum(dim=1, keepdim=True).clamp_min(1.0).sqrt()
        return functional.normalize(bag + self.text(bag), dim=-1)


@final
class Evaluator:
    """The trained network with its tokenizer; `Evaluator.load()` gives the bundled one.

    Args:
        network: the towers, on the CPU or elsewhere.
        tokenizer: text to ids, the bundled model's own.
        styles: names of the drawing styles, in the order of the logits.
    """

    def __init__(self, network: Network, tokenizer: Any, styles: Sequence[str]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.styles = tuple(styles)

    @classmethod
    def load(cls, folder: Path | None = None) -> Evaluator:
        """The evaluator kept in `folder`, or the one shipped with the library.

        Args:
            folder: holds `config.json` and `model.safetensors`.

        Returns:
            The evaluator in float32 on the CPU.
        """
        from safetensors.torch import load_file
        from transformers import CLIPTokenizer

        assets = Path(str(files("redi") / "assets"))
        folder = folder or assets / "evaluator"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = Network(config["vocabulary"], len(config["styles"]))
        network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return cls(network, CLIPTokenizer.from_pretrained(assets / "emoji" / "tokenizer"), config["styles"])

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """What a Fréchet distance is measured on.

        Args:
            images: pictures in [0, 1], 32 × 32 pixels.

        Returns:
            One row of 128 numbers for each picture.

        Raises:
            InvalidInputError: pictures of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, _SIZE, _SIZE):
            raise InvalidInputError(
                f"pictures have shape {tuple(images.shape)}; expected (b, 3, {_SIZE}, {_SIZE}) with values in [0, 1]: "
                "resize them first, or pass output_type='pt' to the bundled pipeline"
            )
        weight = self.network.style.weight
        parts = images.to(device=weight.device, dtype=weight.dtype).split(_BATCH)
        rows = [self.network.image_features(part) for part in parts if len(part)]
        return torch.cat(rows) if rows else weight.new_zeros(0, weight.shape[1])

    @torch.no_grad()
    def style_logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b styles"]:
        """Unnormalised log-probabilities of the drawing styles, in the order of `styles`."""
        return self.network.style(self.features(images))

    @torch.no_grad()
    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b joint"]:
        """Unit vectors of pictures in the space they share with texts."""
        return functional.normalize(self.network.picture(self.features(images)), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "b joint"]:
        """Unit vectors of texts in the space they share with pictures; order of words does not matter."""
        ids, real = tokenize(self.tokenizer, texts)
        device = self.network.embedding.weight.device
        return self.network.text_features(ids.to(device), real.to(device))

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Cosine between each picture and its prompt, in [-1, 1]; higher is a better fit.

        Raises:
            InvalidInputError: numbers of pictures and of prompts differ.
        """
        if len(images) != len(prompts):
            raise InvalidInputError(
                f"{len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[Int[Tensor, "b length"], Float[Tensor, "b length"]]:
    """Token ids without marks, padded with 0, and a mask of the real ones; as long as the longest text, at least 1."""
    if isinstance(texts, str):
        raise InvalidInputError(f"texts is the string {texts!r}; expected a list of strings")
    rows: list[list[int]] = [tokenizer(text, add_special_tokens=False, truncation=True)["input_ids"] for text in texts]
    length = max([1, *map(len, rows)])
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.long).reshape(-1, length)
    real = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows]).reshape(-1, length)
    return ids, real
