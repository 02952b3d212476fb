"""The negative prompts of a call, given as texts or as embeddings: are they those that the rows were made with?"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

_ALIKE: Final = 1e-2  # relative distance of two embeddings of one text, in half precision and in another batch
_EMBEDDINGS: Final = "negative_prompt_embeds"
_NAMED: Final = "embeddings "  # how a digest of embeddings begins
_known: weakref.WeakKeyDictionary[Any, dict[Any, list[Tensor] | None]] = weakref.WeakKeyDictionary()


def negative_prompts(pipe: Any, arguments: Mapping[str, Any], known: str = "") -> set[str]:
    """The negative prompts of a call: their texts, "" for none.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        known: a text that passed embeddings may turn out to be of. Others are named by a digest.

    Returns:
        Texts and names. Passed embeddings count as `known` where the pipeline cannot encode it any more.
    """
    passed: Any = arguments.get(_EMBEDDINGS)
    if not isinstance(passed, Tensor):
        given: str | list[str] | None = arguments.get("negative_prompt")
        return {given or ""} if given is None or isinstance(given, str) else set(given)
    if known.startswith(_NAMED):
        return {_name(row) for row in passed}
    own = _encoded(pipe, known)
    alike = None if own is None else _any_alike(passed, own).tolist()
    return {known} if alike is None else {known if a else _name(row) for a, row in zip(alike, passed, strict=True)}


def _name(row: Tensor) -> str:
    # rounded, so that a copy in half precision has the same name
    content = row.detach().to(device="cpu", dtype=torch.float16).contiguous().view(torch.uint8).numpy().tobytes()
    return _NAMED + hashlib.blake2b(content, digest_size=4).hexdigest()


def _any_alike(passed: Tensor, own: list[Tensor]) -> Tensor:
    """Which of the embeddings passed are one of these, but for rounding."""
    x = passed.detach().float().cpu()
    same = torch.zeros(len(x), dtype=torch.bool)
    for o in own:
        if o.shape != x.shape[1:]:
            continue
        if torch.equal(x, o.expand_as(x)):  # as they mostly are, and sooner known than how far they are apart
            return ~torch.zeros_like(same)
        same |= (x - o).flatten(1).norm(dim=1) <= _ALIKE * o.norm()
    return same


@torch.no_grad()
def _encoded(pipe: Any, text: str) -> list[Tensor] | None:
    """What a pipeline's text encoders make of a text, prompt and negative prompt; None if they cannot."""
    encoders = tuple(id(getattr(pipe, name, None)) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    kept = _known.setdefault(pipe, {})
    if (text, encoders) not in kept:
        kept.clear()
        kept[text, encoders] = _encode(pipe, text)
    return kept[text, encoders]


def _encode(pipe: Any, text: str) -> list[Tensor] | None:
    known = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    wanted = {
        "prompt": [text],
        "negative_prompt": [text],
        "device": getattr(pipe, "_execution_device", None),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    needed = [n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    given = {name: value for name, value in {**dict.fromkeys(needed), **wanted}.items() if name in known}
    try:
        out = pipe.encode_prompt(**given) if known else ()
    except Exception:  # encoders that were taken out of the pipeline, to save memory, fail in ways of their own
        return None
    tensors: list[Any] = [out] if isinstance(out, Tensor) else list(out)
    return [t[0].detach().float().cpu() for t in tensors if isinstance(t, Tensor) and t.ndim > 1] or None
