"""The negative prompts of a call, given as texts or as embeddings: are they those that the rows were made with?"""

from __future__ import annotations

import hashlib
import inspect
import re
import weakref
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from redi.errors import InvalidInputError

_ALIKE: Final = 1e-2  # relative distance of two embeddings of one text, in half precision and in another batch
_EMBEDDINGS: Final = "negative_prompt_embeds"
_NAME: Final = re.compile("embeddings [0-9a-f]{8}")  # a digest of them
_ENCODED: Final = "'' encoded"  # the empty text, where no negative prompt at all stands for zeros
_OTHER: Final = "a prompt that stands for no negative one"
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
    passed = _passed(arguments)
    if _EMBEDDINGS not in passed:
        given: str | list[str] | None = arguments.get("negative_prompt")
        if given is None:
            return {""}
        texts = {given} if isinstance(given, str) else set(given)
        return {text or (_ENCODED if _zeroes(pipe) else "") for text in texts}
    if _NAME.fullmatch(known):
        return {_name(row) for row in passed[_EMBEDDINGS]}
    own = _encoded(pipe, known)
    if own is None:
        return {known}
    # what is pooled of them, and their mask, must be that text's, too
    alike = [all(each) for each in zip(*(_any_alike(rows, own) for rows in passed.values()), strict=False)]
    return {known if a else _name(row) for a, row in zip(alike, passed[_EMBEDDINGS], strict=False)}


def unverified(pipe: Any, arguments: Mapping[str, Any], known: str) -> list[str]:
    """The negative embeddings of a call that nobody can compare with those of a text: there is no encoder."""
    passed = _passed(arguments)
    return list(passed) if passed and _encoded(pipe, known) is None else []


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
    return [""] * count if known == _ENCODED else [known] * count


def _passed(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What stands for negative prompts in a call, besides texts."""
    return {n: v for n, v in arguments.items() if re.match("negative_.*prompt", n) and isinstance(v, Tensor)}


def _zeroes(pipe: Any) -> bool:
    """Whether a pipeline takes zeros where there is no negative prompt, which is another thing than an empty one."""
    return bool(getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", False))


def _name(row: Tensor) -> str:
    # rounded, so that a copy in half precision has the same name
    content = row.detach().to(device="cpu", dtype=torch.float16).contiguous().view(torch.uint8).numpy().tobytes()
    return f"embeddings {hashlib.blake2b(content, digest_size=4).hexdigest()}"


def _any_alike(passed: Tensor, own: list[Tensor]) -> list[bool]:
    """Which of the embeddings passed are one of these, but for rounding."""
    x = passed.detach().float().cpu()
    same = torch.zeros(len(x), dtype=torch.bool)
    for o in own:
        if o.shape != x.shape[1:]:
            continue
        if torch.equal(x, o.expand_as(x)):  # as they mostly are, and sooner known than how far they are apart
            return [True] * len(x)
        same |= (x - o).flatten(1).norm(dim=1) <= _ALIKE * o.norm()
    return same.tolist()


@torch.no_grad()
def _encoded(pipe: Any, text: str) -> list[Tensor] | None:
    """What a pipeline's text encoders make of a negative prompt; None if they cannot."""
    encoders = tuple(id(getattr(pipe, name, None)) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    kept = _known.setdefault(pipe, {})
    if (text, encoders) not in kept:
        kept.clear()
        kept[text, encoders] = _encode(pipe, text)
    return kept[text, encoders]


def _encode(pipe: Any, text: str) -> list[Tensor] | None:
    known = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    none = not text and _zeroes(pipe)
    text = "" if text == _ENCODED else text
    wanted = {
        "prompt": [_OTHER if none else text],  # a pipeline that knows no negative prompt encodes it as another prompt
        "negative_prompt": None if none else [text],
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
