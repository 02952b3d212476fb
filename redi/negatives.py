"""The negative prompts of a call, given as texts or as embeddings: are they those that the rows were made with?"""

from __future__ import annotations

import hashlib
import inspect
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from redi.errors import InvalidInputError

_ALIKE: Final = 1e-2  # relative distance of two embeddings of one text, in half precision and in another batch
_EMBEDDINGS: Final = "negative_prompt_embeds"
_NAME: Final = re.compile("embeddings [0-9a-f]{8}")  # a digest of them
_EMPTY: Final = "an empty text, not none"  # where no negative prompt at all stands for zeros
_known: weakref.WeakKeyDictionary[Any, dict[Any, list[Tensor] | None]] = weakref.WeakKeyDictionary()


def negative_prompts(pipe: Any, arguments: Mapping[str, Any], known: str = "") -> set[str]:
    """The negative prompts of a call: their texts, "" for none.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        known: a text that passed embeddings may turn out to be of. Others are named by a digest.

    Returns:
        Texts and names. Passed embeddings count as `known` where nothing is there to compare them with.
    """
    passed = _passed(arguments)
    if not passed:
        given: str | list[str] | None = arguments.get("negative_prompt")
        if given is None:
            return {""}
        texts = {given} if isinstance(given, str) else set(given)
        return {text or (_EMPTY if _tells_empty_from_none(pipe) else "") for text in texts}
    if _NAME.fullmatch(known):
        return set(_names(passed))
    own = _encoded(pipe, known)
    compared = [_alike(rows, kin) for n, rows in passed.items() if (kin := _kin(n, rows, own)) is not None]
    alike = [all(each) for each in zip(*compared, strict=False)]  # embeddings, what is pooled of them, and their mask
    if all(alike):
        return {known}
    return {known if a else name for a, name in zip(alike, _names(passed), strict=False)}


def unverified(pipe: Any, arguments: Mapping[str, Any], known: str) -> list[str]:
    """Which of a call's negative embeddings nobody can compare with those of a text: no encoder makes them."""
    own = _encoded(pipe, known) if (passed := _passed(arguments)) else None
    return [name for name, rows in passed.items() if _kin(name, rows, own) is None]


def negative_texts(known: str, count: int) -> list[str] | None:
    """The argument `negative_prompt` of so many pictures, for a call with the negative prompt of the rows.

    Raises:
        InvalidInputError: they were made with embeddings, of which no text is known.
    """
    if _NAME.fullmatch(known):
        raise InvalidInputError(
            f"the rows were made with negative {known}, and no text that they are of is known; only calls that pass "
            "the same negative_prompt_embeds can be served"
        )
    if not known:
        return None
    return [""] * count if known == _EMPTY else [known] * count


def _passed(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What stands for negative prompts in a call, besides texts; the embeddings first."""
    found = {n: v for n, v in arguments.items() if n.startswith("negative_") and isinstance(v, Tensor)}
    return dict(sorted(found.items(), key=lambda item: item[0] != _EMBEDDINGS))


def _names(passed: Mapping[str, Tensor]) -> Iterator[str]:
    """A name for each row of everything passed."""
    for row in zip(*passed.values(), strict=False):
        # rounded, so that a copy in half precision has the same name
        parts = [part.detach().to(device="cpu", dtype=torch.float16).contiguous().view(torch.uint8) for part in row]
        content = b"".join(part.numpy().tobytes() for part in parts)
        yield f"embeddings {hashlib.blake2b(content, digest_size=4).hexdigest()}"


def _kin(name: str, passed: Tensor, own: list[Tensor] | None) -> list[Tensor] | None:
    """Those of a pipeline's own that a tensor of this name is compared with; None where there is nothing."""
    shaped = [o for o in own or () if o.shape == passed.shape[1:]]
    return None if own is None or not (shaped or name == _EMBEDDINGS) else shaped


def _alike(passed: Tensor, own: list[Tensor]) -> list[bool]:
    """Which rows are one of these, but for rounding."""
    x = passed.detach().float().cpu()
    same = torch.zeros(len(x), dtype=torch.bool)
    for o in own:
        if torch.equal(x, o.expand_as(x)):  # as they mostly are, and sooner known than how far they are apart
            return [True] * len(x)
        same |= (x - o).flatten(1).norm(dim=1) <= _ALIKE * o.norm()
    return same.tolist()


def _tells_empty_from_none(pipe: Any) -> bool:
    """Whether no negative prompt is another thing than an empty one: Stable Diffusion XL takes zeros for none."""
    if not _may_zero(pipe):
        return False
    none, empty = (_encoded(pipe, known) for known in ("", _EMPTY))
    if none is None or empty is None:
        return True
    return len(none) != len(empty) or not all(map(torch.equal, none, empty))


def _may_zero(pipe: Any) -> bool:
    return bool(getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", False))


@torch.no_grad()
def _encoded(pipe: Any, known: str) -> list[Tensor] | None:
    """What a pipeline's text encoders make of a negative prompt; None if they cannot."""
    encoders = tuple(id(getattr(pipe, name, None)) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    kept = _known.setdefault(pipe, {})
    if any(others != encoders for _, others in kept):
        kept.clear()
    if (known, encoders) not in kept:
        try:
            kept[known, encoders] = list(_encode(pipe, known)) or None
        except Exception:  # encoders that were taken out of the pipeline, to save memory, fail in ways of their own
            kept[known, encoders] = None
    return kept[known, encoders]


def _encode(pipe: Any, known: str) -> Iterator[Tensor]:
    """Outputs for a negative prompt: those that do not change with the prompt."""
    parameters = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    (text,) = negative_texts(known, 1) or [None if _may_zero(pipe) else ""]
    more = {
        "negative_prompt": None if text is None else [text],
        "device": getattr(pipe, "_execution_device", None),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    # a pipeline that has no negative prompt there encodes it as it does a prompt
    prompts = ("one", "and two") if "negative_prompt" in parameters else (text or "",)
    for encoder in ({"text_encoder_index": i} for i in range(2 if "text_encoder_index" in parameters else 1)):
        made: list[list[Tensor]] = []
        for prompt in prompts:
            given = {**dict.fromkeys(needed), **more, **encoder, "prompt": [prompt]}
            out: Any = pipe.encode_prompt(**{n: v for n, v in given.items() if n in parameters}) if parameters else ()
            tensors: list[Any] = [out] if isinstance(out, Tensor) else list(out)
            made.append([t[0].detach().float().cpu() for t in tensors if isinstance(t, Tensor) and t.ndim > 1])
        yield from (first for first, *others in zip(*made, strict=True) if all(torch.equal(first, o) for o in others))
