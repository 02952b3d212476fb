"""What a diffusers pipeline is: its denoising network, its settings, and the fingerprint of both."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from redi.alterations import adapters, plain_tensors, precision
from redi.errors import InvalidInputError
from redi.knowledge_base import Fingerprint, weight_hash
from redi.solvers import DiffusersSolver

_NO_SETTINGS: Final = (
    *("prompt", "prompt_2", "prompt_3", "negative_prompt", "latents", "generator", "eta"),
    *("num_inference_steps", "timesteps", "sigmas", "mu", "denoising_start", "denoising_end"),
    *("guidance_scale", "guidance_rescale", "height", "width"),
    *("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "output_type", "return_dict"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
_DENOISERS: Final = ("unet", "transformer")
_ENCODERS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3")
_NOT_HASHED: Final = ("vae", "safety_checker", "vocoder")  # what comes after the last step


def network(pipe: Any) -> torch.nn.Module:
    """The denoising network of a pipeline: its `unet` or `transformer`."""
    return _uncompiled(denoiser(pipe))


def denoiser(pipe: Any) -> torch.nn.Module:
    """The same as the pipeline calls it: with what `torch.compile` wrapped around it."""
    for name in _DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise InvalidInputError(f"expected a pipeline with a unet or a transformer, given {type(pipe).__name__}")


def changeable(pipe: Any) -> dict[str, Any]:
    """The fields of a pipeline's fingerprint that its user may change from one call to the next."""
    net = network(pipe)
    encoders = [_uncompiled(part) for name in _ENCODERS if (part := getattr(pipe, name, None)) is not None]
    return {"adapters": adapters(pipe, [net, *encoders]), "dtype": precision(net)}


def parts_of(pipe: Any) -> dict[str, tuple[int, int]]:
    """Which networks a pipeline has and how many tokens its text encoders know, to tell whether that changed."""
    known: dict[str, tuple[int, int]] = {}
    for name in (*_DENOISERS, *_ENCODERS):
        if isinstance(part := getattr(pipe, name, None), torch.nn.Module):
            tokens: Any = getattr(_uncompiled(part), "get_input_embeddings", lambda: None)()
            known[name] = id(_uncompiled(part)), 0 if tokens is None else len(tokens.weight)
    return known


def denoising(pipe: Any) -> dict[str, torch.nn.Module]:
    """The networks that are run before the last step, by name, the denoiser first."""
    net = network(pipe)
    parts = {name: _uncompiled(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    first = {name: part for name, part in parts.items() if part is net}
    return first | {name: part for name, part in sorted(parts.items()) if name not in (*_NOT_HASHED, *first)}


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
    settings: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Fingerprint:
    """What a pipeline and its settings are, so that rows are served only where they belong.

    Args:
        pipe: the pipeline; everything in it that is run before the last step is hashed.
        solver: the solver that runs.
        steps: fine solver steps.
        guidance: classifier-free guidance scale.
        sample_shape: shape of one sample.
        height: picture height in pixels.
        width: picture width in pixels.
        guidance_rescale: as the pipeline's argument.
        negative_prompt: as the pipeline's argument, "" for none.
        settings: further arguments of the pipeline's call that are not its defaults.
        model: a name for the model; None takes the folder or Hub id it was loaded from.
    """
    (_, net), *others = denoising(pipe).items()
    tensors = [
        plain
        for part, module in [("network", net), *others]
        for name, tensor in module.state_dict().items()
        for plain in plain_tensors(f"{part}.{name}", tensor)
    ]
    if away := sorted({name.split(".")[0] for name, tensor in tensors if tensor.is_meta}):
        raise InvalidInputError(
            f"the weights of {', '.join(away)} are offloaded, so they cannot be told from others; enable redi, build "
            "or record first, and offload then"
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
        settings=settings or {},
        **changeable(pipe),
    )


def settings_of(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that shape every picture of it, are not the pipeline's defaults, and have no other place.

    What differs from picture to picture (prompts, pictures, embeddings), what only says how to hand over the result,
    and what the fingerprint has fields for is left out.
    """
    parameters = _parameters(type(pipe))
    return {
        name: plain
        for name, value in arguments.items()
        if name not in _NO_SETTINGS
        and (plain := _plain(value)) is not None
        and not (name in parameters and plain == _plain(parameters[name].default))
    }


def beside_the_prompt(arguments: Mapping[str, Any]) -> list[str]:
    """The names of a call's arguments that belong to single pictures and are no prompts: pictures, masks, adapters'."""
    return [name for name in unsettled(arguments) if name not in _NO_SETTINGS and "prompt" not in name]


def unsettled(settings: Mapping[str, Any]) -> list[str]:
    """The names of those settings that no fingerprint could keep."""
    fields = (*_NO_SETTINGS, "negative_prompt_embeds")
    return [
        name
        for name, value in settings.items()
        if (name in fields and name != "guidance_rescale") or (value is not None and _plain(value) is None)
    ]


@functools.cache
def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__call__).parameters


def _plain(value: Any) -> Any:
    """A value as JSON keeps it; None for what JSON cannot keep."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(v) for v in value]  # pyright: ignore
        return None if any(i is None for i in items) else items
    if isinstance(value, Mapping):
        known: dict[Any, Any] = {k: _plain(v) for k, v in value.items()}  # pyright: ignore
        return None if any(not isinstance(k, str) or v is None for k, v in known.items()) else known
    return None


def check_size(pipe: Any, height: int | None, width: int | None) -> None:
    """Refuse a picture's height and width in pixels, where given, that latents cannot have.

    Raises:
        InvalidInputError: they are no multiples of what one latent stands for.
    """
    factor = getattr(pipe, "vae_scale_factor", 8)
    multiple = math.lcm(factor if isinstance(factor, int) else 8, 8)  # 8, because diffusers' pipelines refuse others
    if any(n is not None and (n < 1 or n % multiple) for n in (height, width)):
        raise InvalidInputError(f"height and width must be multiples of {multiple} pixels, given {height} and {width}")
