"""What its user may change in a pipeline from one call to the next without another model: adapters, precision, FreeU.

Looked at in every call, so it costs a fraction of a millisecond where nothing was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch

_LOOKED_AT: Final = 64  # parameters, for eight-bit weights; beyond embeddings and norms, which may be left as they were
_COMPUTES: Final = (torch.float32, torch.float16, torch.bfloat16)
_FREEU: Final = ("s1", "s2", "b1", "b2")


def adapters(pipe: Any, parts: Iterable[torch.nn.Module]) -> tuple[str, ...]:
    """What is active beside the weights: LoRA adapters, IP-Adapters and FreeU, each with its strength unless that is 1.

    Args:
        pipe: a diffusers pipeline.
        parts: its denoising network, then its text encoders.
    """
    parts = list(parts)
    found: dict[str, set[float]] = {}
    for part in parts:
        if getattr(part, "peft_config", None):
            for name, strength in _active(part):
                found.setdefault(name, set()).add(strength)
    said = [name + _strength(strengths) for name, strengths in found.items()]
    fused = [name for name in sorted(getattr(pipe, "fused_loras", ())) if name not in found]
    return (*said, *fused, *_ip_adapters(parts[0]), *_freeu(parts[0]))


def precision(net: Any) -> str:
    """The dtype a network computes in, and in what else its weights are stored."""
    looked_at = _parameters(net)
    kinds = {(type(p), p.dtype): p for p in looked_at}
    stored = sorted({kind for p in kinds.values() if (kind := _small(p))})
    plain = looked_at and not stored and looked_at[0].is_floating_point()
    if plain and not getattr(net, "_keep_in_fp32_modules", None):
        return name_of(looked_at[0].dtype)  # what `net.dtype` says, which asks every module first: a millisecond
    return " stored as ".join((name_of(net.dtype), *stored))


def plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the ones that a quantised tensor consists of."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()  # pyright: ignore
    for part in inner:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def name_of(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _parameters(net: Any) -> list[torch.Tensor]:
    """The first parameters, a module's own before those of its parts; `net.parameters()` makes a name for each."""
    waiting, found = [net], list[torch.Tensor]()
    while waiting and len(found) < _LOOKED_AT:
        module = waiting.pop()
        found += [p for p in module._parameters.values() if p is not None]
        waiting += [part for part in reversed(module._modules.values()) if part is not None]
    return found


def _small(p: torch.Tensor) -> str:
    """In what a parameter is stored, if that is less than it computes in."""
    if type(p) is torch.nn.Parameter and p.dtype in _COMPUTES:
        return ""  # as nearly all are: what follows takes microseconds for each
    if hasattr(p, "__tensor_flatten__"):
        return type(p).__name__
    return name_of(p.dtype) if p.itemsize == 1 else ""


def _active(part: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """Name and strength of the LoRA adapters at work in every layer."""
    for layer in part.modules():
        scaling: Mapping[str, float] | None = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or getattr(layer, "disable_adapters", False):
            continue
        for name in getattr(layer, "active_adapters", ()):
            if name in scaling:
                yield name, scaling[name] / _usual(layer, name)


def _usual(layer: Any, name: str) -> float:
    """A layer's scaling at strength 1."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank) or 1.0


def _ip_adapters(net: Any) -> Iterator[str]:
    if getattr(getattr(net, "config", None), "encoder_hid_dim_type", None) != "ip_image_proj":
        return
    scales = [getattr(processor, "scale", None) for processor in net.attn_processors.values()]
    flat = {float(s) for given in scales for s in (given if isinstance(given, (list, tuple)) else [])}  # pyright: ignore
    yield f"IP-Adapter{_strength(flat)}"


def _freeu(net: Any) -> Iterator[str]:
    blocks = [[vars(block).get(name) for name in _FREEU] for block in getattr(net, "up_blocks", ())]
    for values in {tuple(values) for values in blocks if None not in values}:
        yield f"FreeU({', '.join(f'{n}={v:g}' for n, v in zip(_FREEU, values, strict=True))})"


def _strength(strengths: set[float]) -> str:
    rounded = sorted({round(s, 6) for s in strengths})
    return "" if rounded == [1.0] else f"@{','.join(f'{s:g}' for s in rounded)}"
