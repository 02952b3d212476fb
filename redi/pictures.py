"""What a row is called: its prompt, and a digest of the pictures that its call was given besides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from torch import Tensor

_GIVEN: Final = ("image", "mask_image", "control_image", "control_mask", "ip_adapter_image", "ip_adapter_image_embeds")


def row_names(arguments: Mapping[str, Any], places: Sequence[int]) -> list[str]:
    """One name for each picture of a call, by which its row is known: the same inputs have the same name.

    Args:
        arguments: of the call.
        places: for each picture, which of the call's prompts it is of.
    """
    inputs = max(places, default=0) + 1
    given = [arguments[name] for name in _GIVEN if arguments.get(name) is not None]
    prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
    names: list[str] = []
    for place in range(inputs):
        text = prompt if isinstance(prompt, str) else f"embeddings {_digest(_one(embeddings, place, inputs))}"
        name = str(prompt[place]) if isinstance(prompt, list) else text
        names.append(f"{name} [{_digest([_one(value, place, inputs) for value in given])}]" if given else name)
    return [names[place] for place in places]


def _one(value: Any, place: int, inputs: int) -> Any:
    """What belongs to one of the call's prompts; the value itself where it is for all."""
    many = isinstance(value, (list, tuple, Tensor, np.ndarray)) and len(cast("Sequence[Any]", value)) == inputs
    return value[place] if many else value


def _digest(value: Any) -> str:
    found = hashlib.blake2b(digest_size=4)
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, (list, tuple)):
        for item in cast("Sequence[Any]", value):
            yield from _parts(item)
        return
    array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    yield repr((array.shape, array.dtype.str)).encode()
    yield np.ascontiguousarray(array).tobytes()
