"""Which noise of the bank each picture of a pipeline's call starts from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from redi.errors import InvalidInputError
from redi.interception import Start
from redi.noise import NoiseBank


def start_from(
    bank: NoiseBank, drawn: Float[Tensor, "b *s"], start: Start, names: Sequence[Hashable], seed: int
) -> tuple[Int64[Tensor, " b"], Float[Tensor, "b *s"]]:
    """Noise ids, and noise times the pipeline's scale in place of what it drew; noise that was passed stays.

    Args:
        bank: the noises.
        drawn: what the pipeline drew or was passed.
        start: how.
        names: of each picture's prompt: only pictures of one prompt must differ, so a prompt's noise does not depend
            on what it is batched with.
        seed: where there is no generator.

    Returns:
        Ids, −1 for passed noise that is not the bank's; and the noise.

    Raises:
        InvalidInputError: samples of another shape than the bank's.
        NoiseError: more pictures of one prompt than the bank has noises.
    """
    if tuple(drawn.shape[1:]) != tuple(bank.shape):
        raise InvalidInputError(
            f"the knowledge base's noise has shape {tuple(bank.shape)}, this call's {tuple(drawn.shape[1:])}; "
            "ask for pictures of the knowledge base's size"
        )
    if start.passed:
        return bank.match(drawn.float().cpu() / start.scale), drawn
    keys = [f"redi:{seed}".encode()] if start.states is None else start.states
    keys = keys * len(drawn) if len(keys) == 1 else keys
    ids, noise = torch.empty(len(drawn), dtype=torch.int64), torch.empty(drawn.shape, dtype=torch.float32)
    for name in dict.fromkeys(names):
        pictures = [i for i, other in enumerate(names) if other == name]
        ids[pictures], noise[pictures] = bank.draw([keys[i] for i in pictures])
    return ids, (noise * start.scale).to(drawn.device, drawn.dtype)


def places_of(arguments: Mapping[str, Any], pictures: int) -> list[int]:
    """For each picture of a call, which of the call's prompts it is of; pictures of one prompt lie together."""
    prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
    many = prompt if isinstance(prompt, list) else embeddings if isinstance(embeddings, Tensor) else [prompt]  # pyright: ignore
    each = max(1, pictures // max(1, len(many)))  # pyright: ignore
    return [i // each for i in range(pictures)]


def prompts_of(arguments: Mapping[str, Any], pictures: int) -> list[Hashable]:
    """What the pictures of one prompt have in common: its text, or its place in the call."""
    prompt, places = arguments.get("prompt"), places_of(arguments, pictures)
    return [prompt[p] for p in places] if isinstance(prompt, list) else list(places)  # pyright: ignore
