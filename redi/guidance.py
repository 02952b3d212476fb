"""Classifier-free guidance as pipelines compute it: one batch of twice the size, its first half without the prompt.

m = u + w·(c − u) (Ho & Salimans 2022, arXiv 2207.12598). The unconditional output u knows of a picture's prompt only by
the sample, so rows can foretell it: exactly where all begin with the same noise, nearly soon after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from redi.errors import PlanError
from redi.plan import Plan

NOT_DOUBLED: Final = (
    "a plan with half calls needs a pipeline that guides by one batch of twice the size, unconditional half first, and "
    "hands u + w·(c − u) to its scheduler; this one does not: use whole calls"
)
_ROUNDING: Final = 0.02  # of a guided output in bfloat16, as a share of its largest number


def guided(
    unconditional: Float[Tensor, "b *s"], conditional: Float[Tensor, "b *s"], scale: float
) -> Float[Tensor, "b *s"]:
    """The guided output, u + w·(c − u)."""
    return unconditional + scale * (conditional - unconditional)


def require_halves(plan: Plan, *, scale: float, rescale: float, diversity: float, begin: int) -> None:
    """Refuse a plan of half calls where the rows do not know the unconditional half.

    Args:
        plan: the plan.
        scale: of guidance.
        rescale: of guidance, which is no longer linear then.
        diversity: of the noise bank.
        begin: steps that a pipeline leaves out where it starts from a picture.

    Raises:
        PlanError: says what is in the way.
    """
    if not plan.halved:
        return
    wrong = [
        *([f"guidance {scale:g} makes no unconditional calls"] if scale <= 1 else []),
        *([f"guidance_rescale {rescale:g} makes more of the two halves than their difference"] if rescale else []),
        *([f"with diversity {diversity:g} no two runs begin alike"] if diversity else []),
        *(["runs begin with pictures of their own"] if begin else []),
    ]
    if wrong:
        raise PlanError(
            f"plan {plan} leaves half of its first calls to the rows, but {'; '.join(wrong)}; use whole calls"
        )


def unconditional_half(
    question: tuple[Sequence[Any], Mapping[str, Any]] | None,
    answer: Any,
    model_output: Float[Tensor, "b *s"],
    scale: float,
) -> Float[Tensor, "b *s"]:
    """The unconditional half of a network's answer, checked against what the pipeline made of it.

    Args:
        question: the arguments the network was called with; None if it was not heard.
        answer: what it returned.
        model_output: what the pipeline handed to its scheduler.
        scale: of guidance.

    Raises:
        PlanError: the pipeline does not guide by one doubled batch, unconditional half first.
    """
    pictures = len(model_output)
    cut = None if question is None else without(*question, torch.arange(pictures), pictures)
    tensor = None if cut is None else _tensor(answer)
    if tensor is not None and len(tensor) == 2 * pictures and tensor.shape[2:] == model_output.shape[2:]:
        u, c = (half[:, : model_output.shape[1]] for half in tensor.detach().chunk(2))
        expected, given = guided(u.float(), c.float(), scale), model_output.detach().float()
        if bool(((expected - given).abs() <= _ROUNDING * given.abs().amax().clamp(min=1e-6)).all()):
            return u
    raise PlanError(NOT_DOUBLED)


def without(
    args: Sequence[Any], kwargs: Mapping[str, Any], unasked: Int64[Tensor, " n"], pictures: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A network's arguments without the unconditional half of some pictures; None where nobody knows how to cut them.

    That is where the first argument, the samples, is no doubled batch, or another has several rows for each of it.

    Args:
        args: of its call; tensors in them, and in lists, tuples and mappings, are cut if their first dimension is the
            batch.
        kwargs: likewise.
        unasked: pictures whose unconditional half is left out.
        pictures: in the batch.
    """
    batch = 2 * pictures
    sample = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(sample, Tensor) or len(sample) != batch:
        return None
    others = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1]
    if any(rows > batch and rows % batch == 0 for rows in others):
        return None
    kept = torch.ones(batch, dtype=torch.bool)
    kept[unasked] = False

    def cut(value: Any) -> Any:
        match value:
            case Tensor() if value.ndim and len(value) == batch:
                return value[kept.to(value.device)]
            case Mapping():
                return {name: cut(v) for name, v in value.items()}  # pyright: ignore
            case list():
                return [cut(v) for v in value]  # pyright: ignore
            case tuple():
                return tuple(cut(v) for v in value)  # pyright: ignore
            case _:
                return value

    return cut(tuple(args)), cut(dict(kwargs))


def rejoined(output: Any, foretold: Float[Tensor, "b *s"], unasked: Int64[Tensor, " n"]) -> Any:
    """The doubled output a pipeline expects, of what the network made of `without`'s arguments.

    Args:
        output: what it returned.
        foretold: unconditional outputs; those of `unasked` are used.
        unasked: pictures whose unconditional half was left out.
    """
    pictures = len(foretold)

    def join(part: Tensor) -> Tensor:
        conditional = part[-pictures:]
        first = conditional.clone()  # what a network says beyond its prediction, its variance, pipelines drop
        asked = torch.ones(pictures, dtype=torch.bool)
        asked[unasked] = False
        first[asked.to(part.device)] = part[:-pictures]
        there = unasked.to(part.device)
        first[there, : foretold.shape[1]] = foretold[unasked].to(first)
        return torch.cat([first, conditional])

    return _with_tensor(output, join)


def _tensor(output: Any) -> Tensor | None:
    first = output if isinstance(output, Tensor) else output[0]
    return first if isinstance(first, Tensor) else None


def _with_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output, a tensor or something that has it first, with that tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])  # pyright: ignore
    name = next(iter(output))
    output[name] = change(output[0])
    return output
