"""What a diffusers pipeline is: its denoising network, the shapes of its samples, the fingerprint of its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from redi.errors import InvalidInputError
from redi.knowledge_base import Fingerprint, weight_hash
from redi.solvers import DiffusersSolver


def network(pipe: Any) -> torch.nn.Module:
    """The denoising network of a pipeline: its `unet` or `transformer`."""
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return _uncompiled(module)
    raise InvalidInputError(f"expected a pipeline with a unet or a transformer, given {type(pipe).__name__}")


def changeable(pipe: Any) -> dict[str, Any]:
    """The fields of a pipeline's fingerprint that its user may change from one call to the next."""
    net: Any = network(pipe)
    active = getattr(pipe, "get_active_adapters", list)
    return {
        "adapters": tuple(active()) if getattr(net, "peft_config", None) else (),
        "dtype": str(net.dtype).removeprefix("torch."),
    }


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` wrapped: the same weights under their own names."""
    return getattr(module, "_orig_mod", module)


def fingerprint(
    pipe: Any,
    solver: DiffusersSolver,
    *,
    steps: int,
    guidance: float,
    sample_shape: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    guidance_rescale: float = 0.0,
    negative_prompt: str = "",
    model: str | None = None,
) -> Fingerprint:
    """What a pipeline and its settings are, so that rows are served only where they belong.

    Args:
        pipe: the pipeline; network and text encoders are hashed.
        solver: the solver that runs.
        steps: fine solver steps.
        guidance: classifier-free guidance scale.
        sample_shape: shape of one sample.
        height: picture height in pixels.
        width: picture width in pixels.
        guidance_rescale: as the pipeline's argument.
        negative_prompt: as the pipeline's argument, "" for none.
        model: a name for the model; None takes the folder or Hub id it was loaded from.
    """
    net = network(pipe)
    encoders = [
        (name, _uncompiled(module))
        for name, module in sorted(pipe.components.items())
        if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
    ]
    tensors = (
        (f"{part}.{name}", tensor)
        for part, module in [("network", net), *encoders]
        for name, tensor in module.state_dict().items()
    )
    return Fingerprint(
        model=model or str(pipe.config.get("_name_or_path", "") or type(pipe).__name__),
        weights=weight_hash(tensors),
        pipeline=type(pipe).__name__,
        scheduler=solver.name,
        scheduler_config=dict(solver.config),
        steps=steps,
        guidance=float(guidance),
        guidance_rescale=float(guidance_rescale),
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        sample_shape=tuple(sample_shape),
        **changeable(pipe),
    )


def sizes(pipe: Any, height: int | None, width: int | None) -> tuple[tuple[int, int, int], int, int]:
    """The shape of a sample, and its picture's height and width in pixels."""
    net: Any = network(pipe)
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    size = net.config.sample_size
    rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
    high, wide = height or int(rows) * factor, width or int(columns) * factor
    multiple = math.lcm(factor, 8)  # latents are whole, and diffusers' pipelines refuse what 8 does not divide
    if high % multiple or wide % multiple:
        raise InvalidInputError(f"height and width must be multiples of {multiple} pixels, given {high} and {wide}")
    return (int(net.config.in_channels), high // factor, wide // factor), high, wide
